"""A run's losses and rates as TensorBoard events, beside `metrics.jsonl` and with its numbers.

    <run directory>/tensorboard/events.out.tfevents.*       `tensorboard --logdir runs` shows every run below `runs`

Optional: `train.tensorboard: true`. tensorboardX writes them, which needs neither TensorFlow nor TensorBoard. A resumed
run writes a new file whose first event takes back the steps after the checkpoint; TensorBoard hides them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import NotFound
from veneer.train.events import Evaluation, Event, Step

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

FOLDER = "tensorboard"
SHOWN = ("loss", "lr", "grad_norm", "tokens_per_second", "peak_bytes")


def require() -> None:
    """Refuse where the writer is not installed. Ask before anything long begins."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise NotFound(
            "train.tensorboard needs the Python package tensorboardX",
            help="pip install 'veneer[tensorboard]', or leave train.tensorboard out: metrics.jsonl has the same numbers",
        )


@contextmanager
def watching(folder: Path, done: int) -> Iterator[Board]:
    """A board in the run directory `folder`, of a run that has `done` optimiser steps behind it."""
    from tensorboardX import SummaryWriter

    own_name = f".{done:08d}"  # files are called by the second, and a resumed run must not write over the one before
    where = str(folder / FOLDER)
    with SummaryWriter(where, purge_step=done + 1, flush_secs=10, filename_suffix=own_name) as writer:
        yield Board(writer)


class Board:
    """Renders events as scalars over optimiser steps."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def record(self, event: Event) -> None:
        """The numbers of a step as `train/...`, of an evaluation as `eval/...`; other events have none."""
        if isinstance(event, Step):
            self._add(event.step, {f"train/{name}": getattr(event, name) for name in SHOWN})
        elif isinstance(event, Evaluation):
            self._add(event.step, {"eval/loss": event.eval_loss, "eval/general_loss": event.general_loss})

    def _add(self, step: int, values: dict[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
