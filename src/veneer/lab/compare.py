"""Run a comparison of methods: every cell in its own process, one at a time, and go on where an earlier call was stopped.

A cell whose result is on disk with the same fingerprint is not run again. Results appear by atomic rename, so a kill at any
moment costs the cell that was running and nothing else.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from veneer import __version__
from veneer.errors import FormatError, TrainingError
from veneer.lab.plan import Cell, Comparison, final_cells, search_cells
from veneer.train.checkpoint import write_json

Watch = Callable[[Cell, int], None]
"""Told a cell and how many of its training tokens are done; all of them when it is finished or found on disk."""

T_95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093)  # fmt: skip
"""Student's t, two-sided 95 %, by degrees of freedom."""


@dataclass(frozen=True)
class Figure:
    """A mean over seeds with its 95 % interval (Student's t); one seed has the interval over held-out rows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One method of the comparison.

    rate      the best one of its grid; `edge` says on which end of the grid it lies: "", "lowest" or "highest"
    search    (rate, loss on the rows that choose; None where it diverged)
    figures   metric -> over seeds; changes: against the bare base
    failed    what the diverged trainings said
    """

    method: str
    fields: Mapping[str, Any]
    rate: float | None
    edge: str
    search: tuple[tuple[float, float | None], ...]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    changes: Mapping[str, Figure] = field(default_factory=dict)
    parameters: int = 0
    seconds_per_step: float = math.nan
    seconds_range: tuple[float, float] = (math.nan, math.nan)
    peak_bytes: int = 0
    seeds: int = 0
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """A finished comparison. `base` are the bare base's own figures on the same rows."""

    comparison: Comparison
    rows: tuple[Row, ...]
    base: Mapping[str, float]
    machine: Mapping[str, Any]


def run(comparison: Comparison, folder: Path, watch: Watch = lambda cell, tokens: None) -> Result:
    """Every cell that is not in `folder` yet, then the whole result."""
    searched = {cell: run_in_process(cell, folder, watch) for cell in search_cells(comparison)}
    best = best_rates(searched)
    finals = {cell: run_in_process(cell, folder, watch) for cell in final_cells(comparison, best)}
    rows = tuple(_row(comparison, name, searched, finals, best.get(name)) for name in comparison.methods)
    scored = [result["scores"] for result in finals.values() if "scores" in result]
    bare = {metric: found["base"]["value"] for metric, found in scored[0].items()} if scored else {}
    return Result(comparison, rows, bare, machine())


def total_tokens(comparison: Comparison) -> int:
    """Training tokens of all cells together."""
    rates = sum(len(entry.rates) for entry in comparison.methods.values())
    return rates * comparison.search_tokens + len(comparison.methods) * comparison.seeds * comparison.tokens


def best_rates(searched: Mapping[Cell, Mapping[str, Any]]) -> dict[str, float]:
    """Method -> the rate with the lowest loss; a method whose every training diverged has none."""
    best: dict[str, tuple[float, float]] = {}
    for cell, result in searched.items():
        if "loss" in result and (cell.method not in best or result["loss"] < best[cell.method][0]):
            best[cell.method] = (result["loss"], cell.rate)
    return {method: rate for method, (_, rate) in best.items()}


def run_in_process(cell: Cell, folder: Path, watch: Watch) -> dict[str, Any]:
    """The cell's result: from `folder`, or by running it in a process of its own."""
    place = folder / f"{cell.name}.json"
    found = _finished(place, cell)
    if found is None:
        watch(cell, 0)
        _spawn(cell, place, watch)
        found = _finished(place, cell)
    if found is None:
        raise FormatError(f"{place} does not hold the result of {cell.name}", help="delete it and run again")
    watch(cell, cell.tokens)
    return found


def _finished(place: Path, cell: Cell) -> dict[str, Any] | None:
    """What is there, if it is this very cell's."""
    try:
        found = json.loads(place.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("fingerprint") == cell.fingerprint else None


def _spawn(cell: Cell, place: Path, watch: Watch) -> None:
    with tempfile.TemporaryDirectory(prefix="veneer-cell-") as scratch:
        given, said = Path(scratch) / "cell.json", Path(scratch) / "stderr"
        write_json(given, cell.as_dict())
        command = [sys.executable, "-m", "veneer.lab.cell", str(given), str(place)]
        with (
            said.open("wb") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
        ):
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    told = json.loads(line)
                    if "error" in told:
                        raise TrainingError(f"{cell.name}: {told['error']}", help=told["help"])
                    watch(cell, min(int(told["tokens"]), cell.tokens))
                code = child.wait()
            finally:
                child.kill()
        if code != 0:
            lines = said.read_text("utf-8", "replace").strip().splitlines()
            raise TrainingError(
                f"{cell.name} ended with code {code}: {lines[-1] if lines else 'it said nothing'}",
                help="what is finished is kept; the same command goes on from there",
            )


def _row(
    comparison: Comparison,
    name: str,
    searched: Mapping[Cell, Mapping[str, Any]],
    finals: Mapping[Cell, Mapping[str, Any]],
    rate: float | None,
) -> Row:
    search = tuple((cell.rate, result.get("loss")) for cell, result in searched.items() if cell.method == name)
    fields = comparison.methods[name].method
    everything = [result for cells in (searched, finals) for cell, result in cells.items() if cell.method == name]
    failed = tuple(str(result["failed"]) for result in everything if "failed" in result)
    mine = [result for cell, result in finals.items() if cell.method == name and "scores" in result]
    if not mine or rate is None:
        return Row(name, fields, rate, _edge(search, rate), search, failed=failed)
    seconds = [result["seconds_per_step"] for result in mine]
    return Row(
        method=name,
        fields=fields,
        rate=rate,
        edge=_edge(search, rate),
        search=search,
        figures={m: over_seeds([r["scores"][m]["value"] for r in mine]) for m in mine[0]["scores"]},
        changes={m: over_seeds([r["scores"][m]["change"] for r in mine]) for m in mine[0]["scores"]},
        parameters=mine[0]["parameters"],
        seconds_per_step=median(seconds),
        seconds_range=(min(seconds), max(seconds)),
        peak_bytes=max(result["peak_bytes"] for result in mine),
        seeds=len(mine),
        failed=failed,
    )


def _edge(search: Sequence[tuple[float, float | None]], rate: float | None) -> str:
    """Where the best rate lies on its grid: a better one may lie beyond an end. A grid of one rate is all edge."""
    rates = [tried for tried, _ in search]
    if rate is None or rate not in (min(rates), max(rates)):
        return ""
    return "lowest" if rate == min(rates) else "highest"


def over_seeds(scores: Sequence[Mapping[str, float]]) -> Figure:
    """The mean over seeds and its 95 % interval."""
    values = [score["value"] for score in scores]
    if len(values) == 1:
        return Figure(values[0], scores[0]["low"], scores[0]["high"])
    half = T_95[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    return Figure(mean(values), mean(values) - half, mean(values) + half)


def machine() -> dict[str, Any]:
    """What the figures of time and memory hang on."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "capabilities": torch.backends.cpu.get_cpu_capability(),
        "veneer": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
