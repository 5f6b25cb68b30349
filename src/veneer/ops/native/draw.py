"""Tokens drawn from scores, all rows of a step in one call; `draw.c` has the way. None where the plain form has to do it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from veneer.ops.native.build import library
from veneer.ops.scratch import Scratch
from veneer.ops.threads import team

_scratch = Scratch()


@dataclass(frozen=True)
class Draw:
    """What to draw by. Weights are exp(score / temperature) within the `top_k` largest (0: all), of those within the largest that
    together reach `top_p` of the sum, of those the ones at least `min_p` times the largest. `draw` in [0, 1) says which.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    draw: float


class _Structure(ctypes.Structure):
    """`Draw` of draw.c."""

    _fields_ = [
        ("scores", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p", "draw")),
        ("top_k", ctypes.c_int64),
    ]


def draw(rows: Sequence[npt.NDArray[np.float32]], draws: Sequence[Draw]) -> list[int] | None:
    """The place in each row of scores that its draw falls on. Rows are of one length, without NaN, with a finite number each."""
    alike = all(r.flags.c_contiguous and r.dtype == np.float32 and len(r) == len(rows[0]) for r in rows)
    kernels = library() if rows and alike else None
    if kernels is None:
        return None
    n, m, threads = len(rows), len(rows[0]), team()
    places = (ctypes.c_int64 * n)()
    asked = (_Structure * n)()
    for place, row, how in zip(asked, rows, draws, strict=True):
        place.scores, place.top_k = row.ctypes.data, how.top_k
        place.temperature, place.top_p, place.min_p, place.draw = how.temperature, how.top_p, how.min_p, how.draw
    with _scratch.borrow((kernels.draw_room(m, threads),), torch.uint8) as room:
        kernels.draw_rows(ctypes.addressof(asked), n, m, room.data_ptr(), places, threads)
    return list(places)
