"""NF4: 4-bit weights on the quantiles of a Gaussian, one fp32 scale a block of 64, bytes as bitsandbytes lays them out.

QLoRA, arXiv 2305.14314. w ~ LEVELS[code] * absmax(block). With double quantisation the absmax values are themselves stored in
8 bits: minus their mean, in blocks of 256, on the signed "dynamic" code. Bits a weight: 4.5, or 4.127.

The surprise: the paper says FP8 for the second level, the implementation everyone's files come from uses the dynamic code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from veneer.ops.native import rows

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK = 64
ABSMAX_BLOCK = 256
TINY = 1e-38
CHUNK = 1 << 15
"""Bytes dequantised at a time: their fp32 pairs stay in a core's cache."""


@dataclass(frozen=True, eq=False)
class DoubleQuantised:
    """Absmax values in 8 bits: dynamic_code()[codes] * absmax[block of 256] + offset."""

    codes: UInt8[Tensor, " blocks"]
    absmax: Float[Tensor, " superblocks"]
    offset: Float[Tensor, ""]


@dataclass(frozen=True, eq=False)
class NF4:
    """A weight of `shape`, flattened row by row. Two codes a byte, the first in the high half."""

    packed: UInt8[Tensor, " bytes"]
    absmax: Tensor | DoubleQuantised
    shape: tuple[int, int]
    block: int = BLOCK

    @property
    def nbytes(self) -> int:
        a = self.absmax
        tensors = (a,) if isinstance(a, Tensor) else (a.codes, a.absmax, a.offset)
        return sum(t.numel() * t.element_size() for t in (self.packed, *tensors))

    def scales(self) -> Float[Tensor, " blocks"]:
        """The absmax of each block, fp32."""
        return self.absmax if isinstance(self.absmax, Tensor) else _undouble(self.absmax)

    def dequantise(self, out: Tensor) -> Tensor:
        """Write the weight into `out` `[rows, columns]`, contiguous, rounded once from fp32 to its dtype."""
        return dequantise(self, out)


@cache
def levels() -> Float[Tensor, " levels"]:
    return torch.tensor(LEVELS, dtype=torch.float32)


@cache
def _midpoints() -> Float[Tensor, " midpoints"]:
    return (levels()[1:] + levels()[:-1]) / 2


@cache
def _pairs() -> Tensor:
    """Byte -> both of its levels, as one 64-bit value: half the look-ups. `[256]` complex64."""
    byte = torch.arange(256)
    return torch.view_as_complex(torch.stack((levels()[byte >> 4], levels()[byte & 15]), dim=1).contiguous())


@cache
def dynamic_code(*, signed: bool = True) -> Float[Tensor, " codes"]:
    """The 8-bit dynamic code, 256 values: 7 decades with 1, 2, ... 64 steps each, both signs, 0 and 1.

    Without a sign there is a bit more for the steps: 2, 4, ... 128 in each decade.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        means = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += means.tolist() + ((-means).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


def _blocks(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The absmax of each block, and values / absmax, clipped to [-1, 1]. The last block may be shorter."""
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / absmax.clamp(min=TINY))[:, None]).clamp_(-1, 1)
    return absmax, scaled.view(-1)[: len(flat)]


@torch.no_grad()
def quantise(weight: Float[Tensor, "rows columns"], *, block: int = BLOCK, double: bool = False) -> NF4:
    """The nearest level in each block; ties go down."""
    absmax, scaled = _blocks(weight.reshape(-1).to(torch.float32), block)
    codes = torch.nn.functional.pad(torch.bucketize(scaled, _midpoints(), out_int32=True), (0, len(scaled) % 2))
    packed = ((codes[::2] << 4) | codes[1::2]).to(torch.uint8)
    shape = (weight.shape[0], weight.shape[1])
    return NF4(packed, _double(absmax) if double else absmax, shape, block)


def _double(absmax: Tensor) -> DoubleQuantised:
    offset = absmax.mean()
    second, scaled = _blocks(absmax - offset, ABSMAX_BLOCK)
    code = dynamic_code()
    nearest = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2, out_int32=True)
    return DoubleQuantised(nearest.to(torch.uint8), second, offset)


def _undouble(stored: DoubleQuantised) -> Tensor:
    values = dynamic_code()[stored.codes.int()]
    blocks = torch.arange(len(values)) // ABSMAX_BLOCK
    return values * stored.absmax[blocks] + stored.offset


@torch.no_grad()
def dequantise(stored: NF4, out: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """LEVELS[code] * absmax in fp32, written to `out` in its dtype."""
    flat, scales, block = out.view(-1), stored.scales(), stored.block
    whole = len(flat) // block * block
    if whole == len(flat) and rows.nf4_dequantise(stored.packed, scales, block, levels(), flat):
        return out
    step = max(CHUNK // block, 1) * block
    for start in range(0, whole, 2 * step):
        stop = min(start + 2 * step, whole)
        pairs = _pairs().index_select(0, stored.packed[start // 2 : stop // 2].int())
        values = torch.view_as_real(pairs).view(-1, block)
        torch.mul(values, scales[start // block : stop // block, None], out=flat[start:stop].view(-1, block))
    if whole < len(flat):
        tail = torch.view_as_real(_pairs()[stored.packed[whole // 2 :].int()]).reshape(-1)
        flat[whole:] = tail[: len(flat) - whole] * scales[-1]
    return out
