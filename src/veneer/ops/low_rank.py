"""A frozen product with adapters on it: y = (x W^T + (x A^T) B^T) * s + b, row by row the adapter that the row asks for.

LoRA: arXiv 2106.09685. `x` is `[N, in]`; a projection group (q|k|v) is one product with one A for all its parts and one B per
part. Rows are given as spans: `packs[span.index]` applies to rows start..stop, index -1 is the bare base.

What each operation keeps: its input x and the r-wide shrink x A^T. The frozen weight is a `Frozen`: dense here, quantised
weights elsewhere bring their own, and are never kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from veneer.ops.gated import gated
from veneer.types import Span


@runtime_checkable
class Frozen(Protocol):
    """A product with a weight that never changes. Neither method records a gradient."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def apply(self, x: Float[Tensor, "n inp"]) -> Float[Tensor, "n out"]:
        """x W^T, a new tensor."""

    def apply_transposed(self, dy: Float[Tensor, "n out"]) -> Float[Tensor, "n inp"]:
        """dy W, a new tensor."""


@dataclass(frozen=True, eq=False)
class DenseFrozen:
    """A 16- or 32-bit weight `[out, in]`, in any stride order."""

    weight: Tensor

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def apply(self, x: Float[Tensor, "n inp"]) -> Float[Tensor, "n out"]:
        with torch.no_grad():
            return torch.mm(x, self.weight.t())

    def apply_transposed(self, dy: Float[Tensor, "n out"]) -> Float[Tensor, "n inp"]:
        with torch.no_grad():
            return torch.mm(dy, self.weight)


@dataclass(frozen=True, eq=False)
class Pack:
    """What one adapter puts on one projection group.

    A          `[R, in]`, stacked over the group's parts; None without a low-rank update
    B          per part `[out_p, r_p]`, the scale folded in; the r_p sum to R, in the order of A's rows
    columns    the output columns of each B
    in_scale   `[in]`   x <- x * in_scale first
    out_scale  `[out]`  y <- y * out_scale after the product and the low-rank update, before the bias
    bias       `[out]`  the whole effective bias; None keeps the base's as it is
    """

    A: Tensor | None = None
    B: tuple[Tensor, ...] = ()
    columns: tuple[tuple[int, int], ...] = ()
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    bias: Tensor | None = None


def adapted_linear_reference(
    x: Float[Tensor, "n inp"],
    weight: Float[Tensor, "out inp"],
    bias: Float[Tensor, " out"] | None,
    packs: Sequence[Pack],
    spans: Sequence[Span],
) -> Float[Tensor, "n out"]:
    """The definition of `adapted_linear`, with the dense weight in place of a `Frozen`."""
    found = []
    for span in spans:
        rows = x[span.start : span.stop]
        pack = packs[span.index] if span.index >= 0 else Pack()
        if pack.in_scale is not None:
            rows = rows * pack.in_scale.to(x.dtype)
        y = rows @ weight.t()
        if pack.A is not None:
            y = y + _low_rank(rows, pack, y.shape[1])
        if pack.out_scale is not None:
            y = y * pack.out_scale.to(x.dtype)
        b = bias if pack.bias is None else pack.bias
        found.append(y if b is None else y + b.to(x.dtype))
    return torch.cat(found)


def _low_rank(x: Tensor, pack: Pack, out_features: int) -> Tensor:
    assert pack.A is not None
    shrunk = F.linear(x, pack.A.to(x.dtype)).split([b.shape[1] for b in pack.B], dim=1)
    y = x.new_zeros(len(x), out_features)
    for h, b, (start, stop) in zip(shrunk, pack.B, pack.columns, strict=True):
        y = y + F.pad(F.linear(h, b.to(x.dtype)), (start, out_features - stop))
    return y


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen) -> Tensor:
        ctx.frozen = frozen
        return frozen.apply(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.frozen.apply_transposed(dy), None


def adapted_linear(
    x: Float[Tensor, "n inp"],
    frozen: Frozen,
    bias: Float[Tensor, " out"] | None,
    packs: Sequence[Pack],
    spans: Sequence[Span],
) -> Float[Tensor, "n out"]:
    """y = (x W^T + (x A^T) B^T) * out_scale + bias. The spans cover all rows of x in order."""
    found = []
    for span in spans:
        rows = x[span.start : span.stop]
        pack = packs[span.index] if span.index >= 0 else Pack()
        if pack.in_scale is not None:
            rows = rows * pack.in_scale.to(x.dtype)
        y: Any = _FrozenProduct.apply(rows, frozen)
        if pack.A is not None:
            y = y + _low_rank(rows, pack, y.shape[1])
        if pack.out_scale is not None:
            y = y * pack.out_scale.to(x.dtype)
        b = bias if pack.bias is None else pack.bias
        found.append(y if b is None else y + b.to(x.dtype))
    return torch.cat(found)


def gated_adapted_linear(
    gate_up: Float[Tensor, "n twice"],
    activation: str,
    frozen: Frozen,
    bias: Float[Tensor, " out"] | None,
    packs: Sequence[Pack],
    spans: Sequence[Span],
) -> Float[Tensor, "n out"]:
    """adapted_linear(act(gate) * up, ...), the last product of a gated MLP."""
    return adapted_linear(gated(gate_up, activation), frozen, bias, packs, spans)
