"""The C form of low-rank updates of short runs of rows of many adapters. None where the plain form has to do it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import POINTER, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from veneer.ops.native.build import library

RUN = 64
"""Rows of one adapter that one job takes; a longer run is better off with ordinary products."""
BLOCK = 256
UNIT = 4


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("a", "bt")),
        *((name, c_int64) for name in ("row", "rows", "rank", "column", "out", "first_unit", "first_block", "line")),
    ]


class Updates(ctypes.Structure):
    """All jobs of one projection, as the kernels read them."""

    _fields_ = [
        ("jobs", POINTER(_Job)),
        *((name, POINTER(c_int32)) for name in ("owner", "block")),
        *((name, c_int64) for name in ("units", "blocks", "scratch")),
    ]


@dataclass(frozen=True)
class Piece:
    """Rows `[row, row + rows)` and what they get on columns from `column` on: A `[rank, k]`, B `[out, rank]`."""

    row: int
    rows: int
    A: Tensor
    B: Tensor
    column: int


@dataclass(frozen=True, eq=False)
class Jobs:
    """Pieces as the kernel reads them. Keeps the tensors alive that it points to."""

    updates: Updates
    width: int
    pieces: tuple[Piece, ...]

    @cached_property
    def address(self) -> int:
        return ctypes.addressof(self.updates)

    def add(self, y: Tensor, x: Tensor) -> bool:
        """y[rows, columns] += B (A x[rows]) for every piece. False: nothing was done."""
        kernels = library()
        if kernels is None or x.shape[1] != self.width or x.stride(1) != 1 or y.stride(1) != 1:
            return False
        if not x.dtype == y.dtype == torch.bfloat16:
            return False
        done = kernels.low_rank_rows(
            self.address, x.data_ptr(), x.stride(0), self.width, y.data_ptr(), y.stride(0), torch.get_num_threads()
        )  # fmt: skip
        return bool(done)


def columns_together(B: Tensor) -> Tensor:
    """B `[out, rank]` with the same values, stored rank by rank, as the kernel reads it. A view where it is so already."""
    return B.t().contiguous().t()


def jobs(pieces: Iterable[Piece]) -> Jobs | None:
    """Pieces made ready for the kernel, or None where it can't take them: other dtypes, layouts, long runs, no kernel."""
    found = tuple(pieces)
    if not found or library() is None or not all(_fits(piece, found[0].A.shape[1]) for piece in found):
        return None
    made, units, blocks, line = [], 0, 0, 0
    owner: list[int] = []
    block: list[int] = []
    for number, piece in enumerate(found):
        (rank, _), out = piece.A.shape, piece.B.shape[0]
        pointers = piece.A.data_ptr(), piece.B.data_ptr()
        made.append(_Job(*pointers, piece.row, piece.rows, rank, piece.column, out, units, blocks, line))
        owner += [number] * -(-rank // UNIT)
        block += [number] * -(-out // BLOCK)
        units, blocks, line = len(owner), len(block), line + piece.rows * (rank + rank % 2)
    # A structure keeps alive the arrays that are assigned to its pointers.
    updates = Updates((_Job * len(made))(*made), _ints(owner), _ints(block), units, blocks, line)
    return Jobs(updates, found[0].A.shape[1], found)


def _fits(piece: Piece, width: int) -> bool:
    a, b = piece.A, piece.B
    kind = a.dtype == b.dtype == torch.bfloat16 and a.device.type == "cpu" and not (a.requires_grad or b.requires_grad)
    laid = a.is_contiguous() and 1 in (b.shape[0], b.stride(0)) and (b.shape[1] == 1 or b.stride(1) == b.shape[0])
    return kind and laid and a.shape[1] == width and width % 32 == 0 and 1 <= piece.rows <= RUN


def _ints(values: Sequence[int]) -> ctypes.Array[c_int32]:
    return (c_int32 * len(values))(*values)
