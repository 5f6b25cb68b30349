"""What a run will do and cost, said before it starts, with a warning for everything that usually goes wrong."""

from __future__ import annotations

from veneer.data import Dataset, Statistics, statistics
from veneer.inject.targets import select
from veneer.methods import Method
from veneer.models.base import Base
from veneer.train.events import Preflight
from veneer.train.loop import Run
from veneer.train.memory import Fit


def preflight(
    base: Base,
    spec: Method,
    dataset: Dataset,
    run: Run,
    sizes: Fit,
    notes: tuple[str, ...],
) -> Preflight:
    """Parameters, bytes by category, steps, label share, and warnings with reasons."""
    counted = statistics(dataset)
    selects = spec.site == "weight" and spec.places(base.shape) is None
    table = select(base.shape, spec).table if selects else ()
    return Preflight(
        rows=len(dataset),
        tokens=counted.tokens,
        label_share=counted.label_share,
        steps=len(run.schedule),
        trained_parameters=run.parameters.count,
        base_parameters=base.num_parameters,
        dtype=str(base.dtype).removeprefix("torch."),
        tokens_per_pass=sizes.tokens_per_pass,
        recomputed_blocks=run.recompute,
        targets=tuple((m.entry, f"{len(m.targets)} layers", m.parameters) for m in table),
        memory=sizes.estimate.bytes,
        warnings=(*notes, *counted.warnings(), *_warnings(counted, run)),
    )


def _warnings(counted: Statistics, run: Run) -> list[str]:
    found = []
    steps, trained = len(run.schedule), run.parameters.count
    if steps < 100:
        found.append(
            f"{steps} optimiser steps: short runs want a higher lr or more epochs (best results come after hundreds)"
        )
    if counted.labels > 4 * trained:
        found.append(
            f"{counted.labels:,} label tokens for {trained:,} parameters: the adapter may saturate; raise the rank"
        )
    return found
