"""Every error veneer raises on purpose, in one tree.

VeneerError                     what was given, what was expected, where; `help` is the next step
├── ConfigError (ValueError)    a run file, a recipe, a method field
├── DataError (ValueError)      training or evaluation rows; collects every problem with file and line
├── TargetError (ValueError)    a selector that matches nothing, a layer that can't take what was asked
├── FormatError (ValueError)    a file that is damaged, hostile, or not what its name says
├── BaseMismatch (ValueError)   an adapter and a base that don't belong together
├── NotFound (LookupError)      a base, adapter, version, alias or file that isn't there
├── NeedsBase (ValueError)      an update that depends on the frozen weight was asked for without it
├── Unsupported (ValueError)    mathematically or technically impossible here; `help` names the way out
├── Conflict (RuntimeError)     something else holds or already is what was asked for
├── Denied (PermissionError)    a key that is missing, unknown, or not allowed to do this
├── ResourceError (RuntimeError) not enough memory, disk, budget or time
│   └── Busy                    too much at once; the same thing can work later
│       └── Stopping            whoever was asked is shutting down; another one can do it
└── TrainingError (RuntimeError) a run that cannot go on: a non-finite loss, a dead adapter
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any


class VeneerError(Exception):
    """A refusal with a reason and a way out.

    `message` says what was given, what was expected and where. `help` is the next step, shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, help: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.help = help

    def __str__(self) -> str:
        return self.message if self.help is None else f"{self.message}\nhelp: {self.help}"


class ConfigError(VeneerError, ValueError):
    """A run file, a recipe or a method field is wrong."""

    exit_code = 2


class DataError(VeneerError, ValueError):
    """Rows that cannot be trained or evaluated on."""


class TargetError(VeneerError, ValueError):
    """A selector that matches nothing, or a layer that cannot take what was asked."""


class FormatError(VeneerError, ValueError):
    """A file that is damaged, hostile, or not what its name says."""


class BaseMismatch(VeneerError, ValueError):
    """An adapter was made for another base."""


class NotFound(VeneerError, LookupError):
    """A base, adapter, version, alias or file that is not there."""


class NeedsBase(VeneerError, ValueError):
    """The update depends on the frozen weight, which was not given."""


class Unsupported(VeneerError, ValueError):
    """Impossible here, for a reason that is named."""


class Conflict(VeneerError, RuntimeError):
    """Something else holds, or already is, what was asked for."""


class ResourceError(VeneerError, RuntimeError):
    """Not enough memory, disk, budget or time."""


class Busy(ResourceError):
    """Too much at once: the same thing can work after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0, help: str | None = "try again later") -> None:
        super().__init__(message, help=help)
        self.retry_after = retry_after


class Stopping(Busy):
    """Whoever was asked is shutting down: ask another one, or this one after its restart."""


class Denied(VeneerError, PermissionError):
    """A key that is missing, unknown, or not allowed to do this. `known` tells the last from the others."""

    def __init__(self, message: str, *, known: bool, help: str | None = None) -> None:
        super().__init__(message, help=help)
        self.known = known


class TrainingError(VeneerError, RuntimeError):
    """A run that cannot go on."""


_EXPECTED = {
    "string_type": "text",
    "path_type": "a path",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "literal_error": "{expected}",
}
"""What a value should have been, by pydantic's name of the error, filled in from its context."""
_UNION = re.compile(r"(int|float|str|bool|none|nullable|(literal|list|tuple|dict|constrained|function)\b.*)")
"""The steps of a path by which pydantic tells the members of a union apart. They are no keys."""


def complaints(items: Sequence[Any], near: Callable[[str, Sequence[Any]], str] | None = None) -> list[str]:
    """The entries of a pydantic error's `errors()`, each as `path: what is wrong`.

    What the members of a union say of one value is one entry; where a member looked inside the value, only what it found.

    near  (unknown key, path of what it stands in) -> a hint that is put behind it

    >>> complaints([{"type": "greater_than", "loc": ("train", "lr"), "input": -1, "ctx": {"gt": 0.0}, "msg": ""}])
    ['train.lr: expected a number above 0, got -1']
    """
    wrong: dict[tuple[Any, ...], list[Any]] = {}
    for item in items:
        loc = tuple(step for i, step in enumerate(item["loc"]) if not i or not _UNION.fullmatch(str(step)))
        wrong.setdefault(loc, []).append(item)
    found = []
    for loc, same in wrong.items():
        if len(same[0]["loc"]) > len(loc) and any(loc == deeper[: len(loc)] != deeper for deeper in wrong):
            continue
        what = _what(same)
        if near is not None and same[0]["type"] == "extra_forbidden":
            what += f"; {near(str(loc[-1]), loc[:-1])}"
        path = ".".join(map(str, loc))
        found.append(f"{path}: {what}" if path else what)
    return found


def _what(same: Sequence[Any]) -> str:
    first = same[0]
    if first["type"] == "missing":
        return "missing"
    if first["type"] == "extra_forbidden":
        return "unknown key"
    expected = [_EXPECTED.get(item["type"], "").format(**item.get("ctx", {})) for item in same]
    if all(expected):
        got = repr(first["input"])
        return f"expected {_either(list(dict.fromkeys(expected)))}, got {got if len(got) <= 80 else got[:77] + '...'}"
    other = same[expected.index("")]["msg"]
    return str(other).removeprefix("Value error, ")


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def listed(problems: Sequence[str], *, limit: int = 20) -> str:
    """Problems as an indented list, one a line, at most `limit` of them and then a count.

    >>> print(listed(["a is missing", "b has shape [2]"]))
      - a is missing
      - b has shape [2]
    """
    lines = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  - and {len(problems) - limit} more")
    return "\n".join(lines)
