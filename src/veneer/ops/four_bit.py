"""4-bit weights in blocks: w ~ level[code] * scale(block), for any table of 16 levels; bytes as bitsandbytes lays them out.

A block of 64 numbers has one fp32 scale: its largest absolute value, or, for tables made for it, the value of largest size with
its sign, so that the largest is always +1 and -1 needs no level (BOF4-S). With double quantisation the scales are themselves
stored in 8 bits: minus their mean, in blocks of 256, on the signed "dynamic" code. Bits a weight: 4.5, or 4.127.

The surprise: QLoRA's paper (arXiv 2305.14314) says FP8 for the second level, the implementation everyone's files come from uses
the dynamic code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from veneer.ops.native import rows

BLOCK = 64
SCALE_BLOCK = 256
TINY = 1e-38
CHUNK = 1 << 15
"""Bytes dequantised at a time: their fp32 pairs stay in a core's cache."""


@dataclass(frozen=True)
class Table:
    """16 levels in [-1, 1], by code. Two codes may share a level; the first of them is written.

    signed  a block is divided by its value of largest size, sign included, instead of by that size
    """

    levels: tuple[float, ...]
    signed: bool = False

    @cached_property
    def values(self) -> Float[Tensor, " levels"]:
        return torch.tensor(self.levels, dtype=torch.float32)

    @cached_property
    def codes(self) -> Tensor:
        """The codes in the order of their levels, each level once."""
        first = {level: code for code, level in reversed(list(enumerate(self.levels)))}
        return torch.tensor([first[level] for level in sorted(first)], dtype=torch.int32)

    @cached_property
    def midpoints(self) -> Tensor:
        """Between neighbouring levels, ascending."""
        ordered = self.values[self.codes]
        return (ordered[1:] + ordered[:-1]) / 2

    @cached_property
    def pairs(self) -> Tensor:
        """Byte -> both of its levels, as one 64-bit value: half the look-ups. `[256]` complex64."""
        byte = torch.arange(256)
        both = torch.stack((self.values[byte >> 4], self.values[byte & 15]), dim=1)
        return torch.view_as_complex(both.contiguous())


@dataclass(frozen=True, eq=False)
class DoubleQuantised:
    """Scales in 8 bits: dynamic_code()[codes] * absmax[block of 256] + offset."""

    codes: UInt8[Tensor, " blocks"]
    absmax: Float[Tensor, " superblocks"]
    offset: Float[Tensor, ""]


@dataclass(frozen=True, eq=False)
class FourBit:
    """A weight of `shape`, flattened row by row. Two codes a byte, the first in the high half. `absmax` holds the scales."""

    packed: UInt8[Tensor, " bytes"]
    absmax: Tensor | DoubleQuantised
    shape: tuple[int, int]
    table: Table
    block: int = BLOCK

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps."""
        a = self.absmax
        if isinstance(a, Tensor):
            return {"packed": self.packed, "absmax": a}
        return {"packed": self.packed, "codes": a.codes, "absmax": a.absmax, "offset": a.offset}

    def scales(self) -> Float[Tensor, " blocks"]:
        """The scale of each block, fp32."""
        return self.absmax if isinstance(self.absmax, Tensor) else undouble(self.absmax)

    def dequantise(self, out: Tensor) -> Tensor:
        """Write the weight into `out` `[rows, columns]`, contiguous, rounded once from fp32 to its dtype."""
        return dequantise(self, out)

    def few_rows(self, x: Tensor) -> Tensor | None:
        """No product reads the codes where they lie."""
        return None


def restored(tensors: Mapping[str, Tensor], shape: tuple[int, int], table: Table) -> FourBit:
    """What `FourBit.tensors` took apart."""
    scales: Tensor | DoubleQuantised = tensors["absmax"]
    if "offset" in tensors:
        scales = DoubleQuantised(tensors["codes"], tensors["absmax"], tensors["offset"])
    return FourBit(tensors["packed"], scales, shape, table)


def bytes_of(numbers: int, *, double: bool = False) -> int:
    """What so many numbers take in blocks of 64: codes, and scales of 4 bytes or doubly quantised ones."""
    blocks = -(-numbers // BLOCK)
    scales = blocks + 4 * -(-blocks // SCALE_BLOCK) + 4 if double else 4 * blocks
    return -(-numbers // 2) + scales


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


def _blocks(flat: Tensor, block: int, *, signed: bool = False) -> tuple[Tensor, Tensor]:
    """The scale of each block, and values / scale, clipped to [-1, 1]. The last block may be shorter."""
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scale = padded.abs().amax(dim=1)
    if signed:
        scale = padded.gather(1, padded.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    inverse = 1.0 / torch.where(scale.abs() < TINY, TINY, scale)
    scaled = (padded * inverse[:, None]).clamp_(-1, 1)
    return scale, scaled.view(-1)[: len(flat)]


@torch.no_grad()
def quantise(
    weight: Float[Tensor, "rows columns"], table: Table, *, block: int = BLOCK, double: bool = False
) -> FourBit:
    """The nearest level in each block; ties go down."""
    scales, scaled = _blocks(weight.reshape(-1).to(torch.float32), block, signed=table.signed)
    codes = table.codes[torch.bucketize(scaled, table.midpoints, out_int32=True)]
    codes = torch.nn.functional.pad(codes, (0, len(scaled) % 2))
    packed = ((codes[::2] << 4) | codes[1::2]).to(torch.uint8)
    shape = (weight.shape[0], weight.shape[1])
    return FourBit(packed, doubled(scales) if double else scales, shape, table, block)


def doubled(scales: Tensor) -> DoubleQuantised:
    """The scales of a tensor's blocks in 8 bits."""
    offset = scales.mean()
    second, scaled = _blocks(scales - offset, SCALE_BLOCK)
    code = dynamic_code()
    nearest = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2, out_int32=True)
    return DoubleQuantised(nearest.to(torch.uint8), second, offset)


def undouble(stored: DoubleQuantised) -> Tensor:
    """What `doubled` stands for, fp32 `[blocks]`."""
    values = dynamic_code()[stored.codes.int()]
    blocks = torch.arange(len(values)) // SCALE_BLOCK
    return values * stored.absmax[blocks] + stored.offset


@torch.no_grad()
def dequantise(stored: FourBit, out: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """level[code] * scale in fp32, written to `out` in its dtype."""
    flat, scales, block, table = out.view(-1), stored.scales(), stored.block, stored.table
    whole = len(flat) // block * block
    if whole == len(flat) and rows.dequantise_four_bit(stored.packed, scales, block, table.values, flat):
        return out
    step = max(CHUNK // block, 1) * block
    for start in range(0, whole, 2 * step):
        stop = min(start + 2 * step, whole)
        pairs = table.pairs.index_select(0, stored.packed[start // 2 : stop // 2].int())
        values = torch.view_as_real(pairs).view(-1, block)
        torch.mul(values, scales[start // block : stop // block, None], out=flat[start:stop].view(-1, block))
    if whole < len(flat):
        tail = torch.view_as_real(table.pairs[stored.packed[whole // 2 :].int()]).reshape(-1)
        flat[whole:] = tail[: len(flat) - whole] * scales[-1]
    return out
