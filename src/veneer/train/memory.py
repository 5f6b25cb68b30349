"""How a step fits into memory: the micro-batch and how many blocks recompute, from the formulas of `plan/`.

The budget is `train.memory`, or 80 % of the machine. Recomputing costs up to half a step's time, so as few blocks as possible do
it; only when all of them are not enough does the micro-batch shrink. The choice depends on sizes alone, never on what else the
machine is doing, so that a resumed run makes it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from veneer.data import Dataset, statistics
from veneer.errors import ConfigError, ResourceError
from veneer.inject.targets import select
from veneer.methods import Method
from veneer.models.base import Base
from veneer.plan import Estimate, Work, estimate
from veneer.train.config import TrainConfig
from veneer.train.optimizers import load_all as load_optimizers

DEFAULT_PASS = 2048
"""Micro-batch in tokens: products are at their full rate from about a thousand rows on, and memory grows with it."""

SHARE = 0.8


@dataclass(frozen=True)
class Fit:
    """The chosen sizes and what they need."""

    tokens_per_pass: int
    recompute: int
    estimate: Estimate


def fit_memory(base: Base, spec: Method, config: TrainConfig, dataset: Dataset) -> Fit:
    """The fastest sizes that fit the budget, or a ResourceError that says what would."""
    places = spec.places(base.shape)
    targets = select(base.shape, spec).targets if places is None else places
    budget = int(psutil.virtual_memory().total * SHARE) if config.memory == "auto" else config.memory
    longest = int(dataset.lengths.max())
    share = statistics(dataset).label_share
    optimizer = load_optimizers()[config.optimizer]
    smallest: Fit | None = None
    for tokens in _pass_sizes(config, longest):
        for blocks in _recompute_choices(base, spec, config):
            work = Work(
                max(tokens, longest),  # a longer row stands alone in its pass
                share,
                str(base.dtype).removeprefix("torch."),
                base.quantize,
                blocks,
                optimizer.state,
                optimizer.freezes,
            )
            fit = Fit(tokens, blocks, estimate(base.config, base.layout, spec, targets, work))
            if fit.estimate.total <= budget:
                return fit
            if smallest is None or fit.estimate.total < smallest.estimate.total:
                smallest = fit
    assert smallest is not None
    raise ResourceError(
        f"this run needs {smallest.estimate.total / 1e9:.2f} GB at the least ({smallest.tokens_per_pass} tokens per pass, "
        f"{smallest.recompute} blocks recomputed), the budget is {budget / 1e9:.2f} GB ({budget:,} bytes)",
        help="lower train.max_length, train.tokens_per_pass or method.rank, quantize the base, or raise train.memory",
    )


def dropout_of(spec: Method) -> float:
    """The dropout rate of methods that have one."""
    return float(dict(spec).get("dropout", 0.0))


def _pass_sizes(config: TrainConfig, longest: int) -> Sequence[int]:
    """Micro-batches to try, largest first; a pass holds at least the longest row."""
    if config.tokens_per_pass != "auto":
        return (config.tokens_per_pass,)
    sizes = []
    size = min(DEFAULT_PASS, config.tokens_per_step)
    while size > longest:
        sizes.append(size)
        size //= 2
    return (*sizes, min(longest, config.tokens_per_step))


def _recompute_choices(base: Base, spec: Method, config: TrainConfig) -> Sequence[int]:
    layers = base.config.layers
    if dropout_of(spec) and config.recompute == "all":
        raise ConfigError(
            "train.recompute: all would draw another dropout mask in the backward pass", help="set method.dropout: 0"
        )
    if dropout_of(spec) or config.recompute == "none":
        return (0,)
    return (layers,) if config.recompute == "all" else range(layers + 1)
