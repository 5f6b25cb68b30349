"""One run twice, from one adapter on the same rows: ours, and transformers + peft in plain torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from veneer.data import Dataset
from veneer.inject import create
from veneer.methods.lora import LoRA
from veneer.models.base import Base
from veneer.train.checkpoint import Cursor
from veneer.train.config import TrainConfig
from veneer.train.events import Step
from veneer.train.loop import Run, fit
from veneer.train.optim import FlatParameters, rate_at
from veneer.train.optimizers import load_all
from veneer.train.schedule import plan_schedule


def ours(
    base: Base, dataset: Dataset, spec: LoRA, config: TrainConfig, folder: Path, seed: int = 1
) -> tuple[list[float], Any]:
    """Losses of our run, and its schedule. The starting adapter is saved in `folder`."""
    adapter = create(base, spec, torch.Generator().manual_seed(seed))
    adapter.save(folder)
    parameters = FlatParameters(adapter, torch.device("cpu"))
    schedule = plan_schedule(dataset, config, config.tokens_per_pass)
    optimizer = load_all()["adamw"](parameters, config, None)
    run = Run(base, parameters, optimizer, dataset, schedule, config, Cursor())
    events = fit(run, lambda run: (None, None), lambda run, best: None)
    return [e.loss for e in events if isinstance(e, Step)], schedule


def theirs(model: Any, dataset: Dataset, schedule: Any, config: TrainConfig, folder: Path) -> list[float]:
    """Losses of peft's model from the same adapter: one row at a time, summed, one update a step."""
    import peft

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
