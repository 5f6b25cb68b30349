"""What a user should know about the data before training: sizes, label share, repeats, and rows that are also in the eval set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from veneer.data.masking import NOTES
from veneer.data.tokens import Dataset

SHOWN = 5
BAR = 30


@dataclass(frozen=True)
class Statistics:
    """Counts of one dataset.

    labels      tokens that carry a loss; `label_share` of all tokens
    lengths     of the rows in tokens: "min", "median", "mean", "p95", "max"
    histogram   ((from, below, rows), ...) in tokens, doubling
    duplicates  groups of lines whose rows are the same, token for token
    notes       counts by name: "truncated", "dropped", "tokens_lost", and those of masking.NOTES
    ignored     keys of the file that its format has no use for
    """

    name: str
    rows: int
    tokens: int
    labels: int
    label_share: float
    lengths: Mapping[str, float]
    histogram: tuple[tuple[int, int, int], ...]
    duplicates: tuple[tuple[int, ...], ...]
    notes: Mapping[str, int]
    ignored: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON would have it."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """What deserves a look, a sentence each."""
        found = [f"{self.notes[note]} {text}" for note, text in NOTES.items() if self.notes.get(note)]
        if self.ignored:
            found.append(f"keys that the data's format has no use for: {', '.join(self.ignored)}")
        repeats = sum(len(group) - 1 for group in self.duplicates)
        if repeats:
            first = ", ".join(str(line) for line in self.duplicates[0][:SHOWN])
            found.append(f"{repeats} rows repeat an earlier one (for instance lines {first})")
        for note, what in (
            ("truncated", "rows were cut to max_length"),
            ("dropped", "rows above max_length were left out"),
        ):
            if self.notes.get(note):
                found.append(f"{self.notes[note]} {what}; {self.notes['tokens_lost']:,} tokens lost")
        if self.label_share < 0.05:
            found.append(f"only {self.label_share:.1%} of the tokens carry a loss")
        return found

    def summary(self) -> str:
        """A few lines for a terminal."""
        lengths = " ".join(f"{name} {value:,.0f}" for name, value in self.lengths.items())
        most = max((rows for _, _, rows in self.histogram), default=1)
        bars = [
            f"  {start:>7,}-{stop - 1:<7,} {rows:>7,} {'#' * max(1, round(BAR * rows / most)) if rows else ''}".rstrip()
            for start, stop, rows in self.histogram
        ]
        learned = f"{self.labels:,} of them learned ({self.label_share:.1%})"
        head = f"{self.name}: {self.rows:,} rows, {self.tokens:,} tokens, {learned}"
        return "\n".join([head, f"  tokens in a row: {lengths}", *bars, *(f"  ! {text}" for text in self.warnings())])


@dataclass(frozen=True)
class Leaks:
    """Evaluation rows that training has seen: (eval line, train line) pairs.

    rows     the whole row is the same
    prompts  the same up to the first learned token, with another answer
    """

    rows: tuple[tuple[int, int], ...]
    prompts: tuple[tuple[int, int], ...]

    def warnings(self) -> list[str]:
        """A sentence for each kind that was found."""
        found = []
        for pairs, what in (
            (self.rows, "are also in the training data"),
            (self.prompts, "share their prompt with a training row"),
        ):
            if pairs:
                first = ", ".join(f"{held} = {seen}" for held, seen in pairs[:SHOWN])
                found.append(f"{len(pairs)} evaluation rows {what} (eval line = train line: {first})")
        return found


def statistics(dataset: Dataset) -> Statistics:
    """Sizes, label share, histogram and repeats of a dataset."""
    lengths = dataset.lengths
    first = np.zeros(len(dataset.tokens), dtype=bool)
    first[dataset.offsets[:-1]] = True
    labels = int(np.count_nonzero((dataset.weights > 0) & ~first))
    quantiles = {"min": lengths.min(), "median": np.median(lengths), "mean": lengths.mean()}
    quantiles |= {"p95": np.quantile(lengths, 0.95), "max": lengths.max()}
    groups: dict[bytes, list[int]] = {}
    for row in range(len(dataset)):
        groups.setdefault(_key(dataset, row), []).append(int(dataset.lines[row]))
    return Statistics(
        name=dataset.name,
        rows=len(dataset),
        tokens=len(dataset.tokens),
        labels=labels,
        label_share=labels / len(dataset.tokens),
        lengths={name: float(value) for name, value in quantiles.items()},
        histogram=_histogram(dataset),
        duplicates=tuple(tuple(lines) for lines in groups.values() if len(lines) > 1),
        notes=dict(dataset.notes),
        ignored=dataset.ignored,
    )


def leaks(train: Dataset, held_out: Dataset) -> Leaks:
    """Rows of `held_out` that are in `train`, wholly or by their prompt. A leaked row makes an evaluation worthless."""
    whole = {_key(train, row): int(train.lines[row]) for row in reversed(range(len(train)))}
    prompts = {key: int(train.lines[row]) for row in reversed(range(len(train))) if (key := _prompt(train, row))}
    rows: list[tuple[int, int]] = []
    asked: list[tuple[int, int]] = []
    for row in range(len(held_out)):
        line, prompt = int(held_out.lines[row]), _prompt(held_out, row)
        seen = whole.get(_key(held_out, row))
        if seen is not None:
            rows.append((line, seen))
        elif prompt in prompts:
            asked.append((line, prompts[prompt]))
    return Leaks(tuple(rows), tuple(asked))


def _key(dataset: Dataset, row: int) -> bytes:
    return hashlib.sha256(dataset.row(row)[0].tobytes()).digest()


def _prompt(dataset: Dataset, row: int) -> bytes:
    """Hash of the tokens before the first learned one; empty where there are fewer than two, as in plain text."""
    tokens, weights = dataset.row(row)
    first = int(np.flatnonzero(weights)[0])
    return hashlib.sha256(tokens[:first].tobytes()).digest() if first > 1 else b""


def _histogram(dataset: Dataset) -> tuple[tuple[int, int, int], ...]:
    powers = np.floor(np.log2(dataset.lengths)).astype(int)
    return tuple(
        (2**p, 2 ** (p + 1), int(np.sum(powers == p))) for p in range(int(powers.min()), int(powers.max()) + 1)
    )
