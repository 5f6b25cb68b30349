"""int8 with one scale a row; arXiv 2208.07339. The arithmetic is in `ops/int8.py`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from veneer.base.formats._abstract import QUANTISATIONS, Format
from veneer.ops import int8


def _restored(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> int8.Int8Rows:
    return int8.Int8Rows(tensors["codes"], tensors["absmax"])


QUANTISATIONS["int8"] = Format(
    int8.quantise,
    _restored,
    lambda rows, columns: rows * columns + 4 * rows,
    "one byte a weight, one scale a row, 8 + 32 / columns bits a weight",
    "2208.07339",
)
