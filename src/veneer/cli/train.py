"""Train an adapter from a run file; the run directory holds everything.

A run file names a base, data, a method and where the run goes:

    base: smollm2-135m
    data: {train: train.jsonl, eval: eval.jsonl}
    method: {kind: lora, rank: 16}
    out: runs/tickets

Then:

    veneer train tickets.yaml --set train.lr=1e-4

Data paths are relative to the run file, `out` to where the command runs. Every key with its default:

    base:                       # a catalogue name, a folder, a .gguf file or a hub id
    quantize: null              # nf4, nf4-dq, bof4-s, int8, bf12
    data:
      train:                    # rows to learn: .jsonl, .json, .csv or .parquet
      eval: null                # held-out rows of the same task: the best adapter is chosen by them
      general: null             # text of another kind: what tuning costs elsewhere
      format: auto              # messages, conversations, alpaca, prompt/completion, text
      train_on: assistant       # last, all
    method:
      kind: lora                # each kind has keys of its own; these are LoRA's
      rank: 16
      alpha: 32
      scaling: alpha/r          # alpha/sqrt(r)
      targets: all-linear       # names, patterns; `veneer plan --config FILE` shows what they match
      dropout: 0.0
      init: default
    train:
      epochs: 2.0
      max_steps: null           # stop after so many optimiser steps
      lr: 2e-4
      schedule: linear          # cosine, constant
      warmup: 0.03              # share of the steps
      tokens_per_step: 8192
      tokens_per_pass: auto     # micro-batch in tokens
      memory: auto              # byte budget of the process
      max_length: 1024          # longest row in tokens
      on_too_long: error        # truncate, drop
      optimizer: adamw
      lora_plus_ratio: 1.0      # learning rate of B over that of A
      weight_decay: 0.0
      clip: 1.0                 # largest gradient norm, or null
      seed: 0
      eval_every: 50            # optimiser steps
      save_every: 50
      patience: null            # stop after so many evaluations without a better one
      dtype: auto               # float32, bfloat16
      recompute: auto           # none, all
      tensorboard: false        # also write events for TensorBoard into the run directory
    out:                        # the run directory

A list under `runs` trains several adapters over one base in memory, taking turns. Ctrl+C saves a
checkpoint after the current step; --resume goes on from it, bit for bit.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli._options import Json
from veneer.cli._output import bytes_text, count_text, note, say, say_json, say_table
from veneer.errors import VeneerError

if TYPE_CHECKING:
    from rich.progress import Progress

    from veneer.train import Event, Preflight
    from veneer.train.config import Resolved


def command(
    config: Annotated[Path, typer.Argument(help="The run file.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one value.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run directory, in place of the file's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    from veneer.train import read_runs

    runs = read_runs(config, settings or [], out)
    ended = run(runs, resume=resume, quiet=as_json)
    if as_json:
        say_json([{"out": str(e.out), "adapter": str(e.out / "adapter"), "ended": e.reason} for e in ended])
    for one in ended if not as_json else ():
        if one.reason.startswith("failed"):
            say(f"{one.out}: {one.reason}")
        else:
            say(f"{one.reason}: the adapter is in {one.out / 'adapter'}, the report in {one.out / 'report.md'}")
    if any(one.reason == "stopped" for one in ended):
        note("help: the same command with --resume goes on from here, bit for bit")
    if any(one.reason != "done" and one.reason != "patience" for one in ended):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Ended:
    """How one run ended: "done", "patience", "stopped" or "failed: ..."."""

    out: Path
    reason: str


def run(runs: list[Resolved], *, resume: bool, quiet: bool) -> list[Ended]:
    """Train what a run file says, with a progress bar on standard error for each run."""
    from veneer.data import file_digest
    from veneer.models.load import load_base
    from veneer.train import Failed, Finished, Preflight, read_task, run_many, tensorboard
    from veneer.train.report import write_report

    first = runs[0].config
    for path in dict.fromkeys(path for r in runs for path in r.config.data.files()):
        file_digest(path)  # what is missing is said before a base is fetched
    if any(r.config.train.tensorboard for r in runs):
        tensorboard.require()
    base = load_base(first.base, dtype=first.train.dtype, quantize=first.quantize)
    tasks = {str(r.config.out): (read_task(base, r), r.config.out) for r in runs}
    reasons: dict[str, str] = {}
    with stop_flag() as should_stop, progress(list(tasks)) as show:
        tasks = {n: (replace(task, looking=partial(show.calibration, n)), out) for n, (task, out) in tasks.items()}
        for name, event in run_many(base, tasks, resume=resume, should_stop=should_stop):
            if isinstance(event, Preflight) and not quiet:
                show_preflight(event, name if len(runs) > 1 else "")
            if isinstance(event, Failed):
                if len(runs) == 1:
                    raise event.error
                reasons[name] = f"failed: {_told(event.error)}"
            else:
                reasons[name] = event.reason if isinstance(event, Finished) else reasons.get(name, "")
                show(name, event)
    for name in tasks:
        if not reasons[name].startswith("failed"):
            write_report(Path(name))
    return [Ended(Path(name), reasons[name]) for name in tasks]


def _told(error: Exception) -> str:
    """Why one of several runs failed."""
    if isinstance(error, VeneerError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error} (a defect in veneer; this run alone, with --debug, shows where)"


@contextmanager
def stop_flag() -> Iterator[Stop]:
    """Turns Ctrl+C and a polite kill into a request to stop after the step; the second Ctrl+C acts at once."""
    flag = Stop()
    old = {number: signal.signal(number, flag.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Stop:
    """Whether the user asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        note("stopping after this step; once more to stop at once")


def show_preflight(event: Preflight, name: str) -> None:
    """Parameters, memory, steps and warnings, before the first step."""
    if name:
        say(name)
    say_table(("targets", "where", "parameters"), [(e, w, count_text(n)) for e, w, n in event.targets])
    memory = ", ".join(f"{name} {bytes_text(size)}" for name, size in event.memory.items())
    share = event.trained_parameters / max(1, event.base_parameters)
    say(f"trains {count_text(event.trained_parameters)} parameters ({share:.2%} of the base) in {event.dtype}")
    say(f"{event.rows:,} rows, {event.tokens:,} tokens, {event.label_share:.1%} of them learned; {event.steps} steps")
    say(f"memory: {memory}")
    for warning in event.warnings:
        say(f"warning: {warning}")


@contextmanager
def progress(names: list[str]) -> Iterator[Show]:
    """A bar for each run with loss, speed, memory and the time left, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("held out {task.fields[held_out]}"),
        TextColumn("{task.fields[rate]:.0f} tok/s"),
        TextColumn("{task.fields[memory]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield Show(bar, names)


class Show:
    """Renders events on progress bars."""

    def __init__(self, bar: Progress, names: list[str]) -> None:
        self.bar = bar
        self.ids = {
            n: bar.add_task(
                Path(n).name if len(names) > 1 else "train",
                total=None,
                loss=float("nan"),
                held_out="-",
                rate=0.0,
                memory="",
                visible=False,
            )
            for n in names
        }

    def calibration(self, name: str, share: float) -> None:
        """A data-driven start looks at the data before the first step."""
        self.bar.update(self.ids[name], total=100, completed=round(100 * share), visible=True)

    def __call__(self, name: str, event: Event) -> None:
        from veneer.train import Evaluation, Step

        if isinstance(event, Step):
            self.bar.update(
                self.ids[name],
                total=event.total,
                completed=event.step,
                loss=event.loss,
                rate=event.tokens_per_second,
                memory=bytes_text(event.peak_bytes),
                visible=True,
            )
        elif isinstance(event, Evaluation) and event.eval_loss is not None:
            self.bar.update(self.ids[name], held_out=f"{event.eval_loss:.3f}")
