"""A run on one page: `report.md`, with the losses as plots where matplotlib is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from veneer.train.checkpoint import write_bytes

BLUE, ORANGE, GREY = "#2f6fb0", "#d97a27", "#9aa3ab"


def write_report(folder: Path) -> Path:
    """Write `report.md` (and `loss.png`, `loss.svg`) from the files of a finished run."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    provenance = json.loads((folder / "provenance.json").read_text())
    plots = plot_losses(steps, folder) if importlib.util.find_spec("matplotlib") else []
    text = "\n".join(_page(folder, steps, provenance, plots))
    write_bytes(folder / "report.md", text.encode())
    return folder / "report.md"


def plot_losses(steps: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Training, held-out and general loss over steps, as PNG and SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    x = [s["step"] for s in steps]
    axes.plot(x, [s["loss"] for s in steps], color=GREY, linewidth=1, label="training")
    for key, label, color in (("eval_loss", "held out", BLUE), ("general_loss", "general", ORANGE)):
        points = [(s["step"], s[key]) for s in steps if s.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=label)
    axes.set(xlabel="optimiser step", ylabel="loss (nats per label token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    paths = [folder / "loss.png", folder / "loss.svg"]
    for path in paths:
        figure.savefig(path, dpi=120)
    return paths


def _page(folder: Path, steps: list[dict[str, Any]], provenance: dict[str, Any], plots: list[Path]) -> list[str]:
    lines = [f"# Run {folder.name}", ""]
    if plots:
        lines += [f"![loss over steps]({plots[0].name})", ""]
    if steps:
        seconds = sum(s["seconds"] for s in steps)
        tokens = sum(s["tokens"] for s in steps)
        lines += [
            "| | |",
            "|---|---|",
            f"| steps | {steps[-1]['step']} |",
            f"| training loss, first and last | {steps[0]['loss']:.4f}, {steps[-1]['loss']:.4f} |",
            *_held_out_rows(steps),
            f"| useful tokens | {tokens:,} in {seconds:.1f} s ({tokens / seconds:.0f} per second) |",
            f"| peak memory of the process | {max(s['peak_bytes'] for s in steps) / 1e9:.2f} GB |",
        ]
    lines += [
        f"| base | {provenance['base']['name']} (`{(provenance['base']['identity'] or 'unverified')[:16]}`) |",
        f"| dtype | {provenance['dtype']} |",
        f"| versions | veneer {provenance['veneer']}, torch {provenance['torch']} |",
        "",
        "Configuration with the origin of each value: `config.yaml`. One object per step: `metrics.jsonl`.",
        "",
    ]
    return lines


def _held_out_rows(steps: list[dict[str, Any]]) -> list[str]:
    rows = []
    for key, name in (("eval_loss", "held-out loss"), ("general_loss", "general loss")):
        found = [(s[key], s["step"]) for s in steps if s.get(key) is not None]
        if found:
            best, at = min(found)
            rows.append(
                f"| {name}, first, best and last | {found[0][0]:.4f}, {best:.4f} (step {at}), {found[-1][0]:.4f} |"
            )
    return rows
