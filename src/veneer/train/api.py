"""From data files and a method to an adapter, in one call."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.adapter import Adapter
from veneer.data import Dataset, leaks, prepare
from veneer.errors import Unsupported
from veneer.methods import Method
from veneer.methods.lora import LoRA
from veneer.models.base import Base
from veneer.train.config import DataConfig, Resolved, RunConfig, TrainConfig, validate
from veneer.train.events import Event
from veneer.train.report import write_report
from veneer.train.run import Task, run_task

PathLike = str | os.PathLike[str]


def train(
    base: Base,
    data: PathLike,
    *,
    method: Method | None = None,
    out: PathLike,
    eval: PathLike | None = None,
    general: PathLike | None = None,
    format: str = "auto",
    resume: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    **settings: Any,
) -> Adapter:
    """Train an adapter on `base` and return the best one; the run folder `out` holds everything else.

    data, eval, general  files of rows: to train on, held out, and general text
    method               an instance such as `LoRA(rank=8)`; LoRA's defaults if left out
    settings             fields of `TrainConfig`: epochs, lr, seed, max_length, ...
    on_event             called with every event of the run
    """
    spec = method or LoRA()
    values = {
        "base": base.name,
        "quantize": base.quantize,
        "data": {"train": str(data), "format": format}
        | {k: str(v) for k, v in (("eval", eval), ("general", general)) if v is not None},
        "method": {"kind": spec.kind} | spec.model_dump(mode="json"),
        "train": settings,
        "out": str(out),
    }
    resolved = Resolved(validate(RunConfig, values, "the call to train"), {})
    task = read_task(base, resolved)
    folder = Path(out)
    for event in run_task(base, task, folder, resume=resume):
        on_event(event)
    write_report(folder)
    return Adapter.load(folder / "adapter")


def read_task(base: Base, resolved: Resolved) -> Task:
    """Read and encode everything a run needs; notes carry leaks between training and held-out rows."""
    config = resolved.config
    spec = config.spec()
    dataset = read_data(base, config.data.train, config.data, config.train)
    held_out = None if config.data.eval is None else read_data(base, config.data.eval, config.data, config.train)
    general = None
    if config.data.general is not None:
        general = read_data(base, config.data.general, config.data, config.train, is_general=True)
    notes = tuple(f"{held_out.name}: {text}" for text in leaks(dataset, held_out).warnings()) if held_out else ()
    return Task(spec, config.train, dataset, held_out, general, resolved, notes)


def read_data(base: Base, path: Path, data: DataConfig, config: TrainConfig, *, is_general: bool = False) -> Dataset:
    """One file as tokens. Held-out general text finds its own format and drops what is too long."""
    if base.tokenizer is None:
        raise Unsupported(
            f"base '{base.name}' has no tokenizer, so text can't be read", help="add tokenizer.json to its folder"
        )
    return prepare(
        path,
        base.tokenizer,
        format="auto" if is_general else data.format,
        max_length=config.max_length,
        on_too_long="drop" if is_general else config.on_too_long,
        train_on=data.train_on,
    )
