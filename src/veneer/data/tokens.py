"""Rows as flat arrays: all tokens in one, where each row starts in another.

A flat array maps from disk, costs nothing per row, and gives a batch by slicing. Encoding is strict: rows that are too long,
that the template refuses, or in which nothing is learned, are all collected and named with their lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from veneer.data.masking import TRAIN_ON, Encoded, TextTokenizer, TrainOn, encode_row
from veneer.data.records import Problems
from veneer.data.rows import Rows
from veneer.errors import ConfigError, DataError, VeneerError
from veneer.registry import did_you_mean

OnTooLong: TypeAlias = Literal["error", "truncate", "drop"]
"""What happens to a row above max_length: refuse the data, cut its end off, or leave it out."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Encoded rows.

    name     the file they came from
    tokens   int32 `[T]`
    weights  float32 `[T]`: weight of predicting each token from those before it in its row; 0 is masked
    offsets  int64 `[rows + 1]`: row i is tokens[offsets[i]:offsets[i+1]]
    lines    int64 `[rows]`: where each row stands in the file
    bytes    float64 `[rows]`: UTF-8 bytes of the learned text, each with its token's weight
    sha256   of the file
    notes    counts by name: "truncated", "dropped", "tokens_lost", and those of masking.NOTES
    ignored  keys of the file that its format has no use for
    """

    name: str
    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    offsets: NDArray[np.int64]
    lines: NDArray[np.int64]
    bytes: NDArray[np.float64]
    sha256: str
    notes: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each row `[rows]`."""
        return np.diff(self.offsets)

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """(tokens, weights) of one row."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[part], self.weights[part]

    def take(self, rows: Sequence[int]) -> Dataset:
        """Only these rows, in this order."""
        parts = [self.row(row) for row in rows]
        index = np.asarray(rows, dtype=np.int64)
        return _pack(
            self.name,
            [p[0] for p in parts],
            [p[1] for p in parts],
            self.lines[index],
            self.bytes[index],
            self.sha256,
            {},
            self.ignored,
        )


def encode(
    rows: Rows,
    tokenizer: TextTokenizer,
    *,
    max_length: int,
    on_too_long: OnTooLong = "error",
    train_on: TrainOn = "assistant",
) -> Dataset:
    """Rows as tokens and weights. Raises one DataError that names every row that can't be learned from."""
    check_choices(max_length, on_too_long, train_on)
    fitting = _Fitting(max_length, on_too_long, Problems(rows.name, rows.unit))
    kept: list[tuple[int, Encoded]] = []
    for row in rows:
        try:
            encoded = fitting.fit(encode_row(row, tokenizer, train_on), row.line)
        except VeneerError as error:
            fitting.problems.add(row.line, error.message, help=error.help)
            continue
        if encoded is not None:
            kept.append((row.line, encoded))
    fitting.problems.raise_any()
    if not kept:
        raise DataError(
            f"{rows.name}: every row is longer than max_length {max_length} and was dropped",
            help="raise max_length, or set on_too_long: truncate",
        )
    return _pack(
        rows.name,
        [encoded.ids for _, encoded in kept],
        [encoded.weights for _, encoded in kept],
        np.asarray([line for line, _ in kept], dtype=np.int64),
        np.asarray([encoded.bytes for _, encoded in kept], dtype=np.float64),
        rows.sha256,
        dict(fitting.counts),
        rows.ignored,
    )


def check_choices(max_length: int, on_too_long: str, train_on: str) -> None:
    """Raise ConfigError for a value that encoding does not know."""
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}, expected at least 2: one token to see and one to predict")
    for key, value, known in (("on_too_long", on_too_long, get_args(OnTooLong)), ("train_on", train_on, TRAIN_ON)):
        if value not in known:
            raise ConfigError(f"{key} is '{value}'", help=did_you_mean(value, list(known)))


@dataclass
class _Fitting:
    """Rows brought within max_length, with a count of what it cost."""

    max_length: int
    on_too_long: OnTooLong
    problems: Problems
    counts: Counter[str] = field(default_factory=Counter)

    def fit(self, encoded: Encoded, line: int) -> Encoded | None:
        """The row, perhaps cut; None where it is left out or a problem."""
        length = len(encoded.ids)
        if not np.any(encoded.weights[1:] > 0):
            what = "nothing in this row is learned (no answer, or every weight is 0)"
            self.problems.add(line, what, help="remove the row, or give it an answer of weight above 0")
            return None
        if length > self.max_length:
            fitted = self._shorten(encoded, line)
            if fitted is None:
                return None
            encoded = fitted
        self.counts.update(encoded.notes)
        return encoded

    def _shorten(self, encoded: Encoded, line: int) -> Encoded | None:
        length, most = len(encoded.ids), self.max_length
        if self.on_too_long == "error":
            fix = "raise max_length, or choose on_too_long: truncate (cut the end off) or drop (leave the row out)"
            self.problems.add(line, f"{length} tokens, but max_length is {most}", help=fix)
            return None
        if self.on_too_long == "drop":
            self.counts.update(dropped=1, tokens_lost=length)
            return None
        cut = encoded.cut(most)
        if not np.any(cut.weights[1:] > 0):
            what = f"{length} tokens, and cutting to max_length {most} leaves nothing to learn"
            self.problems.add(
                line, what, help="raise max_length, or leave the row out (training does so with on_too_long: drop)"
            )
            return None
        self.counts.update(truncated=1, tokens_lost=length - most)
        return cut


def _pack(
    name: str,
    tokens: Sequence[NDArray[np.int32]],
    weights: Sequence[NDArray[np.float32]],
    lines: NDArray[np.int64],
    sizes: NDArray[np.float64],
    sha256: str,
    notes: Mapping[str, int],
    ignored: tuple[str, ...],
) -> Dataset:
    offsets = np.zeros(len(tokens) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in tokens], out=offsets[1:])
    return Dataset(name, np.concatenate(tokens), np.concatenate(weights), offsets, lines, sizes, sha256, notes, ignored)
