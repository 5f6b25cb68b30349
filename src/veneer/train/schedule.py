"""Which rows go into which optimiser step and which micro-batch, for the whole run, before it starts."""

from __future__ import annotations

import math

from veneer.data import Dataset, plan_epoch
from veneer.methods import Method
from veneer.models.base import Base
from veneer.train.config import TrainConfig
from veneer.train.loop import Schedule

DEFAULT_PASS = 2048
"""Micro-batch in tokens: products are at their full rate from about a thousand rows on, and memory grows with it."""


def plan_schedule(base: Base, dataset: Dataset, config: TrainConfig, spec: Method) -> tuple[Schedule, int]:
    """The steps of all epochs, and the micro-batch size in tokens: a function of data, seed and sizes alone."""
    tokens_per_pass = DEFAULT_PASS if config.tokens_per_pass == "auto" else config.tokens_per_pass
    tokens_per_pass = min(tokens_per_pass, config.tokens_per_step)
    schedule: list[list[list[int]]] = []
    whole = math.ceil(config.epochs)
    for epoch in range(whole):
        steps = plan_epoch(dataset, config.seed, epoch, config.tokens_per_step, tokens_per_pass)
        share = min(1.0, config.epochs - epoch)
        schedule += steps[: max(1, round(share * len(steps)))]
        if config.max_steps is not None and len(schedule) >= config.max_steps:
            return schedule[: config.max_steps], tokens_per_pass
    return schedule, tokens_per_pass
