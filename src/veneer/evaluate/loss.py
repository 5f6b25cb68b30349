"""Loss on held-out rows, weighted by token: the sum of negative log-likelihoods over labelled tokens, and how many there are.

The same packed forward pass as training, without gradients, with hidden states and scores for labelled positions only. Sums are
kept per row, so that adapters can be compared on the same rows and intervals can be drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.data import Dataset, batch, plan_rows
from veneer.models.bank import Bank, spans_of
from veneer.models.base import Base
from veneer.models.project import spans_at


@dataclass(frozen=True, eq=False)
class RowLosses:
    """Per row of a dataset: summed negative log-likelihood in nats and label weight, fp64 `[rows]` each."""

    nll: Tensor
    weight: Tensor

    @property
    def mean(self) -> float:
        """Nats per labelled token over all rows."""
        return float(self.nll.sum() / self.weight.sum())


def row_losses(
    base: Base,
    dataset: Dataset,
    bank: Bank,
    adapter: int = -1,
    *,
    tokens_per_pass: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> RowLosses:
    """Losses of every row under one adapter of `bank` (-1: the bare base). `progress` is told rows as they finish."""
    nll = torch.zeros(len(dataset), dtype=torch.float64)
    weight = torch.zeros(len(dataset), dtype=torch.float64)
    with torch.inference_mode():
        for rows in plan_rows(dataset, tokens_per_pass):
            packed = batch(dataset, rows, adapter)
            labelled = packed.labelled
            hidden = base.decoder.forward(packed.tokens, packed.segments, bank, rows=labelled)
            spans = spans_at(spans_of(packed.segments), labelled)
            losses = base.decoder.nll(hidden, packed.labels[labelled], spans, bank).double()
            weights = packed.weights[labelled].double()
            lengths = torch.tensor([s.length for s in packed.segments])
            owner = torch.repeat_interleave(torch.tensor(rows), lengths)[labelled]
            nll.index_add_(0, owner, losses * weights)
            weight.index_add_(0, owner, weights)
            if progress is not None:
                progress(len(rows))
    return RowLosses(nll, weight)
