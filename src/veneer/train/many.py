"""Several runs over one base in memory: they take turns step by step and share nothing but the base.

A run file with a list under `runs` declares them; every entry is laid over the keys beside the list. Each run has its own data,
method, optimiser, seed and folder, and is bitwise what it would be alone, since no product ever mixes two of them. Memory
grows by an adapter's own state only. A run that fails stops alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer import yaml_file
from veneer.errors import ConfigError
from veneer.models.base import Base
from veneer.train.config import RUN_FILE, Resolved, RunConfig, apply_override, leaves, resolve_paths, validate
from veneer.train.events import Event
from veneer.train.run import Task, run_task


@dataclass(frozen=True)
class Failed:
    """A run that stopped with an error; the others go on."""

    error: Exception


def read_runs(path: Path, overrides: Sequence[str] = (), out: Path | None = None) -> list[Resolved]:
    """The runs of a file: one, or as many as its `runs` list has entries. They must agree on base, quantize and dtype."""
    values, origins = yaml_file.read(path, *RUN_FILE)
    for override in overrides:
        apply_override(override, values, origins)
    entries = values.pop("runs", None)
    if entries is None:
        entries = [{}]
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise ConfigError(
            f"{path}: runs must be a list of sections, one for each run", help="as runs: [{out: runs/a}, {out: runs/b}]"
        )
    shared = [override for override in overrides if not override.startswith("runs")]
    resolved = []
    for number, entry in enumerate(entries):
        merged = _laid_over(values, entry)
        places = {k: v for k, v in origins.items() if not k.startswith("runs.")}
        places |= {k: f"{path.name} runs[{number}]" for k in leaves(entry)}
        for override in shared:
            apply_override(override, merged, places)
        if out is not None:
            merged["out"] = str(out if len(entries) == 1 else out / Path(str(merged.get("out", number))).name)
            places["out"] = "--out"
        resolve_paths(merged, places, path.parent)
        where = str(path) if len(entries) == 1 else f"{path} runs[{number}]"
        resolved.append(Resolved(validate(RunConfig, merged, where), places))
    _check_together(path, resolved)
    return resolved


def run_many(
    base: Base,
    tasks: Mapping[str, tuple[Task, Path]],
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, Event | Failed]]:
    """Train every task, an event from each in turn, until all have finished or failed."""
    active = {
        name: run_task(base, task, folder, resume=resume, should_stop=should_stop)
        for name, (task, folder) in tasks.items()
    }
    while active:
        for name, events in list(active.items()):
            try:
                yield name, next(events)
            except StopIteration:
                del active[name]
            except Exception as error:
                del active[name]
                yield name, Failed(error)


def _laid_over(values: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    merged = deepcopy(dict(values))
    for key, value in entry.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        other_kind = both and key == "method" and value.get("kind", merged[key].get("kind")) != merged[key].get("kind")
        merged[key] = _laid_over(merged[key], value) if both and not other_kind else value
    return merged


def _check_together(path: Path, runs: Sequence[Resolved]) -> None:
    bases = {(r.config.base, r.config.quantize, r.config.train.dtype) for r in runs}
    if len(bases) > 1:
        raise ConfigError(
            f"{path}: the runs ask for {len(bases)} different bases: {sorted(map(str, bases))}",
            help="runs of one file share one base in memory; put the others into a file of their own",
        )
    folders = [r.config.out.resolve() for r in runs]
    twice = sorted({str(f) for f in folders if folders.count(f) > 1})
    if twice:
        raise ConfigError(f"{path}: two runs write to {', '.join(twice)}", help="give each run its own `out`")
