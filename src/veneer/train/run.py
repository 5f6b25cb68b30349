"""A run: one folder that holds everything about one training, from the resolved configuration to the report.

    config.yaml       resolved, each value with its origin
    adapter/ last/    the best adapter (the last where there is no held-out data), and the last
    metrics.jsonl     one object per optimiser step
    checkpoint/       exact resume
    provenance.json   base identity, data hashes, versions, dtype, threads
    tensorboard/      the metrics as events, where they are asked for
    report.md         the run in one page, with plots

Every file appears by atomic rename. One run per folder at a time: a lock says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from veneer import __version__
from veneer.adapter import Adapter, Provenance
from veneer.data import Dataset
from veneer.diagnose import probed
from veneer.errors import Conflict, ResourceError
from veneer.evaluate.loss import row_losses
from veneer.files import sweep
from veneer.inject.create import create
from veneer.methods import Method
from veneer.models.bank import Dropout
from veneer.models.base import Base
from veneer.ops.scratch import keep_freed_memory
from veneer.train import checkpoint, tensorboard
from veneer.train.calibrate import begins_with_general_text, calibrate, spread
from veneer.train.checkpoint import Cursor, write_bytes, write_json
from veneer.train.config import Resolved, TrainConfig
from veneer.train.events import Evaluation, Event, Preflight, Step
from veneer.train.loop import Run, fit
from veneer.train.lots import Progress
from veneer.train.memory import Fit, dropout_of, fit_memory
from veneer.train.optim import FlatParameters
from veneer.train.optimizers import load_all as load_optimizers
from veneer.train.preflight import preflight
from veneer.train.schedule import plan_schedule

LOCK = ".lock"


@dataclass(frozen=True, eq=False)
class Task:
    """What is trained on what: plain values, no file names. `looking` is told the share of the calibration that is done."""

    spec: Method
    config: TrainConfig
    dataset: Dataset
    held_out: Dataset | None = None
    general: Dataset | None = None
    resolved: Resolved | None = None
    notes: tuple[str, ...] = ()
    looking: Progress = lambda share: None


def run_task(
    base: Base,
    task: Task,
    folder: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train `task` on `base` into `folder`, yielding events. The adapter is then in `folder/adapter`."""
    if task.config.tensorboard:
        tensorboard.require()
    keep_freed_memory()
    with locked(folder):
        sweep(folder)
        sweep(folder / "checkpoint")
        yield from _run_locked(base, task, folder, resume, should_stop)


def _run_locked(base: Base, task: Task, folder: Path, resume: bool, should_stop: Callable[[], bool]) -> Iterator[Event]:
    saved = folder / "checkpoint"
    if not resume and ((folder / "adapter").exists() or checkpoint.exists(saved)):
        raise Conflict(f"{folder} already holds a run", help="go on with --resume, or choose another --out")
    if resume and (folder / "last").exists() and not checkpoint.exists(saved):
        raise Conflict(
            f"{folder} holds a run whose checkpoint is gone: going on would begin at step 0, over its adapter",
            help=f"put {saved} back, or choose another --out to begin anew",
        )
    sizes = fit_memory(base, task.spec, task.config, task.dataset)
    run, generators = _prepare(base, task, sizes, folder)
    mark = fingerprint(base, task)
    if resume and checkpoint.exists(saved):
        run.cursor = checkpoint.read(saved, run.parameters, run.optimizer, generators, mark, run.regime)
    run.cursor.fingerprint = mark
    notes = task.notes
    if resume and not run.cursor.step:
        notes = (*notes, f"there is nothing to resume in {folder}: the run begins at step 0")
    ready = preflight(base, task.spec, task.dataset, run, sizes, notes)
    yield ready
    writer = _Writer(folder, base, task, generators, sizes.tokens_per_pass)
    writer.begin(run, ready)
    board = tensorboard.watching(folder, run.cursor.step) if task.config.tensorboard else nullcontext()
    with board as shown:
        for event in fit(run, writer.evaluate, writer.save, should_stop=should_stop, dump=folder):
            writer.record(event)
            if shown is not None:
                shown.record(event)
            yield event
    writer.end(run)


def _prepare(base: Base, task: Task, sizes: Fit, folder: Path) -> tuple[Run, dict[str, torch.Generator]]:
    """The run at its start. The seed covers the adapter's init, dropout and, by the schedule, the order of the data."""
    generators = {name: torch.Generator() for name in ("init", "dropout")}
    for offset, generator in enumerate(generators.values()):
        generator.manual_seed(task.config.seed * 1009 + offset)
    stats = calibrate(base, task.spec, task.dataset, task.config.seed, task.looking, task.general)
    spec = spread(task.spec, stats)
    spec = spec if base.tokenizer is None else spec.prepared(base.tokenizer.encode)
    adapter = create(base, spec, generators["init"], stats=stats, provenance=provenance(base, task))
    parameters = FlatParameters(adapter, base.decoder.device)
    optimizer = load_optimizers()[task.config.optimizer](parameters, task.config, folder / "state")
    rate = dropout_of(task.spec)
    dropout = Dropout(rate, generators["dropout"]) if rate else None
    schedule = plan_schedule(task.dataset, task.config, sizes.tokens_per_pass)
    regime = spec.regime(len(schedule))
    run = Run(
        base, parameters, optimizer, task.dataset, schedule, task.config, Cursor(), dropout, sizes.recompute, regime
    )
    return run, generators


def provenance(base: Base, task: Task) -> Provenance:
    """Where the adapter of this task comes from."""
    return Provenance(
        base=base.identity,
        base_name=base.name,
        trained_on=base.precision,
        data=task.dataset.sha256,
        chat_template=None if base.tokenizer is None else base.tokenizer.template,
    )


def fingerprint(base: Base, task: Task) -> str:
    """SHA-256 of everything that decides the numbers of a run."""
    free = {"save_every", "memory", "tensorboard"}
    start = task.general if begins_with_general_text(task.spec) else None
    decisive = {
        "method": {"kind": task.spec.kind} | task.spec.model_dump(mode="json"),
        "train": {k: v for k, v in task.config.model_dump(mode="json").items() if k not in free},
        "data": [content_digest(d) for d in (task.dataset, task.held_out, start) if d is not None],
        "base": base.identity,
        "dtype": str(base.dtype),
        "quantize": base.quantize,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def content_digest(dataset: Dataset) -> str:
    """SHA-256 of the tokens and weights that are trained on, whatever file they came from."""
    digest = hashlib.sha256()
    for array in (dataset.tokens, dataset.weights, dataset.offsets):
        digest.update(array.tobytes())
    return digest.hexdigest()


class _Writer:
    """Puts a run's events and adapters into its folder."""

    def __init__(
        self, folder: Path, base: Base, task: Task, generators: dict[str, torch.Generator], tokens_per_pass: int
    ) -> None:
        self.folder, self.base, self.task, self.generators = folder, base, task, generators
        self.tokens_per_pass = tokens_per_pass
        self.metrics = folder / "metrics.jsonl"
        self.pending: dict[str, Any] | None = None

    def begin(self, run: Run, ready: Preflight) -> None:
        """The files that exist before the first step; metrics of steps after the checkpoint are dropped."""
        if self.task.resolved is not None:
            write_bytes(self.folder / "config.yaml", self.task.resolved.to_yaml().encode())
        write_json(self.folder / "provenance.json", self._provenance(ready))
        kept = _lines_up_to(self.metrics, run.cursor.step)
        write_bytes(self.metrics, "".join(f"{line}\n" for line in kept).encode())

    def evaluate(self, run: Run) -> tuple[float | None, float | None]:
        """Held-out loss and general loss of the run as it is, in passes for which there is memory."""
        bank = run.frozen_bank()

        def mean(dataset: Dataset | None) -> float | None:
            if dataset is None:
                return None
            return row_losses(self.base, dataset, bank, 0, tokens_per_pass=self.tokens_per_pass).mean

        return mean(self.task.held_out), mean(self.task.general)

    def save(self, run: Run, is_best: bool) -> None:
        """The best adapter, or a checkpoint with the last one."""
        adapter = self._adapter(run)
        if is_best or (self.task.held_out is None):
            adapter.save(self.folder / "adapter")
        if not is_best:
            self._flush()  # a step that is not in the metrics must not be in the checkpoint, which would never do it again
            checkpoint.write(
                self.folder / "checkpoint", run.cursor, run.parameters, run.optimizer, self.generators, run.regime
            )
            adapter.save(self.folder / "last")  # after it: where there is a last adapter, there was a checkpoint

    def record(self, event: Event) -> None:
        """One line of metrics per step; an evaluation joins the step it follows."""
        if isinstance(event, Step):
            self._flush()
            self.pending = {k: v for k, v in asdict(event).items() if k != "total"}
        elif isinstance(event, Evaluation) and self.pending is not None:
            self.pending |= {"eval_loss": event.eval_loss, "general_loss": event.general_loss}
            self._flush()

    def end(self, run: Run) -> None:
        self._flush()
        if not (self.folder / "adapter").exists():
            self._adapter(run).save(self.folder / "adapter")

    def _flush(self) -> None:
        if self.pending is None:
            return
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.pending) + "\n")
        except OSError as error:
            raise ResourceError(
                f"{self.metrics} could not be written: {error.strerror}", help="free some space, then run with --resume"
            ) from error
        self.pending = None

    def _adapter(self, run: Run) -> Adapter:
        snapshot = run.parameters.snapshot()
        adapter = cast(Method, snapshot.spec).folded(snapshot)
        samples = {t: self.base.samples(t) for t in adapter.targets if t in self.base.shape.hosts}
        return probed(replace(adapter, provenance=replace(adapter.provenance, base_samples=samples)), self.base)

    def _provenance(self, ready: Preflight) -> dict[str, Any]:
        return {
            "veneer": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "dtype": ready.dtype,
            "base": {"name": self.base.name, "identity": self.base.identity},
            "data": {
                name: dataset.sha256
                for name, dataset in (
                    ("train", self.task.dataset),
                    ("eval", self.task.held_out),
                    ("general", self.task.general),
                )
                if dataset is not None
            },
            "fingerprint": fingerprint(self.base, self.task),
        }


def _lines_up_to(metrics: Path, step: int) -> list[str]:
    """The lines of the first `step` steps. A kill or a full disk may have left the last line torn."""
    kept: list[str] = []
    for line in metrics.read_text("utf-8").splitlines() if metrics.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            break
    return kept


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; a second run in it is refused. A run that was refused leaves nothing behind."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    before = set() if made else {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be used for a run: {error.strerror}", help="choose a folder you can write to with --out"
        ) from error
    try:
        if not _hold(handle, folder / LOCK):
            raise Conflict(f"another run is working in {folder}", help="wait for it, or choose another --out")
        try:
            yield
        finally:
            if LOCK not in before and set(os.listdir(folder)) == before | {LOCK}:
                _take_back(folder, made)
    finally:
        os.close(handle)


def _hold(handle: int, path: Path) -> bool:
    """Whether this process has the lock now, and the file is still the one that others would lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return path.exists() and os.path.samestat(os.fstat(handle), path.stat())


def _take_back(folder: Path, made: list[Path]) -> None:
    """Delete what was made for a run that was refused, the innermost first. Folders that others use by now stay."""
    (folder / LOCK).unlink()
    for place in made:
        try:
            place.rmdir()
        except OSError:
            return
