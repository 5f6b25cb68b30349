"""NF4, with its scales in fp32 or quantised once more; arXiv 2305.14314. The arithmetic is in `ops/nf4.py`."""

from __future__ import annotations

from functools import partial

from veneer.base.formats._abstract import QUANTISATIONS, Format
from veneer.ops import four_bit, nf4

QUANTISATIONS["nf4"] = Format(
    nf4.quantise,
    partial(four_bit.restored, table=nf4.TABLE),
    lambda rows, columns: four_bit.bytes_of(rows * columns),
    "levels on the quantiles of a Gaussian, 4.5 bits a weight",
    "2305.14314",
)
QUANTISATIONS["nf4-dq"] = Format(
    partial(nf4.quantise, double=True),
    partial(four_bit.restored, table=nf4.TABLE),
    lambda rows, columns: four_bit.bytes_of(rows * columns, double=True),
    "NF4 with its scales in 8 bits, 4.127 bits a weight",
    "2305.14314",
)
