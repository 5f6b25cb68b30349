"""int8 weights with one fp32 scale a row: q = round(127 w / absmax(row)), w ~ q * absmax / 127.

The storage of LLM.int8 (arXiv 2208.07339; bitsandbytes' CB and SCB), weights only: activations stay as they are, so there are no
outlier columns to treat apart. 8 + 32 / columns bits a weight, error 0.6 % on Gaussian data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from veneer.ops.native import few, rows
from veneer.ops.recording import unrecorded

TINY = 1e-38


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """codes `[rows, columns]` and the absmax of each row `[rows]`, fp32."""

    codes: Int8[Tensor, "rows columns"]
    absmax: Float[Tensor, " rows"]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 4 * self.absmax.numel()

    @cached_property
    def scale(self) -> Tensor:
        """What a code of each row is worth `[rows]`, fp32."""
        return (self.absmax / 127.0).contiguous()

    @cached_property
    def rows(self) -> few.Rows:
        """As the kernels take it."""
        return few.Rows(few.INT8, self.shape, self.codes, scale=self.scale)

    @cached_property
    def short_scale(self) -> Tensor:
        """The same in bf16, for torch's product of few rows."""
        return self.scale.bfloat16()

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps."""
        return {"codes": self.codes, "absmax": self.absmax}

    def dequantise(self, out: Tensor) -> Tensor:
        """Write the weight into `out` `[rows, columns]`, rounded once from fp32 to its dtype."""
        return dequantise(self, out)

    def few_rows(self, x: Tensor) -> Tensor | None:
        """x W^T from the codes where they lie, for few rows in bf16."""
        return few_rows(x, self)


FEW = 8
"""Rows up to which a product reads the codes where they lie; for more, a dense copy is made once and multiplied faster."""


@unrecorded
def few_rows(x: Float[Tensor, "n columns"], stored: Int8Rows) -> Float[Tensor, "n rows"] | None:
    """x deq(W)^T without the dense weight, or None where there is no kernel for it: decoding reads half the bytes of bf16.

    Torch's kernel takes the scale rounded to bf16, as the result is; ours as it is.
    """
    ours = few.product_stored(x, stored.rows)
    if ours is not None:
        return ours
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or len(x) > FEW or x.shape[1] % 32:
        return None
    y: Tensor = torch._weight_int8pack_mm(x.contiguous(), stored.codes, stored.short_scale)
    return y


@torch.no_grad()
def quantise(weight: Float[Tensor, "rows columns"]) -> Int8Rows:
    """Round to the nearest, ties to even. A row of zeros stays zeros."""
    wide = weight.to(torch.float32)
    absmax = wide.abs().amax(dim=1)
    codes = torch.round(wide * (127.0 / absmax.clamp(min=TINY))[:, None]).to(torch.int8)
    return Int8Rows(codes, absmax)


@torch.no_grad()
def dequantise(stored: Int8Rows, out: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """codes * (absmax / 127) in fp32, written to `out` in its dtype."""
    if rows.dequantise_int8(stored.codes, stored.scale, out):
        return out
    return torch.mul(stored.codes, stored.scale[:, None], out=out)
