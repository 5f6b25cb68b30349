"""The C form of low-rank updates of short runs of rows of many adapters. None where the plain form has to do it.

The mix of rows changes whenever an answer begins or ends: what depends on it is made by a few array operations from the rest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer.ops.native.build import library
from veneer.ops.threads import team

RUN = 64
"""Rows of one adapter that one job takes; a longer run is better off with ordinary products."""
BLOCK = 256
UNIT = 4

_A, _BT, _ROW, _ROWS, _RANK, _COLUMN, _OUT, _FIRST_UNIT, _FIRST_BLOCK, _LINE = range(10)
"""The fields of a job in mixed.h, eight bytes each: a row of a plain array, as arrays of records are slow to handle."""


class _Updates(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("jobs", "owner", "block")),
        *((name, c_int64) for name in ("units", "blocks", "scratch")),
    ]


@dataclass(frozen=True, eq=False)
class Factors:
    """One adapter's pairs A `[rank, k]` and B `[out, rank]` on one projection, as the kernel reads them.

    pointers  `[pairs, 2]`, to A and B
    shape     of each pair its rank, the first column of its output, and the columns
    """

    pointers: NDArray[np.int64]
    shape: tuple[tuple[int, int, int], ...]
    width: int
    tensors: tuple[Tensor, ...]

    def moved(self, distance: int, tensors: tuple[Tensor, ...]) -> Factors:
        """Those of another adapter of the same form, whose numbers `tensors` hold `distance` bytes further on."""
        return Factors(self.pointers + distance, self.shape, self.width, tensors)


@dataclass(frozen=True, eq=False)
class _Layout:
    """The jobs of a mix of rows but for their pointers: the same in every block of a model.

    owner, block  the job that each unit of ranks and each block of columns belongs to
    rest          where those two lie, then units, blocks, and elements of scratch
    """

    records: NDArray[np.int64]
    owner: NDArray[np.int32]
    block: NDArray[np.int32]
    rest: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Jobs:
    """Runs of rows and what they get, as the kernel reads them. Keeps alive what it points to."""

    updates: _Updates
    width: int
    kept: tuple[object, ...]

    @cached_property
    def address(self) -> int:
        return ctypes.addressof(self.updates)

    def add(self, y: Tensor, x: Tensor) -> bool:
        """y[rows, columns] += B (A x[rows]) for every run. False: nothing was done."""
        kernels = library()
        if kernels is None or x.shape[1] != self.width or x.stride(1) != 1 or y.stride(1) != 1:
            return False
        if not x.dtype == y.dtype == torch.bfloat16:
            return False
        done = kernels.low_rank_rows(
            self.address, x.data_ptr(), x.stride(0), self.width, y.data_ptr(), y.stride(0), team()
        )
        return bool(done)


def factors(pairs: Iterable[tuple[Tensor, Tensor, int]]) -> Factors | None:
    """A, B and the first column of the output of each pair, or None where the kernel can't take them."""
    found = tuple(pairs)
    if not found or library() is None or not all(_fits(a, b, found[0][0].shape[1]) for a, b, _ in found):
        return None
    pointers = np.array([(a.data_ptr(), b.data_ptr()) for a, b, _ in found], np.int64)
    shape = tuple((b.shape[1], column, b.shape[0]) for _, b, column in found)
    return Factors(pointers, shape, found[0][0].shape[1], tuple(t for a, b, _ in found for t in (a, b)))


def jobs(runs: Sequence[tuple[int, int, Factors]]) -> Jobs | None:
    """First row, rows and factors of each run made ready for the kernel; None without any, or where a run is too long."""
    if not runs:
        return None
    width = runs[0][2].width
    for _, rows, factors in runs:
        if not 1 <= rows <= RUN or factors.width != width:
            return None
    layout = _layout(tuple([(row, rows, factors.shape) for row, rows, factors in runs]))
    records = layout.records.copy()
    np.concatenate([factors.pointers for _, _, factors in runs], out=records[:, : _BT + 1])
    return Jobs(_Updates(_address(records), *layout.rest), width, (records, layout, *runs))


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


@lru_cache(maxsize=64)
def _layout(runs: tuple[tuple[int, int, tuple[tuple[int, int, int], ...]], ...]) -> _Layout:
    made = np.array(
        [(0, 0, row, rows, rank, column, out, 0, 0, 0) for row, rows, pairs in runs for rank, column, out in pairs],
        np.int64,
    )
    units, blocks = -(-made[:, _RANK] // UNIT), -(-made[:, _OUT] // BLOCK)
    lines = made[:, _ROWS] * (made[:, _RANK] + made[:, _RANK] % 2)
    totals = []
    for field, sizes in ((_FIRST_UNIT, units), (_FIRST_BLOCK, blocks), (_LINE, lines)):
        stops = sizes.cumsum()
        made[:, field] = stops - sizes
        totals.append(int(stops[-1]))
    numbers = np.arange(len(made), dtype=np.int32)
    owner, block = numbers.repeat(units), numbers.repeat(blocks)
    return _Layout(made, owner, block, (_address(owner), _address(block), *totals))


def _fits(a: Tensor, b: Tensor, width: int) -> bool:
    kind = a.dtype == b.dtype == torch.bfloat16 and a.device.type == "cpu" and not (a.requires_grad or b.requires_grad)
    laid = a.is_contiguous() and 1 in (b.shape[0], b.stride(0)) and (b.shape[1] == 1 or b.stride(1) == b.shape[0])
    return kind and laid and a.shape == (b.shape[1], width) and width % 32 == 0
