"""One cell of a comparison, in a process of its own so that its peak memory is its own.

    python -m veneer.lab.cell CELL.json RESULT.json

Trains, scores, and puts the result in place all at once. Standard output has a line of JSON per optimiser step, `{"tokens": N}`,
for whoever shows progress, and `{"error": ..., "help": ...}` for what is refused. A training that diverges is a result too: it
says `failed` with the reason.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from veneer.adapter import Adapter
from veneer.data import Dataset, encode, load
from veneer.data.rows import Rows
from veneer.errors import ConfigError, TrainingError, VeneerError
from veneer.evaluate.compare import Report, Settings, evaluate
from veneer.evaluate.loss import row_losses
from veneer.inject.native import bank_of
from veneer.lab.plan import Cell
from veneer.methods import lower
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.train.checkpoint import write_json
from veneer.train.config import TrainConfig, method_from
from veneer.train.events import Preflight, Step
from veneer.train.memory import fit_memory
from veneer.train.run import Task, run_task
from veneer.train.schedule import plan_schedule

WARM = 2
"""Steps whose time does not count: the first ones fill caches."""


def run_cell(cell: Cell, told: Callable[[int], None] = lambda tokens: None) -> dict[str, Any]:
    """Train and score one cell. `told` gets the training tokens done so far after every step."""
    config = TrainConfig(**cell.train)
    base = load_base(cell.base, dtype=config.dtype, quantize=cell.quantize)
    task = task_of(base, cell)
    with tempfile.TemporaryDirectory(prefix="veneer-cell-") as folder:
        try:
            trained = _trained(base, task, Path(folder) / "run", told)
        except TrainingError as error:
            return {"fingerprint": cell.fingerprint, "failed": error.message}
        adapter = Adapter.load(Path(folder) / "run" / "adapter")
    return {"fingerprint": cell.fingerprint, **trained, **_scores(base, adapter, cell, config.max_length)}


def task_of(base: Base, cell: Cell) -> Task:
    """The cell's training as `train` runs it: as many steps as its tokens take."""
    spec = method_from(cell.fields)
    config = TrainConfig(**cell.train)
    dataset = encode(
        load(Path(cell.files["train"]), cell.files["format"]),
        base.require_tokenizer(),
        max_length=config.max_length,
        on_too_long=config.on_too_long,
    )
    whole = config.model_copy(update={"epochs": 1 + cell.tokens / int(dataset.lengths.sum())})
    steps = _steps_for(dataset, whole, fit_memory(base, spec, whole, dataset).tokens_per_pass, cell.tokens)
    if steps < 2 * WARM:
        raise ConfigError(
            f"{cell.tokens:,} training tokens are {steps} steps of {config.tokens_per_step:,}, too few to tell anything",
            help="raise the tokens, or lower train.tokens_per_step",
        )
    never = steps + 1
    return Task(spec, whole.model_copy(update={"max_steps": steps, "eval_every": never, "save_every": never}), dataset)


def _steps_for(dataset: Dataset, config: TrainConfig, tokens_per_pass: int, budget: int) -> int:
    lengths = dataset.lengths
    schedule = plan_schedule(dataset, config, tokens_per_pass)
    sizes = (sum(int(lengths[row]) for rows in step for row in rows) for step in schedule)
    return 1 + sum(1 for total in accumulate(sizes) if total < budget)


def _trained(base: Base, task: Task, folder: Path, told: Callable[[int], None]) -> dict[str, Any]:
    parameters, tokens = 0, 0
    steps: list[Step] = []
    for event in run_task(base, task, folder):
        if isinstance(event, Preflight):
            parameters = event.trained_parameters
        elif isinstance(event, Step):
            steps.append(event)
            tokens += event.tokens
            told(tokens)
    return {
        "parameters": parameters,
        "steps": len(steps),
        "train_tokens": tokens,
        "train_loss": steps[-1].loss,
        "seconds_per_step": median(step.seconds for step in steps[WARM:]),
        "peak_bytes": steps[-1].peak_bytes,
        "dtype": str(base.dtype).removeprefix("torch."),
        "base_identity": base.identity,
    }


def _scores(base: Base, adapter: Adapter, cell: Cell, length: int) -> dict[str, Any]:
    search, final = held_out(load(Path(cell.files["eval"]), cell.files["format"]))
    if cell.stage == "search":
        rows = encode(search, base.require_tokenizer(), max_length=length, on_too_long="truncate")
        return {"loss": row_losses(base, rows, bank_of(base, [lower(adapter, base)]), 0).mean}
    general = load(Path(cell.files["general"])) if "general" in cell.files else None
    settings = Settings(max_length=length, on_too_long="truncate", generate=cell.answers)
    return {"scores": _plain(evaluate(base, {"it": adapter}, final, general=general, settings=settings))}


def held_out(rows: Rows) -> tuple[Rows, Rows]:
    """The first third, by which rates are chosen, and the rest, which is the result."""
    if len(rows) < 3:
        raise ConfigError(f"{rows.name} has {len(rows)} rows, a comparison needs at least 3 held out")
    third = len(rows) // 3
    return replace(rows, rows=rows.rows[:third]), replace(rows, rows=rows.rows[third:])


def _plain(report: Report) -> dict[str, Any]:
    """metric -> base, value and change, each with the interval over rows."""
    return {
        metric: {
            "base": asdict(figure),
            "value": asdict(report.adapters["it"][metric]),
            "change": asdict(report.changes["it"][metric]),
        }
        for metric, figure in report.base.items()
    }


def main() -> None:
    given, wanted = Path(sys.argv[1]), Path(sys.argv[2])
    cell = Cell(**json.loads(given.read_text()))

    def told(tokens: int) -> None:
        sys.stdout.write(json.dumps({"tokens": tokens}) + "\n")
        sys.stdout.flush()

    try:
        write_json(wanted, run_cell(cell, told))
    except VeneerError as error:
        sys.stdout.write(json.dumps({"error": error.message, "help": error.help}) + "\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
