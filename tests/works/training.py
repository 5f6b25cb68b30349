"""Fifty steps on the demo base: the part of the table of what works that takes minutes, for three files of the slow tier."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.works.table import Cell
from veneer.data import Dataset, batch, encode, load
from veneer.evaluate.loss import row_losses
from veneer.inject import ModuleSource, attach, bank_of, create
from veneer.methods import METHODS, Method, lower, parse
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.train.config import TrainConfig
from veneer.train.events import Evaluation, Step
from veneer.train.run import Task, run_task

STEPS = 50
EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
FEW: dict[str, Any] = {"rank": 8, "num_tokens": 8, "target_rank": 4, "size": 32}
OWN: dict[str, dict[str, Any]] = {
    "vera": {"rank": 64},
    "full": {"targets": ("down_proj",), "layers": "last:4"},
    "shira": {"rank": 2, "layers": "last:8"},
    "oft": {"layers": "last:8"},
    "lora_xs": {"layers": "last:8"},
    "prefix": {"encoder": 0},
}
RATES = {
    "full": 1e-4,
    "ia3": 1e-2,
    "vera": 1e-2,
    "prompt": 3e-2,
    "ptuning": 1e-4,
    "prefix": 3e-2,
    "bitfit": 3e-3,
    "token_rows": 3e-3,
    "lora_xs": 1e-2,
}


def method(cell: Cell) -> Method:
    """The method of a cell at a size that trains in seconds."""
    known = METHODS[cell.kind].model_fields
    fields = {k: v for k, v in FEW.items() if k in known} | OWN.get(cell.kind, {})
    if cell.kind == "token_rows":
        fields = {"tokens": frequent_tokens()}
    if cell.way == "module":
        fields |= {"ia3": {"targets": ("k_proj", "v_proj", "down_proj")}}.get(cell.kind, {})
        fields |= {"bottleneck": {"modules": tuple(f"model.layers.{i}.mlp" for i in range(20, 30))}}.get(cell.kind, {})
    return parse({"kind": cell.kind, **fields})


@cache
def base(quantize: str | None) -> Base:
    return load_base("smollm2-135m", dtype="bfloat16", quantize=quantize)


@cache
def rows(name: str, count: int) -> Dataset:
    """The shortest rows of a file of the demo."""
    dataset = encode(load(EXAMPLES / f"jive.{name}.jsonl"), base(None).require_tokenizer(), max_length=256)
    return dataset.take(dataset.lengths.argsort(kind="stable")[:count].tolist())


def frequent_tokens() -> tuple[int, ...]:
    """The ids that stand in the training rows most often."""
    counts = torch.bincount(torch.from_numpy(rows("train", 100).tokens.astype("int64")))
    return tuple(sorted(counts.topk(64).indices.tolist()))


def native_losses(cell: Cell, folder: Path) -> tuple[float, float]:
    """Held-out loss before and after, through the training loop that users run."""
    on, held_out = base("nf4" if cell.weights == "NF4" else None), rows("eval", 12)
    config = TrainConfig(
        lr=RATES.get(cell.kind, 1e-3),
        epochs=9,
        max_steps=STEPS,
        tokens_per_step=64,
        eval_every=STEPS,
        save_every=STEPS,
    )
    spec = method(cell)
    events = list(run_task(on, Task(spec, config, rows("train", 100), held_out), folder))
    assert sum(isinstance(event, Step) for event in events) == STEPS
    [after] = [event.eval_loss for event in events if isinstance(event, Evaluation)]
    fresh = create(on, spec, torch.Generator().manual_seed(0))
    before = row_losses(on, held_out, bank_of(on, [lower(fresh, on)]), 0).mean
    assert after is not None
    return before, after


def module_losses(cell: Cell, model: Any) -> tuple[float, float]:
    """The same on a transformers model, with the plain loop that a user of `attach` writes."""
    spec = method(cell)
    handle = attach(model, create(ModuleSource(model), spec, torch.Generator().manual_seed(0)))
    try:
        before = _loss(model, rows("eval", 12))
        optimizer = torch.optim.AdamW(handle.parameters(), lr=RATES.get(cell.kind, 1e-3), weight_decay=0.0)
        train = rows("train", 100)
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATES.get(cell.kind, 1e-3) * (1 - step / STEPS)
            optimizer.zero_grad()
            _row_loss(model, train, step)[0].backward()
            torch.nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
            optimizer.step()
        return before, _loss(model, rows("eval", 12))
    finally:
        handle.detach()


@torch.no_grad()
def _loss(model: Any, dataset: Dataset) -> float:
    sums = [_row_loss(model, dataset, row) for row in range(len(dataset))]
    return float(sum(mean * weight for mean, weight in sums) / sum(weight for _, weight in sums))


def _row_loss(model: Any, dataset: Dataset, row: int) -> tuple[torch.Tensor, float]:
    """Mean loss of a row's labels, and their weight."""
    one = batch(dataset, [row], 0)
    scores = model(input_ids=one.tokens[None].long()).logits[0].float()
    nll = torch.nn.functional.cross_entropy(scores[one.labelled], one.labels[one.labelled].long(), reduction="none")
    weights = one.weights[one.labelled]
    return (nll * weights).sum() / weights.sum(), float(weights.sum())
