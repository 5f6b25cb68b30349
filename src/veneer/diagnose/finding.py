"""One thing that was noticed: how bad it is, where, its cause, and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """level   error: it can't work as it is. warning: it probably doesn't do what was meant. note: good to know
    where   adapter, base, or a part of one
    what    what was seen
    cause   how that comes about
    fix     what to do
    """

    level: Level
    where: str
    what: str
    cause: str
    fix: str


def worst(findings: Iterable[Finding]) -> Level | None:
    """The most serious level among findings, or None where there are none."""
    found = {f.level for f in findings}
    return next((level for level in LEVELS if level in found), None)
