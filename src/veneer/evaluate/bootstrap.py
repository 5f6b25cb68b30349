"""Intervals: how far a figure would move with other rows of the same kind.

The bootstrap (Efron 1979): draw as many rows as there are, with replacement, many times; the middle 95 % of the figures is the
interval. Every model is scored on the same draws, so the interval of a *difference* is paired: hard rows are hard for both
sides and cancel.

A measure keeps sums per row and computes its figure from their total, so a ratio of sums (loss per token, chrF over a corpus) is
resampled as what it is, and not as a mean of means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CHUNK = 1 << 22
"""Numbers held at once while drawing."""


@dataclass(frozen=True)
class Interval:
    """A figure, and the middle 95 % of it over resampled rows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Measure:
    """One figure of one model over rows.

    sums   fp64 `[rows, k]`: what each row contributes
    score  totals `[..., k]` -> figure `[...]`
    """

    sums: Floats
    score: Callable[[Floats], Floats]

    @property
    def value(self) -> float:
        """The figure over all rows."""
        return float(self.score(self.sums.sum(axis=0)))


def ratio(numerator: Floats, denominator: Floats | None = None) -> Measure:
    """sum(numerator) / sum(denominator); a plain mean without the second."""
    below = np.ones_like(numerator) if denominator is None else denominator
    return Measure(np.stack([numerator, below], axis=1).astype(np.float64), quotient)


def quotient(totals: Floats) -> Floats:
    """First total over second."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = totals[..., 0] / totals[..., 1]
    return found


def interval(measure: Measure, seed: int, resamples: int) -> Interval:
    """The figure with its 95 % interval."""
    return _interval(measure.value, _resampled(measure, seed, resamples))


def change(measure: Measure, reference: Measure, seed: int, resamples: int) -> Interval:
    """`measure` minus `reference`, on the same draws of the same rows."""
    drawn = _resampled(measure, seed, resamples) - _resampled(reference, seed, resamples)
    return _interval(measure.value - reference.value, drawn)


def _interval(value: float, drawn: Floats) -> Interval:
    """Draws without a figure, as a ratio has none where every row drawn adds 0 below, are left out."""
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (value, value)
    return Interval(value, float(low), float(high))


def _resampled(measure: Measure, seed: int, resamples: int) -> Floats:
    rows = len(measure.sums)
    figures = [measure.score(counts @ measure.sums) for counts in _draws(rows, seed, resamples)]
    return np.concatenate(figures)


def _draws(rows: int, seed: int, resamples: int) -> Iterator[Floats]:
    """How often each row was drawn, `[some, rows]` at a time: the same for every measure with this many rows."""
    bits = np.random.Philox(key=seed % 2**64)
    at_once = max(1, CHUNK // rows)
    for start in range(0, resamples, at_once):
        many = min(at_once, resamples - start)
        picks = (bits.random_raw(many * rows) % np.uint64(rows)).astype(np.int64).reshape(many, rows)
        shifted = picks + np.arange(many)[:, None] * rows
        yield np.bincount(shifted.ravel(), minlength=many * rows).reshape(many, rows).astype(np.float64)
