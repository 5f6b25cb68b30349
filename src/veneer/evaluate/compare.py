"""The base beside each adapter on the same rows: what an adapter gains on its task, and what it costs elsewhere.

    report = evaluate(base, {"tickets": adapter}, load("tickets.eval.jsonl"), general=load("general.jsonl"))

loss           nats per label token, every token weighted alike: never a mean of batch means
perplexity     e^loss; depends on the tokenizer
bits_per_byte  of the learned text, stop tokens paid for but not counted, weighted as the loss is; comparable between tokenizers
general_loss   nats per token on text that no adapter was trained on; its change is the forgetting
and those of `questions` and `text` where the rows ask something. Every figure has a 95 % interval by bootstrap over rows, and
every change against the base a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from veneer import __version__, methods
from veneer.adapter import Adapter
from veneer.base.identity import compare as compare_identity
from veneer.data import Dataset, Rows, TrainOn, encode
from veneer.data.tokens import OnTooLong
from veneer.engine import Engine
from veneer.errors import ConfigError
from veneer.evaluate import questions as asking
from veneer.evaluate import text
from veneer.evaluate.bootstrap import Floats, Interval, Measure, change, interval, quotient, ratio
from veneer.evaluate.loss import RowLosses, row_losses
from veneer.models.bank import Bank
from veneer.models.base import Base

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte", "general_loss"})

Figures: TypeAlias = Mapping[str, Interval]


@dataclass(frozen=True)
class Report:
    """All figures of one evaluation.

    base      metric -> figure of the bare base
    adapters  name -> metric -> figure
    changes   name -> metric -> adapter minus base, paired
    settings  everything needed to repeat it
    warnings  what a reader should know
    """

    base: Figures
    adapters: Mapping[str, Figures]
    changes: Mapping[str, Figures]
    settings: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """`{"base": {...}, "adapters": {name: {...}}, ...}` with `METRIC`, `METRIC_low`, `METRIC_high`, and `METRIC_change`."""
        adapters = {
            name: {**_flat(figures), **_flat(self.changes[name], "_change")} for name, figures in self.adapters.items()
        }
        return {
            "base": _flat(self.base),
            "adapters": adapters,
            "settings": dict(self.settings),
            "warnings": list(self.warnings),
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(columns, rows) as text: a metric a row; the base, then each adapter and its change."""
        columns = ["metric", "base", *(title for name in self.adapters for title in (name, "change (95 % interval)"))]
        rows = []
        for metric, figure in self.base.items():
            cells = [metric, f"{figure.value:.4g}"]
            for name, figures in self.adapters.items():
                moved = self.changes[name][metric]
                cells += [f"{figures[metric].value:.4g}", f"{moved.value:+.3g} ({moved.low:+.3g} to {moved.high:+.3g})"]
            rows.append(cells)
        return columns, rows


def _flat(figures: Figures, suffix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for metric, found in figures.items():
        flat |= {f"{metric}{suffix}": found.value}
        flat |= {f"{metric}{suffix}_low": found.low, f"{metric}{suffix}_high": found.high}
    return flat


@dataclass(frozen=True)
class Settings:
    """How to evaluate.

    max_length   of a row in tokens; None is the base's own limit
    on_too_long  "error" or "truncate": every row is scored
    train_on     which turns count, as in training
    generate     questions that are answered by generation; 0 for none
    labels       score labels by likelihood where the answers are labels
    """

    max_length: int | None = None
    on_too_long: OnTooLong = "error"
    train_on: TrainOn = "assistant"
    generate: int = 100
    labels: bool = True
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.on_too_long == "drop":
            raise ConfigError("on_too_long: drop would score other rows than asked", help="use error or truncate")
        if self.resamples < 100 or self.generate < 0:
            raise ConfigError(
                f"resamples {self.resamples} must be at least 100, and generate {self.generate} at least 0"
            )


@dataclass
class _Work:
    """One evaluation under way: measures by voice ("" is the base) and metric."""

    base: Base
    names: tuple[str, ...]
    bank: Bank
    settings: Settings
    progress: Callable[[str], None]
    measures: dict[str, dict[str, Measure]] = field(default_factory=dict)
    losses: dict[str, RowLosses] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def voices(self) -> list[tuple[str, int]]:
        """(name, index in the bank), the base first."""
        return [("", -1), *((name, i) for i, name in enumerate(self.names))]

    def put(self, voice: str, found: Mapping[str, Measure]) -> None:
        self.measures.setdefault(voice, {}).update(found)


def evaluate(
    base: Base,
    adapters: Mapping[str, Adapter],
    rows: Rows,
    *,
    general: Rows | None = None,
    settings: Settings | None = None,
    allow_base_mismatch: str | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Score the base and every adapter on the same rows. `progress` is told, in words, what is being done."""
    chosen = Settings() if settings is None else settings
    for adapter in adapters.values():
        compare_identity(adapter, base, allow=allow_base_mismatch)
    lowered = [methods.lower(adapter, base, digest=adapter.digest) for adapter in adapters.values()]
    bank = base.bank(lowered)
    work = _Work(base, tuple(adapters), bank, chosen, progress)
    _losses(work, rows)
    if general is not None:
        _general(work, general)
    if asked := _asked(work, rows):
        _labels(work, asked)
        _generation(work, asked, adapters, allow_base_mismatch)
    return _report(work, _repeatable(base, adapters, rows, general, chosen))


def _losses(work: _Work, rows: Rows) -> None:
    dataset = _encoded(work, rows, work.settings.on_too_long)
    for voice, index in work.voices:
        work.progress(f"loss of {voice or 'the base'} on {len(rows)} rows")
        work.losses[voice] = row_losses(work.base, dataset, work.bank, index)
        work.put(voice, _loss_measures(work.losses[voice], dataset))


def _encoded(work: _Work, rows: Rows, on_too_long: OnTooLong) -> Dataset:
    length = work.settings.max_length or work.base.config.max_positions
    tokenizer, train_on = work.base.require_tokenizer(), work.settings.train_on
    dataset = encode(rows, tokenizer, max_length=length, on_too_long=on_too_long, train_on=train_on)
    if dataset.notes.get("truncated"):
        work.warnings.append(f"{dataset.notes['truncated']} rows of {rows.name} were cut to {length} tokens")
    return dataset


def _loss_measures(losses: RowLosses, dataset: Dataset) -> dict[str, Measure]:
    nll, weight = losses.nll.numpy(), losses.weight.numpy()
    loss = ratio(nll, weight)
    found = {"loss": loss, "perplexity": Measure(loss.sums, _perplexity)}
    if dataset.bytes.any():  # answers may be empty, all of them
        found["bits_per_byte"] = ratio(nll / math.log(2), dataset.bytes)
    return found


def _perplexity(totals: Floats) -> Floats:
    found: Floats = np.exp(np.minimum(quotient(totals), 700.0))
    return found


def _general(work: _Work, rows: Rows) -> None:
    dataset = _encoded(work, rows, "truncate")
    for voice, index in work.voices:
        work.progress(f"loss of {voice or 'the base'} on {len(rows)} general rows")
        losses = row_losses(work.base, dataset, work.bank, index)
        work.put(voice, {"general_loss": ratio(losses.nll.numpy(), losses.weight.numpy())})


def _asked(work: _Work, rows: Rows) -> list[asking.Question]:
    """The rows as questions; without those that the base has no room for, which cutting would not help."""
    asked, most = asking.questions(rows), work.base.config.max_positions
    fitting = asking.fitting(asked, work.base.require_tokenizer(), most)
    if left := len(asked) - len(fitting):
        work.warnings.append(
            f"{left} questions of {rows.name} leave no room for the longest answer in the base's {most} tokens: "
            "labels and generated answers are without them"
        )
    return fitting


def _labels(work: _Work, asked: list[asking.Question]) -> None:
    labels = asking.labels_of(asked) if work.settings.labels else ()
    whole = work.settings.train_on != "all" and work.settings.on_too_long == "error"
    known = (
        whole
        and len(asked) == len(work.losses[""].nll)
        and all(asking.scores_alone(question.row) for question in asked)
    )
    for voice, index in work.voices if labels else []:
        work.progress(f"{len(labels)} labels scored by {voice or 'the base'}")
        own = work.losses[voice].nll.numpy() if known else None
        scores = asking.label_scores(work.base, asked, labels, work.bank, index, own)
        work.put(voice, asking.label_measures(scores, asked, labels))


def _generation(work: _Work, asked: list[asking.Question], adapters: Mapping[str, Adapter], allow: str | None) -> None:
    asked = asked[: work.settings.generate]
    if not asked:
        return
    work.progress(f"{len(asked)} answers written by each of {len(adapters) + 1}")
    engine = Engine(work.base)
    try:
        for name, adapter in adapters.items():
            engine.add(name, adapter, allow_base_mismatch=allow)
        answers = asking.generate(engine, work.base.require_tokenizer(), asked, [None, *adapters])
    finally:
        engine.close()
    accepted = [question.accepted for question in asked]
    for asked_of, said in answers.items():
        work.put(asked_of or "", text.measures(said, accepted))


def _report(work: _Work, settings: Mapping[str, Any]) -> Report:
    seed, resamples = work.settings.seed, work.settings.resamples
    figures = {
        voice: {metric: interval(measure, seed, resamples) for metric, measure in found.items()}
        for voice, found in work.measures.items()
    }
    changes = {
        name: {
            metric: change(measure, work.measures[""][metric], seed, resamples)
            for metric, measure in work.measures[name].items()
        }
        for name in work.names
    }
    return Report(figures.pop(""), figures, changes, settings, tuple(work.warnings))


def _repeatable(
    base: Base, adapters: Mapping[str, Adapter], rows: Rows, general: Rows | None, settings: Settings
) -> dict[str, Any]:
    import torch

    tokenizer = base.require_tokenizer()
    return {
        "veneer": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "base": base.name,
        "base_identity": base.identity,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantize": base.quantize,
        "tokenizer": tokenizer.digest,
        "adapters": {name: adapter.digest for name, adapter in adapters.items()},
        "data": _source(rows),
        "general": None if general is None else _source(general),
        **vars(settings),
    }


def _source(rows: Rows) -> dict[str, Any]:
    return {"path": rows.name, "sha256": rows.sha256, "format": rows.format, "rows": len(rows)}
