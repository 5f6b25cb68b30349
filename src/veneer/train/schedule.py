"""Which rows go into which optimiser step and which micro-batch, for the whole run, before it starts."""

from __future__ import annotations

import math

from veneer.data import Dataset, plan_epoch
from veneer.train.config import TrainConfig
from veneer.train.loop import Schedule


def plan_schedule(dataset: Dataset, config: TrainConfig, tokens_per_pass: int) -> Schedule:
    """The steps of all epochs: a function of data, seed and sizes alone."""
    schedule: list[list[list[int]]] = []
    for epoch in range(math.ceil(config.epochs)):
        steps = plan_epoch(dataset, config.seed, epoch, config.tokens_per_step, tokens_per_pass)
        share = min(1.0, config.epochs - epoch)
        schedule += steps[: max(1, round(share * len(steps)))]
        if config.max_steps is not None and len(schedule) >= config.max_steps:
            return schedule[: config.max_steps]
    return schedule
