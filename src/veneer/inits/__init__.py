"""How the factors of a low-rank update start: one function per scheme, `(host, rank, scale, stats, generator) -> Factors`.

An init is pure: what it needs of the data (`InitStats`) is gathered by the trainer's calibration, never here. A scheme that
shifts the base (PiSSA, OLoRA, CorDA, LoRA-GA) says so in `Factors.shifted`; it is then stored as an update of the original base.

Files in this folder are found by name: an init is one function under `@init("name")`.
"""

from __future__ import annotations

from functools import cache

from veneer.inits._abstract import GENERAL, INITS, Init, InitStats, needs, paper
from veneer.registry import discover

__all__ = ["GENERAL", "INITS", "Init", "InitStats", "load_all", "needs", "paper"]


@cache
def load_all() -> dict[str, Init]:
    """Every init by its name. The first call imports the files of this folder."""
    discover(__name__)
    return INITS
