"""A row of data as the rest of veneer knows it, whatever format it was written in.

Chat rows go through the base's template; raw rows are tokenised as they stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Chat:
    """One conversation.

    messages  as the template gets them: `role`, `content`, and whatever else the file gave (`tool_calls`, `name`, ...)
    weights   one per message; None where the file says nothing
    tools     JSON schemas that the template shows to the model, or None
    accepted  answers that an evaluation counts as right besides the last message
    """

    line: int
    messages: tuple[Mapping[str, Any], ...]
    weights: tuple[float | None, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Raw:
    """A prompt that is given and a completion that is learned. Plain text has an empty prompt."""

    line: int
    prompt: str
    completion: str


Row: TypeAlias = Chat | Raw


@dataclass(frozen=True)
class Rows:
    """All rows of one file.

    name     the file's path as it was given
    unit     what `Row.line` counts: "line", or "row" in Parquet and in lists from Python
    format   "messages", "conversations", "alpaca", "prompt/completion" or "text"
    sha256   of the file's bytes: the data hash
    ignored  keys of the file that the format has no use for
    """

    name: str
    unit: str
    format: str
    rows: tuple[Row, ...]
    sha256: str
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]
