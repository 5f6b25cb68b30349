"""The likeliest token of a few rows without reading the whole vocabulary in full; `shortlist.c` has the idea.

The surprise: nothing is approximate. The sketch of a weight only tells which of its rows can't be the likeliest; the others are
multiplied as ever, so token and score are those of `few.largest(few.scores(x, weight))` to the bit.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from veneer.ops.native.build import library
from veneer.ops.scratch import Scratch
from veneer.ops.threads import team

MOST = 24
"""Rows up to which it is the faster way: half the time for 8, four fifths for 24, where it no longer waits for memory."""

LANES = 16
"""Rows of the weight whose codes lie together."""


class _Structure(ctypes.Structure):
    """`Sketch` of shortlist.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "error")),
        ("longest", ctypes.c_float),
    ]


@dataclass(frozen=True, eq=False)
class Sketch:
    """A bf16 weight `[m, k]`, and its rows in bytes: w = (code - 128) * scale + a rest whose length is `error`.

    codes         uint8 `[m / 16, k / 4, 16, 4]`, the last block filled up
    scale, error  fp32 `[m]`, filled up
    longest       no row is longer, neither as it is nor as its bytes have it
    """

    weight: Tensor
    codes: Tensor
    scale: Tensor
    error: Tensor
    longest: float
    _scratch: Scratch = field(default_factory=Scratch)

    @property
    def nbytes(self) -> int:
        """What it takes beside the weight, with the room that was needed so far."""
        return self.codes.nbytes + self.scale.nbytes + self.error.nbytes + self._scratch.nbytes

    @cached_property
    def _structure(self) -> _Structure:
        return _Structure(self.codes.data_ptr(), self.scale.data_ptr(), self.error.data_ptr(), self.longest)

    def likeliest(self, x: Tensor) -> tuple[list[int], list[float]] | None:
        """Which row of the weight has the largest product with each row of x `[n, k]` (the first of them), and that product.

        None where it can't tell: more than `MOST` rows or another dtype, numbers that are not finite, or thousands of rows that
        come as near to the largest as the sketch is coarse.
        """
        kernels = library()
        n, (m, k) = x.shape[0], self.weight.shape
        suits = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.stride(1) == 1 and 0 < n <= MOST
        if kernels is None or not suits or x.shape[1] != k:
            return None
        threads = team()
        places, values = (ctypes.c_int64 * n)(), (ctypes.c_float * n)()
        with self._scratch.borrow((kernels.likeliest_room(n, k, threads),), torch.uint8) as room:
            found = kernels.likeliest(
                x.data_ptr(), x.stride(0), self.weight.data_ptr(), ctypes.addressof(self._structure), n, m, k,
                room.data_ptr(), places, values, threads,
            )  # fmt: skip
        return (list(places), list(values)) if found else None


def sketch(weight: Tensor) -> Sketch | None:
    """The sketch of a bf16 weight; None where the kernels do not read it or a row of it is too long for fp32."""
    plain = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
    m, k = weight.shape
    kernels = library() if plain and k % 64 == 0 and 0 < m < 2**31 else None
    if kernels is None:
        return None
    blocks = -(-m // LANES)
    codes = torch.empty(blocks, k // 4, LANES, 4, dtype=torch.uint8)
    scale, error, length = torch.empty(3, blocks * LANES).unbind()
    kernels.sketch_rows(
        weight.data_ptr(), m, k, codes.data_ptr(), scale.data_ptr(), error.data_ptr(), length.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if not math.isfinite(float(length.sum())):
        return None
    return Sketch(weight, codes, scale, error, float((length + error).max()))
