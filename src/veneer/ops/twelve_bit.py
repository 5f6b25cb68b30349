"""bf16 weights in twelve bits, with nothing lost: the low byte as it is, the high byte in four bits.

The high byte of a bf16 number is its sign and the upper seven bits of its exponent. The exponents of a row of trained weights
lie close together: one 2^15 times smaller than the largest of its row is rare. So a row keeps one number, and each weight its
sign and how far it lies above that: eight steps of two powers of two. The few that lie elsewhere are kept whole in a list.
Decoding is bound by reading the weights, and reads a quarter less.

A block of 64 weights is 96 bytes: 32 with the fours of two weights each, then 64 low bytes, both in the order in which a
processor puts low and high bytes together: eight weights of the first half, eight of the second, and so on. The surprise:
results are those of the bf16 weight to the bit, not nearly. To store exponents in fewer bits is DFloat11's idea (arXiv
2504.11651), which takes a Huffman code and a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import BFloat16, Float, Int64, UInt8
from torch import Tensor

from veneer.ops.native import few
from veneer.ops.recording import unrecorded

BLOCK, BYTES = 64, 96
"""Weights of a block, and its bytes."""
CHUNK = 1 << 22
"""Weights that the plain forms take at a time."""


@dataclass(frozen=True, eq=False)
class TwelveBit:
    """A weight `shape`. Rows end with a whole block.

    high    what each row counts high bytes from; with the top bit set, 0 stands for a high byte of zero
    places  of weights that lie elsewhere, in the whole weight, ascending
    values  those weights
    """

    codes: UInt8[Tensor, "rows bytes"]
    high: UInt8[Tensor, " rows"]
    places: Int64[Tensor, " others"]
    values: BFloat16[Tensor, " others"]
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps."""
        places = self.places.view(torch.uint8)
        return {"codes": self.codes, "high": self.high, "places": places, "values": self.values}

    @cached_property
    def rows(self) -> few.Rows:
        """As the kernels take it."""
        starts = torch.arange(self.shape[0] + 1) * self.shape[1]
        first = torch.searchsorted(self.places, starts)
        return few.Rows(
            few.TWELVE, self.shape, self.codes, high=self.high, first=first, places=self.places, values=self.values
        )

    def dequantise(self, out: Tensor) -> Tensor:
        """Write the weight into `out` `[rows, columns]`: exact in bf16 and fp32."""
        return dequantise(self, out)

    @unrecorded
    def few_rows(self, x: Float[Tensor, "n columns"]) -> Float[Tensor, "n rows"] | None:
        """x W^T from the bytes where they lie, for few rows in bf16."""
        return few.product_stored(x, self.rows)


def restored(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> TwelveBit:
    """What `TwelveBit.tensors` took apart."""
    places = tensors["places"].view(torch.int64)
    return TwelveBit(tensors["codes"], tensors["high"], places, tensors["values"], shape)


def bytes_of(rows: int, columns: int) -> int:
    """Without the list of weights that lie elsewhere."""
    return rows * (-(-columns // BLOCK) * BYTES + 1)


@torch.no_grad()
def quantise(weight: Float[Tensor, "rows columns"]) -> TwelveBit:
    """Exact for bf16; other floats are rounded to bf16 first."""
    rows, columns = weight.shape
    pieces = [_packed(piece) for piece in weight.split(max(CHUNK // columns, 1))]
    codes, high, others = (torch.cat(found) for found in zip(*pieces, strict=True))
    places = others.view(-1).nonzero()[:, 0]
    return TwelveBit(codes, high, places, weight.reshape(-1)[places].bfloat16(), (rows, columns))


def _packed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and `high` of some rows, and which weights lie elsewhere."""
    rows = len(weight)
    bits = weight.bfloat16().contiguous().view(torch.int16)
    sign, above, low = (bits >> 15) & 1, (bits >> 8) & 0x7F, bits & 0xFF
    least = (above.amax(1, keepdim=True) - 7).clamp(min=0)
    has_zeros = (above == 0).sum(1, keepdim=True) > (above == least).sum(1, keepdim=True)
    step = above - least
    counted = torch.where(has_zeros, (step > 0) | (above == 0), step >= 0)
    four = (sign << 3) | torch.where(counted, step.clamp(min=0), 0)
    pairs = _ordered(four).view(rows, -1, BLOCK // 2, 2)
    packed = torch.cat([pairs[..., 0] | (pairs[..., 1] << 4), _ordered(low)], dim=2).to(torch.uint8)
    return packed.view(rows, -1), (least | (has_zeros.to(torch.int16) << 7)).to(torch.uint8)[:, 0], ~counted


def _ordered(values: Tensor) -> Tensor:
    """One value a weight, up to whole blocks and in the order of their bytes `[rows, blocks, 64]`."""
    whole = torch.nn.functional.pad(values, (0, -values.shape[1] % BLOCK))
    return whole.view(len(values), -1, 2, 4, 8).transpose(2, 3).reshape(len(values), -1, BLOCK)


@torch.no_grad()
def dequantise(stored: TwelveBit, out: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Every weight as it was, written to `out` in its dtype."""
    plain = out if out.dtype == torch.bfloat16 else torch.empty(stored.shape, dtype=torch.bfloat16)
    if few.unpack_twelve(stored.rows, plain):
        return out if plain is out else out.copy_(plain)
    rows, columns = stored.shape
    step = max(CHUNK // columns, 1)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        out[piece] = _unpacked(stored.codes[piece], stored.high[piece])[:, :columns]
    out.view(-1)[stored.places] = stored.values.to(out.dtype)
    return out


def _unpacked(codes: Tensor, high: Tensor) -> Tensor:
    """The rows, bf16, up to whole blocks."""
    blocks = codes.view(len(codes), -1, BYTES).to(torch.int16)
    fours, low = blocks[:, :, : BLOCK // 2], blocks[:, :, BLOCK // 2 :]
    four = torch.stack([fours & 15, fours >> 4], dim=3).view(low.shape)
    step, least = four & 7, high.to(torch.int16)[:, None, None]
    above = torch.where((step == 0) & (least >= 0x80), 0, (least & 0x7F) + step)
    bits = ((four >> 3) << 15) | (above << 8) | low
    return bits.view(len(codes), -1, 4, 2, 8).transpose(2, 3).reshape(len(codes), -1).view(torch.bfloat16)
