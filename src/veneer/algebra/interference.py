"""What adapters would do to each other, before they are combined. Nothing here depends on how an update is factored.

    cosine          <d1, d2> / (|d1| |d2|), by tr((B1^T B2)(A2 A1^T))
    sign conflict   share of entries whose signs differ (two unrelated updates: one half), counted on evenly spaced rows
    input overlap   |V1^T V2|_F^2 / min(r1, r2), V right singular vectors; 1 nested, 0 orthogonal, max(r1, r2)/in by chance
    output overlap  the same for the left singular vectors
    norm ratio      the larger |delta| over the smaller

The surprise: a cosine near 0 with an overlap near 1 is the bad case. The updates use the same few directions for different
things, and a sum spoils both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapter import Adapter, HostSource
from veneer.algebra._sources import Source, is_update, source
from veneer.algebra._spaces import numerical_rank
from veneer.errors import ConfigError
from veneer.ops.spectra import low_rank_inner, low_rank_svd

ROWS = 64
"""Rows of the update that the sign count looks at."""


@dataclass(frozen=True)
class Pair:
    """Two adapters at one target; with target None over all their common targets (norm-weighted cosine, means of the rest)."""

    first: str
    second: str
    target: str | None
    cosine: float
    sign_conflict: float
    input_overlap: float
    output_overlap: float
    chance_overlap: float
    norm_ratio: float


@dataclass(frozen=True)
class Interference:
    """Norms per adapter over its weight updates, and every pair: overall first, then each common target."""

    norms: Mapping[str, float]
    overall: tuple[Pair, ...]
    pairs: tuple[Pair, ...]

    def warnings(self) -> list[str]:
        """What to think about before combining."""
        found = []
        for p in self.overall:
            if p.norm_ratio > 5:
                found.append(
                    f"{p.first} and {p.second}: one update is {p.norm_ratio:.0f} times larger and will dominate"
                )
            if p.cosine < -0.1:
                found.append(f"{p.first} and {p.second} pull in opposite directions (cosine {p.cosine:.2f})")
            if p.input_overlap > 0.5 and abs(p.cosine) < 0.2:
                found.append(
                    f"{p.first} and {p.second} read the same directions ({p.input_overlap:.0%}) for different things"
                )
        return found


def interference(
    adapters: Mapping[str, Adapter], base: HostSource | None = None, targets: Collection[str] | None = None
) -> Interference:
    """Compare the weight updates of several adapters, pair by pair and target by target: at `targets`, or at all."""
    if len(adapters) < 2:
        raise ConfigError("interference needs at least two adapters")
    parts = {
        name: {p.target: (a, p) for p in a.parts if is_update(p) and (targets is None or p.target in targets)}
        for name, a in sorted(adapters.items())
    }
    squares = dict.fromkeys(parts, 0.0)
    pairs: list[Pair] = []
    products: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for target in dict.fromkeys(t for table in parts.values() for t in table if t is not None):
        here = {n: _Side.of(source(*table[target], base)) for n, table in parts.items() if target in table}
        for name, side in here.items():
            squares[name] += side.norm**2
        for (first, one), (second, two) in itertools.combinations(here.items(), 2):
            inner = float(low_rank_inner(one.B, one.A, two.B, two.A))
            products.setdefault((first, second), []).append((inner, one.norm**2, two.norm**2))
            pairs.append(_pair(first, second, target, inner, one, two))
    norms = {name: math.sqrt(square) for name, square in squares.items()}
    overall = tuple(
        _overall(names, rows, [p for p in pairs if (p.first, p.second) == names]) for names, rows in products.items()
    )
    return Interference(norms, overall, tuple(pairs))


@dataclass(frozen=True, eq=False)
class _Side:
    B: Tensor
    A: Tensor
    norm: float
    left: Tensor
    right: Tensor

    @staticmethod
    def of(source: Source) -> _Side:
        u, s, vh = low_rank_svd(source.B, source.A)
        k = numerical_rank(s) if float(s[0]) > 0 else 0
        return _Side(source.B, source.A, float(s.norm()), u[:, :k], vh[:k].t())


def _pair(first: str, second: str, target: str, inner: float, one: _Side, two: _Side) -> Pair:
    smaller = min(one.left.shape[1], two.left.shape[1])
    larger = max(one.left.shape[1], two.left.shape[1])
    return Pair(
        first,
        second,
        target,
        cosine=_ratio(inner, one.norm * two.norm),
        sign_conflict=_sign_conflict(one, two),
        input_overlap=_ratio(float((one.right.t() @ two.right).square().sum()), smaller),
        output_overlap=_ratio(float((one.left.t() @ two.left).square().sum()), smaller),
        chance_overlap=larger / one.A.shape[1],
        norm_ratio=_ratio(max(one.norm, two.norm), min(one.norm, two.norm), math.inf),
    )


def _sign_conflict(one: _Side, two: _Side) -> float:
    rows = torch.linspace(0, one.B.shape[0] - 1, min(ROWS, one.B.shape[0])).round().long()
    product = (one.B[rows] @ one.A).sign() * (two.B[rows] @ two.A).sign()
    return _ratio(float((product < 0).sum()), float((product != 0).sum()))


def _ratio(a: float, b: float, empty: float = 0.0) -> float:
    return a / b if b > 0 else empty


def _overall(names: tuple[str, str], rows: Sequence[tuple[float, float, float]], pairs: Sequence[Pair]) -> Pair:
    inner, one, two = (sum(column) for column in zip(*rows, strict=True))
    mean = {
        key: sum(getattr(p, key) for p in pairs) / len(pairs)
        for key in ("sign_conflict", "input_overlap", "output_overlap", "chance_overlap")
    }
    ratio = math.sqrt(_ratio(max(one, two), min(one, two), math.inf))
    return Pair(*names, None, cosine=_ratio(inner, math.sqrt(one * two)), norm_ratio=ratio, **mean)
