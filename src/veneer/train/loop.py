"""The training loop: a function over plain values that yields events.

One optimiser step: lower the adapter once, run its micro-batches on detached leaves, send the summed gradient back
through lowering once, clip, update. The loss of a step is the sum over its label tokens divided by their weight, whatever the
micro-batches, so 1x8, 2x4 and 8x1 are the same step.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from veneer import methods
from veneer.data import Batch, Dataset, batch
from veneer.errors import TrainingError, listed
from veneer.models.bank import Bank, Dropout, spans_of
from veneer.models.base import Base
from veneer.models.project import spans_at
from veneer.ops.finite import is_finite
from veneer.train.checkpoint import Cursor, write_json
from veneer.train.config import TrainConfig
from veneer.train.events import Evaluation, Event, Finished, Saved, Step
from veneer.train.optim import FlatParameters, rate_at, set_rate

Schedule = Sequence[Sequence[Sequence[int]]]
"""For each optimiser step its micro-batches, each a list of rows."""


@dataclass
class Run:
    """Everything a training loop works on. `dropout` is None or the rate with its generator, `regime` the method's own doing."""

    base: Base
    parameters: FlatParameters
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    schedule: Schedule
    config: TrainConfig
    cursor: Cursor
    dropout: Dropout | None = None
    recompute: int = 0
    regime: methods.Regime | None = None

    def bank(self) -> Bank:
        """The adapter as it is now, lowered and packed, differentiable."""
        lowered = methods.lower(self.parameters.adapter(), self.base)
        return self.base.bank([lowered], dropout=self.dropout)

    def frozen_bank(self) -> Bank:
        """The same without gradients or dropout, for evaluation."""
        with torch.no_grad():
            lowered = methods.lower(self.parameters.adapter(), self.base)
            return self.base.bank([lowered])


def fit(
    run: Run,
    evaluate: Callable[[Run], tuple[float | None, float | None]],
    save: Callable[[Run, bool], None],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    dump: Path | None = None,
) -> Iterator[Event]:
    """Train from the run's cursor to the end of its schedule.

    evaluate     held-out loss and general loss of the run as it is
    save         called with True when the adapter is the best so far, with False for a checkpoint
    should_stop  asked before every step; True saves and ends the run
    dump         folder for the evidence when a value is not finite
    """
    total = len(run.schedule)
    cursor, config = run.cursor, run.config
    if config.patience is not None and cursor.stale >= config.patience:
        yield Finished(cursor.step, "patience")
        return
    while cursor.step < total:
        if should_stop():
            save(run, False)
            yield Saved(cursor.step)
            yield Finished(cursor.step, "stopped")
            return
        yield _step(run, total, dump)
        cursor.step += 1
        last = cursor.step == total
        if last or cursor.step % config.eval_every == 0:
            event = _evaluation(run, evaluate, save)
            yield event
            if config.patience is not None and cursor.stale >= config.patience:
                save(run, False)
                yield Finished(cursor.step, "patience")
                return
        if last or cursor.step % config.save_every == 0:
            save(run, False)
            yield Saved(cursor.step)
    yield Finished(cursor.step, "done")


def _step(run: Run, total: int, dump: Path | None) -> Step:
    begin = time.perf_counter()
    cursor, config = run.cursor, run.config
    passes = [batch(run.dataset, rows, 0) for rows in run.schedule[cursor.step]]
    weight = float(sum(p.weights.double().sum() for p in passes))
    loss = accumulate(run, passes, weight)
    _penalise(run)
    norm = run.parameters.grad_norm()
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise _not_finite(run, float(loss), float(norm), dump)
    if cursor.step == 0 and any(segment.length > 2 for item in passes for segment in item.segments):
        _check_gradients_flow(run)
    if config.clip is not None and float(norm) > config.clip:
        for buffer in run.parameters.buffers.values():
            assert buffer.grad is not None
            buffer.grad.mul_(config.clip / norm)
    rate = rate_at(cursor.step, total, config)
    set_rate(run.optimizer, rate)
    run.optimizer.step()
    if run.regime is not None:
        run.regime.after_step(cursor.step + 1, run.parameters.detached().parts, run.parameters.gradients().parts)
    run.optimizer.zero_grad(set_to_none=True)
    if not all(is_finite(buffer.detach()) for buffer in run.parameters.buffers.values()):
        raise _not_finite(run, float(loss), float(norm), dump, "; it made parameters that are not finite")
    seconds = time.perf_counter() - begin
    tokens = sum(p.num_tokens for p in passes)
    return Step(
        step=cursor.step + 1,
        total=total,
        loss=float(loss),
        lr=rate,
        grad_norm=float(norm),
        tokens=tokens,
        label_tokens=sum(p.num_labels for p in passes),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def accumulate(run: Run, passes: Sequence[Batch], weight: float) -> Tensor:
    """Gradients of the weighted mean loss into the run's buffers; returns that loss, fp64."""
    packed = run.bank()
    leaves, pairs = packed.leaves()
    total = torch.zeros((), dtype=torch.float64)
    for item in passes:
        loss = pass_loss(run.base, leaves, item, run.recompute) / weight
        if loss.requires_grad:
            loss.backward()
        total += loss.detach().double()
        del loss  # what its graph keeps would stay through the next pass
    reached = [(tensor, leaf.grad) for tensor, leaf in pairs if leaf.grad is not None]
    if reached:
        torch.autograd.backward([t for t, _ in reached], [g for _, g in reached])
    for buffer in run.parameters.buffers.values():
        if buffer.grad is None:
            buffer.grad = torch.zeros_like(buffer)
    return total


def _penalise(run: Run) -> None:
    """Add the gradient of the regime's penalty to the buffers. The loss that is shown stays that of the data."""
    term = None if run.regime is None else run.regime.penalty(run.parameters.adapter().parts)
    if term is not None:
        term.backward()


def pass_loss(base: Base, bank: Bank, item: Batch, recompute: int = 0) -> Tensor:
    """Weighted sum of negative log-likelihoods over the labelled tokens of one packed pass, fp32."""
    rows = item.labelled
    hidden = base.decoder.forward(item.tokens, item.segments, bank, rows=rows, recompute=recompute)
    spans = spans_at(spans_of(item.segments), rows)
    return base.decoder.loss(hidden, item.labels[rows], item.weights[rows], spans, bank)


def _evaluation(
    run: Run, evaluate: Callable[[Run], tuple[float | None, float | None]], save: Callable[[Run, bool], None]
) -> Evaluation:
    cursor = run.cursor
    loss, general = evaluate(run)
    if not all(math.isfinite(value) for value in (loss, general) if value is not None):
        raise TrainingError(
            f"the evaluation after step {cursor.step} is not finite: held-out loss {loss}, general loss {general}",
            help="lower train.lr, or look at those rows; the last checkpoint is intact",
        )
    best = loss is not None and (cursor.best is None or loss < cursor.best)
    if best:
        cursor.best, cursor.best_step, cursor.stale = loss, cursor.step, 0
        save(run, True)
    elif loss is not None:
        cursor.stale += 1
    return Evaluation(cursor.step, loss, general, best)


def _check_gradients_flow(run: Run) -> None:
    """In the first step one of A and B has a gradient wherever the update reaches the loss; the other one was zero.

    Not for rows of two tokens: where attention sees one position, queries and keys change nothing.
    """
    stuck = run.parameters.dead()
    if stuck:
        raise TrainingError(
            f"these trained layers received no gradient in the first step:\n{listed(stuck)}",
            help="the layers they sit on do not reach the loss; leave them out with method.exclude",
        )


def _not_finite(run: Run, loss: float, norm: float, dump: Path | None, made: str = "") -> TrainingError:
    """The error for a value that is not finite, with the evidence on disk."""
    step = run.cursor.step
    rows = [row for rows in run.schedule[step] for row in rows]
    where = ""
    if dump is not None:
        evidence = {
            "step": step + 1,
            "loss": repr(loss),
            "grad_norm": repr(norm),
            "rows": rows,
            "largest_parameter": {n: float(b.detach().abs().max()) for n, b in run.parameters.buffers.items()},
        }
        path = dump / "not-finite.json"
        write_json(path, evidence)
        where = f"; rows and parameter sizes are in {path}"
    return TrainingError(
        f"step {step + 1}: loss is {loss}, gradient norm {norm}{made}{where}",
        help="lower train.lr, or look at those rows; the last checkpoint is intact",
    )
