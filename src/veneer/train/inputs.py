"""What layers see: the strongest directions of their inputs, by incremental PCA (EVA), or their covariance (CorDA).

Incremental PCA (arXiv 0709.1694 [stat]): the right singular vectors of [diag(S) V; X - mean; w (old mean - new mean)],
w = sqrt(N b / (N + b)). Layers that share an input (q, k, v; gate, up) share what is gathered; a layer is done when its
directions no longer turn.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from veneer.data import Dataset, batch
from veneer.errors import ConfigError
from veneer.inits import InitStats
from veneer.models.base import Base
from veneer.ops.low_rank import Frozen
from veneer.train.lots import ByLot, Progress, lots

TOLERANCE = 0.99
"""Cosine between a direction before and after an update, from which on it counts as settled (EVA's tau)."""


@dataclass
class Directions:
    """The strongest directions of rows seen so far. `vectors` `[k, in]`, `values` `[k]`."""

    size: int
    count: int = 0
    total: float = 0.0
    mean: Tensor | None = None
    vectors: Tensor | None = None
    values: Tensor | None = None
    settled: bool = False

    def update(self, rows: Tensor) -> None:
        """Take in more rows `[n, in]`."""
        rows = rows.double()
        mean = rows.mean(dim=0)
        stacked = rows - mean
        self.total += float(stacked.square().sum())
        if self.mean is not None and self.vectors is not None and self.values is not None:
            step = math.sqrt(self.count * len(rows) / (self.count + len(rows))) * (self.mean - mean)
            self.total += float(step.square().sum())
            stacked = torch.cat([self.values[:, None] * self.vectors, stacked, step[None]])
            mean = (self.count * self.mean + len(rows) * mean) / (self.count + len(rows))
        _, values, vectors = torch.linalg.svd(stacked, full_matrices=False)
        vectors = vectors[: self.size]
        if self.vectors is not None and self.vectors.shape == vectors.shape:
            self.settled = bool(((vectors * self.vectors).sum(dim=1).abs() >= TOLERANCE).all())
        self.mean, self.vectors, self.values = mean, vectors, values[: self.size]
        self.count += len(rows)


@dataclass
class _Watched:
    """A frozen product that shows its input to a watcher."""

    inner: Frozen
    see: Callable[[Tensor], None]
    in_features: int = field(init=False)
    out_features: int = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.in_features, self.out_features = self.inner.in_features, self.inner.out_features
        self.dtype = self.inner.dtype

    def apply(self, x: Tensor) -> Tensor:
        self.see(x)
        return self.inner.apply(x)

    def apply_transposed(self, dy: Tensor) -> Tensor:
        return self.inner.apply_transposed(dy)


def require_projections(base: Base, targets: Sequence[str], name: str) -> None:
    """Refuse targets whose inputs are no vectors."""
    if base.layout.embed_path in targets:
        raise ConfigError(
            f"init: {name} reads the inputs of a layer, and those of '{base.layout.embed_path}' are token ids",
            help="leave it out with method.exclude, or use an init without inputs: default, pissa, lora_ga",
        )


def _groups(base: Base, targets: Iterable[str]) -> dict[str, str]:
    """Target -> the group that it is a part of: layers of one group share their input. A tied head is a group of its own."""
    group_of = {part.path: spec.name for spec in base.layout.groups for part in spec.parts}
    return {target: group_of.get(target, "head") for target in targets}


def _watch(
    base: Base,
    dataset: Dataset,
    passes: Sequence[Sequence[int]],
    groups: Collection[str],
    see: Callable[[str, Tensor, Tensor], bool],
    progress: Progress,
) -> None:
    """Show `see` the inputs of each group, `(group, x [tokens, in], which tokens carry a label)`, until it returns True."""
    mask = torch.empty(0, dtype=torch.bool)
    done: dict[str, bool] = dict.fromkeys(groups, False)

    def watcher(name: str) -> Callable[[Tensor], None]:
        def look(x: Tensor) -> None:
            done[name] = see(name, x, mask)

        return look

    watched = copy.copy(base.decoder)
    watched.groups = {
        name: replace(group, frozen=_Watched(group.frozen, watcher(name))) if name in groups else group
        for name, group in base.decoder.groups.items()
    }
    for number, rows in enumerate(passes):
        item = batch(dataset, rows, -1)
        mask = item.labels != -100
        with torch.no_grad():
            hidden = watched.forward(item.tokens, item.segments)
        if "head" in done:
            watcher("head")(hidden)
        progress((number + 1) / len(passes))
        if all(done.values()):
            break


def input_directions(
    base: Base, dataset: Dataset, passes: Sequence[Sequence[int]], targets: Sequence[str], size: int, progress: Progress
) -> dict[str, InitStats]:
    """EVA's statistics for each target."""
    group_of = _groups(base, targets)
    found = {name: Directions(size) for name in group_of.values()}

    def see(name: str, x: Tensor, labelled: Tensor) -> bool:
        if not found[name].settled:
            found[name].update(x[labelled])
        return found[name].settled

    _watch(base, dataset, passes, found, see, progress)
    return {
        target: InitStats(components=seen.vectors.float(), energies=seen.values.float(), total=seen.total)
        for target in targets
        if (seen := found[group_of[target]]).vectors is not None and seen.values is not None
    }


def covariances(
    base: Base, dataset: Dataset, passes: Sequence[Sequence[int]], targets: Sequence[str], progress: Progress
) -> ByLot:
    """The mean of x x^T over the inputs of each target, fp64 `[in, in]`. Targets of one group share it."""

    def gather(lot: Sequence[str], progress: Progress) -> dict[str, InitStats]:
        group_of = _groups(base, lot)
        sums: dict[str, Tensor] = {}
        counts = dict.fromkeys(group_of.values(), 0)

        def see(name: str, x: Tensor, labelled: Tensor) -> bool:
            wide = x.float()
            sums[name] = sums.get(name, 0.0) + (wide.t() @ wide).double()
            counts[name] += len(x)
            return False

        _watch(base, dataset, passes, counts, see, progress)
        means = {name: total / max(counts[name], 1) for name, total in sums.items()}
        return {target: InitStats(covariance=means[name]) for target, name in group_of.items() if name in means}

    def weighs(target: str) -> int:
        return 8 * base.shape.hosts[target].in_features ** 2

    return ByLot(lots(targets, weighs), gather, progress)
