"""Formats in which a base's projections are held: one file each, found by name.

`quantize: NAME` in a run file, `load_base(..., quantize=NAME)` in Python.
"""

from __future__ import annotations

from functools import cache

from veneer.base.formats._abstract import QUANTISATIONS, Format, Storage
from veneer.registry import Registry, discover

__all__ = ["QUANTISATIONS", "Format", "Storage", "load_all"]


@cache
def load_all() -> Registry[Format]:
    """Every format by its name. The first call imports the files of this folder."""
    discover(__name__)
    return QUANTISATIONS
