"""One record of a data file, the JSON it is read from, and what is wrong with the file.

The surprise: Python's json accepts what other readers refuse or read differently. Repeated keys and `NaN` are refused here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any, NoReturn

from veneer.errors import DataError, listed

MAX_ROW_BYTES = 4 * 1024 * 1024
"""A row above this is refused before it is parsed: it is a million tokens, and usually a whole file without line breaks."""

KEPT_PROBLEMS = 1000
FEW, NAMED_LINES = 3, 11
UTF8_HELP = "save the file as UTF-8 (iconv -f latin1 -t UTF-8, if it is Latin-1)"
HALF_WRITTEN = "it looks half-written: copy or make the file again"
REPAIR_HELP = "repair these rows or take them out, then run the same command again"
SPLIT_HELP = "split long documents into rows that fit max_length, one JSON object a line"
JSON_COLUMNS = frozenset({"messages", "conversations", "tools", "history", "accepted"})


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stood in the file. `line` counts from 1; in Parquet it is the row."""

    line: int
    value: dict[str, Any]


@dataclass
class Problems:
    """What is wrong with one file, told in the order of its lines; what is the same in many is told once.

    Keeps the first thousand and counts the rest.
    """

    name: str
    unit: str = "line"
    found: list[tuple[int, str]] = field(default_factory=list)
    count: int = 0
    help: str | None = None

    def add(self, line: int, what: str, *, help: str | None = None) -> None:
        """One problem at a line. The first `help` given is the one that is shown."""
        self.count += 1
        self.help = self.help or help
        if self.count <= KEPT_PROBLEMS:
            self.found.append((line, what))

    def raise_any(self) -> None:
        """Raise one DataError with all of them, or return."""
        if not self.count:
            return
        plural = "problem" if self.count == 1 else "problems"
        lines: dict[str, list[int]] = {}
        for line, what in sorted(self.found, key=lambda problem: problem[0]):
            lines.setdefault(what, []).append(line)
        told = [entry for what, where in lines.items() for entry in self._told(what, where)]
        shown = [text for _, text in sorted(told, key=lambda entry: entry[0])]
        uncounted = self.count - len(self.found)
        more = f"\n  - and {uncounted} more, which were not kept" if uncounted else ""
        raise DataError(f"{self.name} has {self.count} {plural}:\n{listed(shown)}{more}", help=self.help or REPAIR_HELP)

    def _told(self, what: str, lines: list[int]) -> list[tuple[int, str]]:
        """A few lines each for itself, many in one with the first of them named."""
        place = f"{self.name}:" if self.unit == "line" else f"{self.name}, {self.unit} "
        if len(lines) <= FEW:
            return [(line, f"{place}{line}: {what}") for line in lines]
        others = ", ".join(map(str, lines[1:NAMED_LINES])) + (", ..." if len(lines) > NAMED_LINES else "")
        return [(lines[0], f"{place}{lines[0]}: {what} (and at {len(lines) - 1} more: {others})")]


class RefusedJson(ValueError):
    """JSON that Python would accept and we don't."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RefusedJson(f"the key '{repeated}' stands twice in one object")
    return value


def _constant(name: str) -> NoReturn:
    raise RefusedJson(f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


def json_type(value: Any) -> str:
    """The name a JSON user knows for a value's type."""
    if isinstance(value, bool):
        return "boolean"
    names = {type(None): "null", str: "text", int: "number", float: "number", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def syntax(error: json.JSONDecodeError) -> str:
    """What is wrong with the syntax, and in which column."""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def reason(error: ValueError | RecursionError) -> str:
    """Why JSON was refused, where it was not its syntax."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def whole_text(file: BufferedReader, problems: Problems) -> str:
    """The whole file as text, or one problem and nothing."""
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        column = error.start - before.rfind(b"\n")
        problems.add(before.count(b"\n") + 1, not_utf8(error.object[error.start], column), help=UTF8_HELP)
        return ""


def too_long(size: int) -> str:
    """What is wrong with a row of `size` bytes."""
    return f"{size / 1e6:.1f} MB in one row; a row may have {MAX_ROW_BYTES / 1e6:.1f} MB"


def not_utf8(byte: int, column: int) -> str:
    """What is wrong with a byte."""
    return f"byte {byte:#04x} at column {column} is not UTF-8"
