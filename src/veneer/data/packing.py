"""Which rows share an optimiser step, which share a forward pass, and the packed batch of one pass.

A step takes whole rows until the next would exceed `tokens_per_step`, at least one. Its rows are packed best-fit-decreasing
into passes of at most `tokens_per_pass` tokens; a longer row stands alone. There is no padding, and no leakage: every row is a
sequence of its own to the decoder.

The order is a pure function of (seed, epoch), so a resumed run computes its place and replays nothing. It is the sort order of
Philox counters, whose bits are fixed by their paper (Salmon et al. 2011) and don't change with a library's version.

The surprise: a row of n tokens fills n-1 positions. Its last token is only ever a target.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from veneer.data.tokens import Dataset
from veneer.errors import ConfigError, DataError
from veneer.types import Segment

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100

Pass: TypeAlias = list[int]
"""Row indices that share one forward pass."""

Step: TypeAlias = list[Pass]
"""Passes that share one optimiser step."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The tokens of one pass, packed. N positions.

    tokens    int64 `[N]`
    segments  one for each row, in order
    labels    int64 `[N]`: the token to predict at each position, -100 for none
    weights   float32 `[N]`: weight of that prediction
    rows      the dataset's row behind each segment
    """

    tokens: Tensor
    segments: tuple[Segment, ...]
    labels: Tensor
    weights: Tensor
    rows: tuple[int, ...]

    @property
    def labelled(self) -> Tensor:
        """Positions with a label, int64 `[n]`: the only ones whose final hidden state is needed."""
        return (self.labels != IGNORED).nonzero().squeeze(1)

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows, the last of each included."""
        return self.tokens.shape[0] + len(self.rows)

    @property
    def num_labels(self) -> int:
        """Positions that carry a loss."""
        return int((self.labels != IGNORED).sum())


def order(rows: int, seed: int, epoch: int) -> list[int]:
    """The rows of an epoch, shuffled.

    >>> order(5, seed=0, epoch=0) == order(5, seed=0, epoch=0) != order(5, seed=0, epoch=1)
    True
    """
    counter = np.random.Philox(key=seed % 2**64, counter=[0, epoch, 0, 0])
    return [int(row) for row in np.argsort(counter.random_raw(rows), kind="stable")]


def plan_epoch(dataset: Dataset, seed: int, epoch: int, tokens_per_step: int, tokens_per_pass: int) -> list[Step]:
    """Every row of the dataset once: steps of passes of rows."""
    if tokens_per_step < 1 or tokens_per_pass < 1:
        raise ConfigError(f"tokens_per_step {tokens_per_step} and tokens_per_pass {tokens_per_pass} must be at least 1")
    lengths = dataset.lengths
    steps: list[list[int]] = []
    room = 0
    for row in order(len(dataset), seed, epoch):
        length = int(lengths[row])
        if not steps or length > room:
            steps.append([])
            room = tokens_per_step
        steps[-1].append(row)
        room -= length
    return [pack(dataset, rows, tokens_per_pass) for rows in steps]


def plan_rows(dataset: Dataset, tokens_per_pass: int) -> list[Pass]:
    """Every row once, without shuffling, packed by length: for evaluation."""
    return pack(dataset, range(len(dataset)), tokens_per_pass)


def pack(dataset: Dataset, rows: Sequence[int], tokens_per_pass: int) -> list[Pass]:
    """Rows into passes by best fit decreasing: the longest row first, each into the fullest pass that still has room.

    At most 11/9 of the fewest possible passes, plus one (Johnson 1973). Passes keep the order in which they were opened.
    """
    lengths = dataset.lengths
    passes: list[Pass] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, pass), ascending
    for row in sorted(rows, key=lambda row: (-int(lengths[row]), row)):
        length = int(lengths[row])
        at = bisect_left(rooms, (length, -1))
        if at < len(rooms):
            room, number = rooms.pop(at)
        else:
            room, number = tokens_per_pass, len(passes)
            passes.append([])
        passes[number].append(row)
        insort(rooms, (room - length, number))
    return passes


def batch(dataset: Dataset, row_ids: Sequence[int], adapter: int | Sequence[int] = 0) -> Batch:
    """Rows packed for one forward pass. `adapter` is their index in the bank, or one index for each row (-1: bare base)."""
    import torch

    if not row_ids:
        raise DataError("a batch needs at least one row")
    adapters = [adapter] * len(row_ids) if isinstance(adapter, int) else list(adapter)
    parts = [dataset.row(row) for row in row_ids]
    targets = np.concatenate([tokens[1:] for tokens, _ in parts]).astype(np.int64)
    weights = np.concatenate([weights[1:] for _, weights in parts]).astype(np.float32)
    segments = tuple(
        Segment(length=len(tokens) - 1, sequence=i, adapter=index)
        for i, ((tokens, _), index) in enumerate(zip(parts, adapters, strict=True))
    )
    return Batch(
        tokens=torch.from_numpy(np.concatenate([tokens[:-1] for tokens, _ in parts]).astype(np.int64)),
        segments=segments,
        labels=torch.from_numpy(np.where(weights > 0, targets, IGNORED)),
        weights=torch.from_numpy(weights),
        rows=tuple(int(row) for row in row_ids),
    )
