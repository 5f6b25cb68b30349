"""The same run in transformers + peft: from the same adapter, on the same rows, every loss agrees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tinylm
from veneer.data import Dataset, encode, load
from veneer.inject import create
from veneer.methods.lora import LoRA
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.train.checkpoint import Cursor
from veneer.train.config import TrainConfig
from veneer.train.events import Step
from veneer.train.loop import Run, fit
from veneer.train.optim import OPTIMIZERS, FlatParameters, rate_at
from veneer.train.schedule import plan_schedule

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")


def ours(base: Base, dataset: Dataset, spec: LoRA, config: TrainConfig, folder: Path) -> tuple[list[float], Any]:
    """Losses of our run, and its schedule. The starting adapter is saved in `folder`."""
    adapter = create(base, spec, torch.Generator().manual_seed(1))
    adapter.save(folder)
    parameters = FlatParameters(adapter, torch.device("cpu"))
    schedule = plan_schedule(dataset, config, config.tokens_per_pass)
    optimizer = OPTIMIZERS["adamw"](parameters, config, None)
    run = Run(base, parameters, optimizer, dataset, schedule, config, Cursor())
    events = fit(run, lambda run: (None, None), lambda run, best: None)
    return [e.loss for e in events if isinstance(e, Step)], schedule


def theirs(model: Any, dataset: Dataset, schedule: Any, config: TrainConfig, folder: Path) -> list[float]:
    """Losses of peft's model from the same adapter: one row at a time, summed, one update a step."""
    model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
    losses = []
    for step, passes in enumerate(schedule):
        rows = [dataset.row(row) for group in passes for row in group]
        weight = sum(float(w[1:].sum()) for _, w in rows)
        total = 0.0
        for tokens, weights in rows:
            ids = torch.from_numpy(tokens.astype("int64"))[None]
            scores = model(input_ids=ids).logits[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="none")
            loss = (nll * torch.from_numpy(weights[1:].copy())).sum() / weight
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, config.clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, len(schedule), config)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_every_loss_of_a_run_is_peft_s(tmp_path: Path, scaling: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = tinylm.folder(tmp_path / "base")
    base = load_base(str(folder), dtype="float32")
    assert base.tokenizer is not None
    dataset = encode(load(tinylm.chat_rows(tmp_path / "rows.jsonl", 40)), base.tokenizer, max_length=256)
    config = TrainConfig(lr=5e-3, epochs=10, max_steps=100, tokens_per_step=150, tokens_per_pass=100)
    spec = LoRA(rank=4, alpha=8, scaling=scaling)
    mine, schedule = ours(base, dataset, spec, config, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = theirs(model, dataset, schedule, config, tmp_path / "adapter")
    assert len(mine) == 100 and mine[-1] < mine[0] - 0.5
    assert mine == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_hundred_steps_on_the_real_base_are_peft_s(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from veneer.merge import write_checkpoint

    base = load_base("smollm2-135m", dtype="float32")
    assert base.tokenizer is not None
    write_checkpoint(base, tmp_path / "base")
    rows = load(Path(__file__).parents[2] / "examples/data/jive.train.jsonl")
    dataset = encode(rows, base.tokenizer, max_length=256)
    config = TrainConfig(lr=2e-4, epochs=2, max_steps=100, tokens_per_step=64, tokens_per_pass=64)
    mine, schedule = ours(base, dataset, LoRA(rank=8), config, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    expected = theirs(model, dataset, schedule, config, tmp_path / "adapter")
    assert mine == pytest.approx(expected, rel=1e-4)
