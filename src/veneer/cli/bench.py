"""Run the project's benchmarks: ratios against other tools and against the machine, in one run.

    veneer bench train

These scripts live in a checkout of the project (`benchmarks/`), with the results that were committed; an installed package has
none. The first run makes an environment for the other tools.

`veneer bench methods` compares methods on a task: each at five learning rates with few tokens, then at the best rate with more
tokens and several seeds; every training is a process of its own. It prints and keeps a table, a figure and all numbers
(methods.md, .png, .json). What is finished is kept: after a stop or a kill the same command goes on. On own rows:

    veneer bench methods --config compare.yaml --methods lora,full --tokens 20000 --seeds 2

    base: smollm2-135m
    data: {train: train.jsonl, eval: eval.jsonl, general: general.jsonl}
    methods:                    # by any name, in place of the eight that are compared without a file
      lora: {method: {kind: lora, rank: 16}, rates: [1e-4, 3e-4, 1e-3]}
      full: {method: {kind: full, layers: last:4}, rates: [1e-5, 3e-5, 1e-4]}
    search_tokens: 15000        # for each rate
    tokens: 40000               # for each seed at the best rate
    seeds: 3
    answers: 40                 # held-out questions that are answered in words
    train: {tokens_per_step: 512, max_length: 512}    # as in a run file

A third of `eval` chooses the rate, the figures are of the rest. A best rate at the edge of its grid is flagged: a better one may
lie beyond.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli._options import Json
from veneer.cli._output import note, say, say_json, say_table
from veneer.errors import ConfigError, NotFound
from veneer.registry import did_you_mean

if TYPE_CHECKING:
    from veneer.lab.compare import Watch
    from veneer.lab.plan import Cell, Comparison

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "benchmarks"
METHODS = "methods"


def command(
    name: Annotated[str | None, typer.Argument(help="Which one; without a name, the list.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="For methods: a YAML file with the comparison.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="For methods: change one value.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="A,B", help="For methods: only these of the comparison.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="For methods: training tokens for each seed.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="For methods: trainings at the best rate.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="For methods: where the results go; by default runs/bench-methods.", show_default=False
        ),
    ] = None,
    cells: Annotated[
        Path | None,
        typer.Option("--cells", help="For methods: where finished trainings are kept; by default OUT/cells."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", metavar="DIR", help="For train: keep Chrome traces of one step there.")
    ] = None,
    as_json: Json = False,
) -> None:
    if profile is not None and name != "train":
        raise ConfigError("--profile: only `veneer bench train` takes this", help="leave it out")
    if name == METHODS:
        wanted = [f"tokens={tokens}"] if tokens is not None else []
        wanted += [f"seeds={seeds}"] if seeds is not None else []
        folder = out or Path("runs/bench-methods")
        names = None if methods is None else [n.strip() for n in methods.split(",")]
        _compare(_comparison(config, [*(settings or []), *wanted], names), folder, cells or folder / "cells", as_json)
        return
    given = {"--config": config, "--set": settings, "--methods": methods, "--tokens": tokens, "--seeds": seeds}
    given |= {"--out": out, "--cells": cells}
    wrong = [option for option, value in given.items() if value is not None]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: only `veneer bench {METHODS}` takes this", help="leave it out")
    _scripts(name, [] if profile is None else ["--profile", str(profile.resolve())], as_json)


def _comparison(config: Path | None, settings: list[str], names: list[str] | None) -> Comparison:
    from veneer.lab.plan import read

    examples = ROOT / "examples" / "data"
    if config is None and not examples.is_dir() and not any(s.startswith("data") for s in settings):
        raise NotFound(
            f"there is no demo data at {examples}", help="give your own with --config; `veneer bench --help` shows how"
        )
    comparison = read(config, settings, examples)
    return comparison if names is None else comparison.only(names)


def _compare(comparison: Comparison, out: Path, cells: Path, as_json: bool) -> None:
    """Run a comparison with a bar, keep and print its results."""
    from veneer.lab import compare, page

    with _bar(compare.total_tokens(comparison)) as watch:
        try:
            result = compare.run(comparison, cells, watch)
        except KeyboardInterrupt:
            note("stopped; the same command goes on from what is finished")
            raise typer.Exit(1) from None
    written = page.write(result, out, shlex.join(["veneer", *sys.argv[1:]]))
    if as_json:
        say_json(page.document(result))
        return
    say_table(*page.columns(result))
    for flag in page.flags(result):
        say(f"note: {flag}")
    say(f"written: {', '.join(str(path) for path in written)}")


@contextmanager
def _bar(total: int) -> Iterator[Watch]:
    """Training tokens of all cells, with the time left, on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    done: dict[str, int] = {}
    found = 0
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=900) as bar:
        line = bar.add_task("methods", total=total)

        def watch(cell: Cell, tokens: int) -> None:
            nonlocal found
            if (
                cell.name not in done and tokens
            ):  # kept from an earlier call: it says nothing about the speed of this one
                found += tokens
            else:
                done[cell.name] = tokens
            bar.update(line, total=total - found, completed=sum(done.values()), description=cell.name)

        yield watch


def _scripts(name: str | None, arguments: list[str], as_json: bool) -> None:
    """The scripts of a checkout: the list, or one of them."""
    known = _benchmarks()
    if name is None:
        if as_json:
            say_json(known)
        else:
            say_table(("benchmark", "measures"), list(known.items()))
        return
    if name not in known and not (FOLDER / "run.py").is_file():
        raise NotFound(
            f"there are no benchmarks at {FOLDER}, only `veneer bench {METHODS}` works without them",
            help="run this from a checkout of the project, where `make setup` was run",
        )
    if name not in known:
        raise NotFound(f"no benchmark is called '{name}'", help=did_you_mean(name, list(known)))
    extra = ["--", *arguments] if arguments else []
    done = subprocess.run([sys.executable, str(FOLDER / "run.py"), name, *extra], check=False)
    results = FOLDER / "results" / f"{name}.json"
    if done.returncode == 0 and as_json and results.is_file():
        sys.stdout.write(results.read_text())
    raise typer.Exit(min(done.returncode, 1))


def _benchmarks() -> dict[str, str]:
    """Name -> the first line of its script."""
    known = {METHODS: "Methods compared on one task: loss, forgetting, size, time and memory. About an hour."}
    if (FOLDER / "run.py").is_file():
        scripts = (p for p in sorted(FOLDER.glob("[!_]*.py")) if p.stem != "run" and not p.stem.endswith("_veneer"))
        known |= {p.stem: p.read_text().splitlines()[0].strip('"') for p in scripts}
    return known
