"""What data-driven starts ask for, gathered on a few batches with bounded memory.

components  EVA: the strongest directions of each layer's inputs at labelled tokens (`inputs.py`).
covariance  CorDA: the mean of x x^T over each layer's inputs (`inputs.py`).
gradient    LoRA-GA, LoRA-One: the loss's gradient by each target weight, averaged over batches.
weight      LoftQ, QPiSSA: the 16-bit weight behind a quantised one.
key, value  prefix tuning: what a text leaves in the cache.

Gradients and covariances are as large as the model, so they are gathered for as many layers at a time as fit a budget, when the
start of the first of them is made, and forgotten with the last (`lots.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

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
from veneer.models.bank import spans_of
from veneer.models.base import Base
from veneer.models.decoder import Decoder
from veneer.models.project import spans_at
from veneer.models.state import Run
from veneer.ops.attention import attention
from veneer.train.inputs import covariances, input_directions, require_projections
from veneer.train.lots import ByLot, Progress, lots
from veneer.types import Lowered, Override, Segment

TOKENS = 16_384
"""Tokens to look at. PCA and mean gradients of these bases settle well before."""


def begins_with_general_text(spec: Method) -> bool:
    """Whether the start of an adapter hangs on text beside the task's."""
    load_inits()
    return isinstance(spec, LowRankMethod) and GENERAL in needs(spec.init)


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
    require_projections(base, targets, spec.init)
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
        bank = base.bank([Lowered(overrides=overrides)])
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

    def places(self, runs: Sequence[Run]) -> None:
        return None

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
