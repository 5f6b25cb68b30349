"""What data-driven starts ask for, gathered on a few batches with bounded memory.

components  EVA: the strongest directions of each layer's inputs at labelled tokens, by incremental PCA. Layers that share an
            input (q, k, v; gate, up) share one. A layer is done when its directions no longer turn.
covariance  CorDA: the mean of x x^T over each layer's inputs.
gradient    LoRA-GA, LoRA-One: the loss's gradient by each target weight, averaged over batches.
weight      LoftQ, QPiSSA: the 16-bit weight behind a quantised one.
key, value  prefix tuning: what a text leaves in the cache.

Gradients and covariances are as large as the model, so they are gathered for as many layers at a time as fit a budget, when the
start of the first of them is made, and forgotten with the last (`ByLot`).

Incremental PCA (arXiv 0709.1694 [stat]): the right singular vectors of [diag(S) V; X - mean; w (old mean - new mean)],
w = sqrt(N b / (N + b)).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from veneer.data import Dataset, batch, plan_epoch
from veneer.errors import ConfigError
from veneer.inits import GENERAL, InitStats, needs
from veneer.inits import load_all as load_inits
from veneer.inits.data_driven import spread_ranks
from veneer.inject.targets import select
from veneer.methods import Method
from veneer.methods._lowrank import LowRankMethod
from veneer.methods.prefix import PrefixTuning
from veneer.models.bank import Bank, spans_of
from veneer.models.base import Base
from veneer.models.decoder import Decoder, Run
from veneer.models.project import spans_at
from veneer.ops.attention import attention
from veneer.ops.low_rank import Frozen
from veneer.types import Lowered, Override, Segment

TOKENS = 16_384
"""Tokens to look at. PCA and mean gradients of these bases settle well before."""

TOLERANCE = 0.99
"""Cosine between a direction before and after an update, from which on it counts as settled (EVA's tau)."""

LOT_BYTES = 512 * 2**20
"""Memory for gradients or covariances that are gathered at a time."""

Progress = Callable[[float], None]


def calibrate(
    base: Base,
    spec: Method,
    dataset: Dataset,
    seed: int,
    progress: Progress = lambda share: None,
    general: Dataset | None = None,
) -> Mapping[str, InitStats]:
    """What the init of `spec` needs, by target; empty for inits that need nothing. `general` is text beside the task's rows."""
    load_inits()
    if isinstance(spec, PrefixTuning):
        return {"": text_cache(base, spec)} if spec.init == "text" else {}
    if not isinstance(spec, LowRankMethod) or not needs(spec.init):
        return {}
    targets = select(base.shape, spec).targets
    wanted = needs(spec.init)
    if "weight" in wanted:
        return original_weights(base, targets, spec.init)
    if GENERAL in wanted:
        if general is None:
            raise ConfigError(
                f"init: {spec.init} keeps what general text needs, and there is none",
                help="name a file of general text in data.general",
            )
        dataset = general
    passes = [rows for step in plan_epoch(dataset, seed, 0, 2048, 2048) for rows in step]
    count = max(1, math.ceil(TOKENS / 2048))
    if "gradient" in wanted:
        return gradients(base, dataset, passes[:count], targets, progress)
    _require_projections(base, targets, spec.init)
    if "covariance" in wanted:
        return covariances(base, dataset, passes[:count], targets, progress)
    most = max(spec.rank_at(t) for t in targets)
    return input_directions(base, dataset, passes[:count], targets, math.ceil(spec.rho * most), progress)


def spread(spec: Method, stats: Mapping[str, InitStats]) -> Method:
    """EVA's redistribution: ranks move to the layers whose inputs have more to explain; the scale of each layer stays."""
    if not isinstance(spec, LowRankMethod) or spec.init != "eva" or spec.rho <= 1:
        return spec
    if spec.rank_pattern or spec.alpha_pattern:
        raise ConfigError(
            "init: eva with rho > 1 chooses the ranks itself",
            help="leave rank_pattern and alpha_pattern out, or set rho: 1",
        )
    ranks = spread_ranks(stats, spec.rank, spec.rho)
    kept = {target: rank for target, rank in ranks.items() if rank}
    keep_scale = (lambda r: r / spec.rank) if spec.scaling == "alpha/r" else (lambda r: math.sqrt(r / spec.rank))
    return spec.model_copy(
        update={
            "targets": tuple(kept),
            "exclude": (),
            "layers": None,
            "rank_pattern": {re.escape(t): r for t, r in kept.items()},
            "alpha_pattern": {re.escape(t): spec.alpha * keep_scale(r) for t, r in kept.items()},
        }
    )


# -- inputs ------------------------------------------------------------------------------------------------------------


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


def _require_projections(base: Base, targets: Sequence[str], name: str) -> None:
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


class ByLot(Mapping[str, InitStats]):
    """Statistics that are gathered when the first of their lot is asked for; one lot is held at a time."""

    def __init__(
        self, lots: Sequence[Sequence[str]], gather: Callable[[Sequence[str], Progress], dict[str, InitStats]],
        progress: Progress,
    ) -> None:  # fmt: skip
        self._lots = lots
        self._lot_of = {target: number for number, lot in enumerate(lots) for target in lot}
        self._gather, self._progress = gather, progress
        self._number = -1
        self._held: dict[str, InitStats] = {}

    def __getitem__(self, target: str) -> InitStats:
        number = self._lot_of[target]
        if number != self._number:
            self._held = {}  # before the next one is gathered
            self._held = self._gather(
                self._lots[number], lambda share: self._progress((number + share) / len(self._lots))
            )
            self._number = number
        return self._held[target]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lot_of)

    def __len__(self) -> int:
        return len(self._lot_of)


def lots(targets: Iterable[str], weighs: Callable[[str], int]) -> list[list[str]]:
    """Targets, in order, in lots whose bytes fit into the budget; a target that doesn't has a lot of its own."""
    found: list[list[str]] = [[]]
    used = 0
    for target in targets:
        size = weighs(target)
        if found[-1] and used + size > LOT_BYTES:
            found.append([])
            used = 0
        found[-1].append(target)
        used += size
    return found


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


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients(
    base: Base, dataset: Dataset, passes: Sequence[Sequence[int]], targets: Sequence[str], progress: Progress
) -> ByLot:
    """The mean gradient of the loss by each target weight, fp32 `[out, in]`."""

    def gather(lot: Sequence[str], progress: Progress) -> dict[str, InitStats]:
        weights = {t: base.host(t).weight().detach().clone().requires_grad_() for t in lot}
        overrides = {f"{t}.weight": Override(_as_stored(base, t, w)) for t, w in weights.items()}
        head = f"{base.layout.head_path}.weight"
        if base.config.tied_head and base.layout.embed_path in weights and head not in overrides:
            # A replaced embedding is the head's weight, too; an adapter on the embedding does not reach the head.
            overrides[head] = Override(base.decoder.embed)
        bank = Bank.of([Lowered(overrides=overrides)], base.decoder.groups, base.layout.embed_path)
        total = 0.0
        for number, rows in enumerate(passes):
            item = batch(dataset, rows, 0)
            labelled = item.labelled
            hidden = base.decoder.forward(item.tokens, item.segments, bank, rows=labelled)
            spans = spans_at(spans_of(item.segments), labelled)
            loss = base.decoder.loss(hidden, item.labels[labelled], item.weights[labelled], spans, bank)
            loss.backward()
            total += float(item.weights.sum())
            progress((number + 1) / len(passes))
        found = {}
        for target, weight in weights.items():
            assert weight.grad is not None
            found[target] = InitStats(gradient=weight.grad.float() / total)
        return found

    def weighs(target: str) -> int:
        shape = base.shape.hosts[target]
        return 2 * shape.in_features * shape.out_features * base.dtype.itemsize

    return ByLot(lots(targets, weighs), gather, progress)


def _as_stored(base: Base, target: str, weight: Tensor) -> Tensor:
    """A weight `[out, in]` the way round that the checkpoint has it."""
    return weight if base.shape.hosts[target].kind == "linear" else weight.t()


# -- weights and texts -------------------------------------------------------------------------------------------------


def original_weights(base: Base, targets: Sequence[str], name: str = "loftq") -> dict[str, InitStats]:
    """The weights behind a quantised base, from its converted 16-bit file; mapped, not read into memory."""
    from veneer.models.load import load_base

    if base.quantize is None:
        raise ConfigError(
            f"init: {name} starts from what quantisation lost, and this base is not quantised", help="set quantize: nf4"
        )
    plain = load_base(base.source, dtype="bfloat16", device=base.device)
    return {target: InitStats(weight=plain.host(target).weight()) for target in targets}


class _Record:
    """A cache that keeps the keys and values of one text."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def put_prefix(self, layer: int, sequence: int, key: Tensor, value: Tensor) -> None:
        raise ConfigError("a text for a prefix is run on the bare base")

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        runs: Sequence[Run],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        self.keys.append(k.float())
        self.values.append(v.float())
        return attention(q, k, v, [run.length for run in runs], scale=scale, window=window, softcap=softcap)


def text_cache(base: Base, spec: PrefixTuning) -> InitStats:
    """Keys (after RoPE) and values of the spec's text, the first `num_tokens` of it."""
    prepared = spec.prepared(base.require_tokenizer().encode)
    ids = prepared.init_text
    assert not isinstance(ids, str)
    if len(ids) < spec.num_tokens:
        raise ConfigError(
            f"init_text has {len(ids)} tokens for {spec.num_tokens} virtual ones",
            help="give a longer text or lower num_tokens",
        )
    record = _Record()
    decoder: Decoder = base.decoder
    with torch.no_grad():
        tokens = torch.tensor(ids[: spec.num_tokens], device=base.device)
        decoder.forward(tokens, [Segment(spec.num_tokens, 0)], cache=record)
    return InitStats(key=torch.stack(record.keys), value=torch.stack(record.values))
