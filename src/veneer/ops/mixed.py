"""Serving: the update of every row planned once per step, and the same for all steps while the mix of rows stays.

A bank's `Packs` keep the plan of the spans they last saw: which rows take which factors, as one call of the C kernel for the
short runs of decoding and ordinary products for prompts. Where the kernel can't be used there is no plan, and the forms of
`low_rank.py` do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

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


def plan(packs: Sequence[Pack], spans: Sequence[Span], dtype: torch.dtype) -> Plan | None:
    """The plan for these rows, or None where a pack has another dtype or layout than the kernel reads."""
    used = sorted({span.index for span in spans if span.index >= 0})
    ours = [packs[i] for i in used]
    if any(t is not None and t.dtype != dtype for pack in ours for t in pack.tensors()):
        return None
    rows = [(slice(span.start, span.stop), used.index(span.index)) for span in spans if span.index >= 0]
    runs: list[tuple[int, int, mixed.Factors]] = []
    long: list[tuple[slice, Pack]] = []
    for part, i in rows:
        pack = ours[i]
        if pack.A is None:
            continue
        if part.stop - part.start > mixed.RUN:
            long.append((part, pack))
            continue
        factors = _factors(pack)
        if factors is None:
            return None
        runs.append((part.start, part.stop - part.start, factors))
    jobs = mixed.jobs(runs)
    if runs and jobs is None:
        return None
    vectors = any(t is not None for pack in ours for t in (pack.in_scale, pack.out_scale, pack.bias))
    return Plan(jobs, tuple(long), ours, rows, vectors)


_KNOWN: WeakKeyDictionary[Pack, mixed.Factors | None] = WeakKeyDictionary()


def _factors(pack: Pack) -> mixed.Factors | None:
    """The pack's pairs for the kernel, made once: packs of a bank do not change."""
    if pack not in _KNOWN:
        assert pack.A is not None
        ranks = zip(pack.B, pack.ranks(), pack.columns, strict=True)
        _KNOWN[pack] = mixed.factors((pack.A[first:last], b, start) for b, (first, last), (start, _) in ranks)
    return _KNOWN[pack]
