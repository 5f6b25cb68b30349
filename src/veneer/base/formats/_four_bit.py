"""A table of 16 levels becomes two formats: with its scales in fp32, and in 8 bits."""

from __future__ import annotations

from functools import partial

from veneer.base.formats._abstract import QUANTISATIONS, Format
from veneer.ops import four_bit
from veneer.ops.four_bit import Table


def file_table(name: str, table: Table, summary: str, paper: str) -> None:
    """File `table` as the formats `name` and `name`-dq; the arithmetic is in `ops/four_bit.py`."""
    for full_name, double, text in (
        (name, False, f"{summary}, 4.5 bits a weight"),
        (f"{name}-dq", True, f"{name.upper()} with its scales in 8 bits, 4.127 bits a weight"),
    ):
        QUANTISATIONS[full_name] = Format(
            partial(four_bit.quantise, table=table, double=double),
            partial(four_bit.restored, table=table),
            partial(_bytes, double=double),
            text,
            paper,
        )


def _bytes(rows: int, columns: int, *, double: bool) -> int:
    return four_bit.bytes_of(rows * columns, double=double)
