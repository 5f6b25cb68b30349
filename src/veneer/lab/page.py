"""A comparison as people read it: a table, a figure, and the JSON with everything behind them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.files import replacing
from veneer.lab.compare import Figure, Result, Row
from veneer.train.checkpoint import write_bytes, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#2f6fb0", "#d97a27", "#9aa3ab"
TASK_METRICS = ("accuracy", "chrf")
"""What is shown beside the loss, the first one that the rows allow."""


def write(result: Result, out: Path, command: str) -> list[Path]:
    """`methods.json`, `methods.md` and, where matplotlib is installed, `methods.png`, each all at once."""
    written = [out / "methods.json", out / "methods.md"]
    write_json(written[0], {"command": command, **document(result)})
    text = page(result, command)
    if importlib.util.find_spec("matplotlib"):
        written.append(plot(result, out / "methods.png"))
        text += "\n![the same figures](methods.png)\n"
    write_bytes(written[1], text.encode())
    return written


def document(result: Result) -> dict[str, Any]:
    """Every figure as plain values."""
    rows = [_finite(asdict(row)) for row in result.rows]
    comparison = result.comparison.model_dump(mode="json")
    comparison["data"] = {k: Path(v).name if k != "format" and v else v for k, v in comparison["data"].items()}
    return {"comparison": comparison, "machine": dict(result.machine), "base": dict(result.base), "methods": rows}


def columns(result: Result) -> tuple[list[str], list[list[str]]]:
    """The table: (columns, rows) as text. Best held-out loss first."""
    metric = task_metric(result)
    names = ["method", "best rate", "held-out loss", *([metric] if metric else []), "general loss, change"]
    names += ["trained parameters", "s / step", "peak memory"]
    rows = []
    for row in ordered(result):
        cells = [row.method, f"{row.rate:g}{' (edge)' if row.edge else ''}" if row.rate is not None else "diverged"]
        cells.append(_text(row.figures.get("loss")))
        cells += [_text(row.figures.get(metric))] if metric else []
        cells.append(_text(row.changes.get("general_loss"), "+"))
        low, high = row.seconds_range
        time = f"{row.seconds_per_step:.2f} ({low:.2f} to {high:.2f})"
        cells += [f"{row.parameters:,}", time, f"{row.peak_bytes / 1e9:.2f} GB"] if row.seeds else ["-", "-", "-"]
        rows.append(cells)
    return names, rows


def ordered(result: Result) -> list[Row]:
    """The rows, lowest held-out loss first, those without one last."""
    return sorted(result.rows, key=lambda row: row.figures["loss"].value if "loss" in row.figures else float("inf"))


def task_metric(result: Result) -> str | None:
    """What is shown beside the loss."""
    return next((metric for metric in TASK_METRICS if metric in result.base), None)


def flags(result: Result) -> list[str]:
    """What a reader has to know before comparing: rates at the edge, trainings that diverged."""
    found = []
    for row in result.rows:
        if row.edge:
            found.append(
                f"{row.method}: its best rate, {row.rate:g}, is the {row.edge} of its grid; a better one may lie beyond"
            )
        if row.failed:
            found.append(f"{row.method}: {len(row.failed)} of its trainings diverged, as: {row.failed[0]}")
    return found


def page(result: Result, command: str) -> str:
    """The comparison in Markdown."""
    c, metric = result.comparison, task_metric(result)
    names, rows = columns(result)
    table = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *(f"| {' | '.join(row)} |" for row in rows)]
    seeds = "Student's t over the seeds" if c.seeds > 1 else "a bootstrap over the held-out rows"
    base = ", ".join(
        f"{name.replace('_', ' ')} {result.base[name]:.3f}"
        for name in ("loss", metric, "general_loss")
        if name is not None and name in result.base
    )
    about = (
        f"{c.base}{f' in {c.quantize}' if c.quantize else ''}, trained on {c.data.train.name}. Each method: "
        f"its own grid of learning rates at {c.search_tokens:,} tokens with one seed, chosen on a third of the held-out "
        f"rows; then {c.tokens:,} tokens with {c.seeds} seed{'s' if c.seeds > 1 else ''} at the best, on the other rows. "
        f"Steps of at most {c.train.tokens_per_step:,} tokens, {c.train.optimizer}, every training a process of its own. "
        f"Losses in nats per token, lower is better; in brackets 95 % intervals, {seeds} (for seconds per step the range; "
        f"peak memory is the most of any seed). The bare base: {base}."
    )
    lines = ["# Methods compared", "", "Made by:", "", f"    {command}", "", about, "", *table, ""]
    lines += [f"- {flag}" for flag in flags(result)] or [
        "No best rate lies at the edge of its grid, no training diverged."
    ]
    lines += ["", "## Learning rates", "", "Held-out loss of the search, by rate.", "", *_search_table(result), ""]
    return "\n".join(lines)


def _search_table(result: Result) -> list[str]:
    lines = []
    for row in result.rows:
        tried = [
            f"{rate:g}: {'diverged' if loss is None else f'{loss:.3f}'}{' *' if rate == row.rate else ''}"
            for rate, loss in row.search
        ]
        lines.append(f"| {row.method} | {' | '.join(tried)} |")
    width = max(len(row.search) for row in result.rows)
    return [f"| method | {' | '.join('rate: loss' for _ in range(width))} |", f"|{'---|' * (width + 1)}", *lines]


def plot(result: Result, path: Path) -> Path:
    """Six panels: loss, general loss, parameters, time, memory, and the search over rates."""
    from matplotlib.figure import Figure as Picture

    rows = [row for row in ordered(result) if row.seeds]
    names = [row.method for row in rows]
    picture = Picture(figsize=(11, 6.4), layout="constrained")
    axes = picture.subplots(2, 3).ravel()
    _bars(axes[0], names, [row.figures["loss"] for row in rows], "held-out loss, nats per token")
    axes[0].axvline(result.base.get("loss", 0), color=GREY, linewidth=1, linestyle="--")
    if all("general_loss" in row.changes for row in rows):
        _bars(axes[1], names, [row.changes["general_loss"] for row in rows], "general loss, change against the base")
    numbers = [Figure(float(row.parameters), row.parameters, row.parameters) for row in rows]
    _bars(axes[2], names, numbers, "trained parameters", is_log=True)
    _bars(axes[3], names, [Figure(row.seconds_per_step, *row.seconds_range) for row in rows], "seconds per step")
    memory = [row.peak_bytes / 1e9 for row in rows]
    _bars(axes[4], names, [Figure(m, m, m) for m in memory], "peak memory, GB")
    for row in result.rows:
        tried = [(rate, loss) for rate, loss in row.search if loss is not None]
        if tried:
            axes[5].plot(*zip(*tried, strict=True), marker="o", markersize=3, linewidth=1, label=row.method)
    axes[5].set_xscale("log")
    axes[5].set_title("held-out loss by learning rate", loc="left", fontsize=10)
    axes[5].legend(frameon=False, fontsize=7, ncols=2)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    with replacing(path) as beside:
        picture.savefig(beside, dpi=120, format=path.suffix[1:])
    return path


def _bars(axes: Axes, names: Sequence[str], values: Sequence[Figure], title: str, *, is_log: bool = False) -> None:
    """Points with intervals; bars where the figure starts at nothing."""
    axes.barh(names, [v.value for v in values], color=BLUE, height=0.6, log=is_log)
    axes.hlines(names, [v.low for v in values], [v.high for v in values], color=ORANGE, linewidth=2)
    axes.set_title(title, loc="left", fontsize=10)
    axes.invert_yaxis()


def _text(figure: Figure | None, sign: str = "") -> str:
    if figure is None:
        return "-"
    digits = 3 if abs(figure.value) < 10 else 1
    value, low, high = (format(number, f"{sign}.{digits}f") for number in (figure.value, figure.low, figure.high))
    return f"{value} ({low} to {high})"


def _finite(value: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value
