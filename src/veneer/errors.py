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

from collections.abc import Mapping, Sequence
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


def complaint(item: Mapping[str, Any]) -> str:
    """One entry of a pydantic error's `errors()` as `path: what is wrong`.

    >>> complaint({"loc": ("stop", 3), "msg": "Value error, a stop string must not be empty"})
    'stop.3: a stop string must not be empty'
    """
    path = ".".join(str(step) for step in item["loc"])
    reason = item["msg"].removeprefix("Value error, ")
    return f"{path}: {reason}" if path else reason


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
