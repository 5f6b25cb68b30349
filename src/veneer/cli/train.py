"""Train an adapter from a run file; the run directory holds everything.

A run file names a base, data, a method and where the run goes:

    base: smollm2-135m
    data: {train: train.jsonl, eval: eval.jsonl}
    method: {kind: lora, rank: 16}
    out: runs/tickets

Then:

    veneer train tickets.yaml --set train.lr=1e-4

Ctrl+C saves a checkpoint after the current step; --resume goes on from it, bit for bit.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli._options import Json
from veneer.cli._output import bytes_text, count_text, note, say, say_json, say_table

if TYPE_CHECKING:
    from veneer.train import Event, Preflight
    from veneer.train.config import Resolved


def command(
    config: Annotated[Path, typer.Argument(help="The run file.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one value.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run directory, in place of the file's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    from veneer.train import read_config

    resolved = read_config(config, settings or [], out)
    folder, reason = run(resolved, resume=resume, quiet=as_json)
    if as_json:
        say_json({"out": str(folder), "adapter": str(folder / "adapter"), "ended": reason})
    else:
        say(f"{reason}: the adapter is in {folder / 'adapter'}, the report in {folder / 'report.md'}")
    if reason == "stopped":
        note("stopped on request; go on with --resume")
        raise typer.Exit(1)


def run(resolved: Resolved, *, resume: bool, quiet: bool) -> tuple[Path, str]:
    """Train what a run file says, with a progress bar on standard error. Returns the folder and why it ended."""
    from veneer.models.load import load_base
    from veneer.train import Finished, Preflight, read_task, run_task
    from veneer.train.report import write_report

    config = resolved.config
    base = load_base(config.base, dtype=config.train.dtype, quantize=config.quantize)
    task = read_task(base, resolved)
    reason = "done"
    with stop_flag() as should_stop, progress() as show:
        for event in run_task(base, task, config.out, resume=resume, should_stop=should_stop):
            if isinstance(event, Preflight) and not quiet:
                show_preflight(event)
            if isinstance(event, Finished):
                reason = event.reason
            show(event)
    write_report(config.out)
    return config.out, reason


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


def show_preflight(event: Preflight) -> None:
    """Parameters, memory, steps and warnings, before the first step."""
    say_table(("targets", "where", "parameters"), [(e, w, count_text(n)) for e, w, n in event.targets])
    memory = ", ".join(f"{name} {bytes_text(size)}" for name, size in event.memory.items())
    share = event.trained_parameters / max(1, event.base_parameters)
    say(f"trains {count_text(event.trained_parameters)} parameters ({share:.2%} of the base) in {event.dtype}")
    say(f"{event.rows:,} rows, {event.tokens:,} tokens, {event.label_share:.1%} of them learned; {event.steps} steps")
    say(f"memory: {memory}")
    for warning in event.warnings:
        say(f"warning: {warning}")


@contextmanager
def progress() -> Iterator[Show]:
    """A bar with loss, speed, memory and the time left, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("held out {task.fields[held_out]}"),
        TextColumn("{task.fields[rate]:.0f} tok/s"),
        TextColumn("{task.fields[memory]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield Show(bar)


class Show:
    """Renders events on a progress bar."""

    def __init__(self, bar: object) -> None:
        from rich.progress import Progress

        assert isinstance(bar, Progress)
        self.bar = bar
        self.id = bar.add_task("train", total=None, loss=float("nan"), held_out="-", rate=0.0, memory="")

    def __call__(self, event: Event) -> None:
        from veneer.train import Evaluation, Step

        if isinstance(event, Step):
            self.bar.update(
                self.id,
                total=event.total,
                completed=event.step,
                loss=event.loss,
                rate=event.tokens_per_second,
                memory=bytes_text(event.peak_bytes),
            )
        elif isinstance(event, Evaluation) and event.eval_loss is not None:
            self.bar.update(self.id, held_out=f"{event.eval_loss:.3f}")
