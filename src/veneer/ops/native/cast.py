"""The matrices of a file laid out anew: in C, or by torch where there is no kernel for their types. The bits are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer.ops.native.build import library

_KINDS = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}


@dataclass(frozen=True)
class Cast:
    """A matrix `[rows, columns]` of `dtype` on its way to element `place` of a buffer: times `factor`, transposed if `turned`."""

    rows: int
    columns: int
    dtype: torch.dtype
    place: int
    factor: float = 1.0
    turned: bool = False


class Casts:
    """Many of them, made ready once and used for many files."""

    def __init__(self, casts: Sequence[Cast]) -> None:
        self.casts = tuple(casts)
        self._records: NDArray[np.int64] | None = None
        if all(cast.dtype in _KINDS for cast in casts) and library() is not None:
            records = [[0, 2 * c.place, c.rows, c.columns, _KINDS[c.dtype], c.turned, 0] for c in casts]
            self._records = np.array(records, np.int64).reshape(-1, 7)
            self._records[:, 6] = np.array([c.factor for c in casts], np.float64).view(np.int64)

    def into(self, room: Tensor, sources: Sequence[Tensor]) -> bool:
        """Write the matrices into the flat `room`; whether every number of them is finite.

        sources  on the CPU and contiguous, one for each cast, of its dtype and size
        """
        kernels = library()
        if self._records is None or kernels is None or room.dtype != torch.bfloat16 or room.device.type != "cpu":
            return self._plain(room, sources)
        records = self._records.copy()
        records[:, 0] = [source.data_ptr() for source in sources]
        records[:, 1] += room.data_ptr()
        return bool(kernels.cast_all(records.__array_interface__["data"][0], len(records)))

    def _plain(self, room: Tensor, sources: Sequence[Tensor]) -> bool:
        finite = True
        for cast, source in zip(self.casts, sources, strict=True):
            matrix = source.detach().reshape(cast.rows, cast.columns)
            matrix = matrix * cast.factor if cast.factor != 1.0 else matrix
            shape = (cast.columns, cast.rows) if cast.turned else (cast.rows, cast.columns)
            to = room[cast.place : cast.place + matrix.numel()].view(shape)
            to.copy_(matrix.t() if cast.turned else matrix)
            finite = finite and bool(to.isfinite().all())
        return finite
