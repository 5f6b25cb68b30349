"""Serving: the update of every row planned once per step, and the same for all steps while the mix of rows stays.

A bank's `Packs` keep the plan of the spans they last saw: which rows take which factors, as one call of the C kernel for the
short runs of decoding and ordinary products for prompts. Where the kernel can't be used there is no plan, and the forms of
`low_rank.py` do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from veneer.ops.adapted import Rows, add_low_rank, finish, scaled
from veneer.ops.frozen import Frozen
from veneer.ops.native import mixed
from veneer.ops.pack import Pack
from veneer.ops.recording import unrecorded
from veneer.types import Span


@dataclass(frozen=True, eq=False)
class Plan:
    """What the rows of a step get on one projection group.

    jobs     low-rank updates of short runs; None where there are none
    long     the other runs, and their packs
    vectors  whether any pack scales or has a bias
    """

    jobs: mixed.Jobs | None
    long: tuple[tuple[slice, Pack], ...]
    packs: list[Pack]
    rows: Rows
    vectors: bool

    @unrecorded
    def run(self, x: Tensor, frozen: Frozen, bias: Tensor | None) -> Tensor | None:
        """`adapted_linear` by this plan, or None where the kernel refuses these tensors."""
        x = scaled(x, self.packs, self.rows) if self.vectors else x
        y = frozen.apply(x)
        if self.jobs is not None and not self.jobs.add(y, x):
            return None
        for part, pack in self.long:
            add_low_rank(y[part], x[part], pack)
        if self.vectors:
            finish(y, bias, self.packs, self.rows)
        elif bias is not None:
            y += bias.to(y.dtype)
        return y


def plan(packs: Sequence[Pack], spans: tuple[Span, ...], dtype: torch.dtype) -> Plan | None:
    """The plan for these rows, or None where a pack has another dtype or layout than the kernel reads."""
    used, rows = _rows_of(spans)
    ours = [packs[i] for i in used]
    vectors = False
    for pack in ours:
        if not pack.dtypes <= {dtype}:
            return None
        vectors = vectors or pack.has_vectors
    runs: list[tuple[int, int, mixed.Factors]] = []
    long: list[tuple[slice, Pack]] = []
    for part, i in rows:
        pack, length = ours[i], part.stop - part.start
        if pack.A is None:
            continue
        if length > mixed.RUN:
            long.append((part, pack))
        elif pack.factors is None:
            return None
        else:
            runs.append((part.start, length, pack.factors))
    jobs = mixed.jobs(runs)
    if runs and jobs is None:
        return None
    return Plan(jobs, tuple(long), ours, rows, vectors)


@lru_cache(maxsize=64)
def _rows_of(spans: tuple[Span, ...]) -> tuple[list[int], Rows]:
    """The packs that these rows use, and the rows of each by its place among those. Most groups of a step have the same spans."""
    used = sorted({span.index for span in spans if span.index >= 0})
    return used, [(slice(span.start, span.stop), used.index(span.index)) for span in spans if span.index >= 0]
