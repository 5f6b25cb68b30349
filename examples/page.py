"""The demo's page: plots and tables in one HTML file that needs nothing else."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2f6fb0", "#d97a27", "#9aa3ab"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2329 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .8rem 0 } td, th { padding: .3rem .8rem .3rem 0; vertical-align: top }
th, td { text-align: left }
th { border-bottom: 1px solid #9aa3ab; font-weight: 600 } td.n { text-align: right; font-variant-numeric: tabular-nums }
svg { max-width: 100%; height: auto } .base { color: #6b7680 } pre { white-space: pre-wrap; margin: 0; font: inherit }
"""


def write_page(out: Path, result: dict[str, Any]) -> Path:
    """Write `index.html` into `out` and return its path."""
    sections = [
        f"<h1>Three adapters over one frozen base</h1><p>Everything in {result['seconds']:.0f} seconds.</p>",
        "<h2>Training</h2>" + svg(loss_curves(out / "runs", [c["adapter"] for c in result["changes"]])),
        "<h2>What each adapter changed on held-out rows</h2>"
        + svg(change_bars(result["changes"]))
        + changes(result["changes"]),
        "<h2>Answers</h2>" + answers(result["answers"]),
        "<h2>One merged into a plain model</h2>" + facts(result["merge"]),
        "<h2>One batch, every row its own adapter</h2>" + mixed(result["mixed"]),
    ]
    body = "\n".join(sections)
    text = f"<!doctype html><html lang=en><meta charset=utf-8><title>veneer demo</title><style>{STYLE}</style>{body}</html>\n"
    path = out / "index.html"
    path.write_text(text)
    return path


def loss_curves(runs: Path, names: list[str]) -> Figure:
    """Training and held-out loss of each run."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        steps = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], color=GREY, linewidth=1, label="training")
        held = [(s["step"], s["eval_loss"]) for s in steps if s.get("eval_loss") is not None]
        axes.plot(*zip(*held, strict=True), color=BLUE, marker="o", markersize=4, label="held out")
        axes.set(title=name, xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("nats per label token")
    figure.axes[0].legend(frameon=False)
    return figure


def change_bars(rows: list[dict[str, Any]]) -> Figure:
    """Change of loss on the own task and on general text, with 95 % intervals."""
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots()
    for offset, key, color, label in ((-0.18, "change", BLUE, "own task"), (0.18, "general", ORANGE, "general text")):
        for i, row in enumerate(rows):
            value, low, high = row[key]
            axes.barh(i + offset, value, height=0.32, color=color, label=label if i == 0 else None)
            axes.plot([low, high], [i + offset] * 2, color="#1d2329", linewidth=1.5)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(rows)), [row["adapter"] for row in rows])
    axes.set_xlabel("change of loss against the bare base (nats per token, lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    axes.legend(frameon=False)
    return figure


def svg(figure: Figure) -> str:
    """A figure as inline SVG."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def changes(rows: list[dict[str, Any]]) -> str:
    """Table of losses, with what each adapter does to the other tasks."""
    head = ["adapter", "base", "with it", "change (95 % interval)", "general text", "other tasks"]
    cells = []
    for r in rows:
        value, low, high = r["change"]
        other = ", ".join(f"{k} {v:+.2f}" for k, v in r["elsewhere"].items())
        general = f"{r['general'][0]:+.3f} ({r['general'][1]:+.3f} to {r['general'][2]:+.3f})"
        cells.append(
            [
                r["adapter"],
                f"{r['base']:.3f}",
                f"{r['loss']:.3f}",
                f"{value:+.3f} ({low:+.3f} to {high:+.3f})",
                general,
                other,
            ]
        )
    return table(head, cells)


def answers(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Table of metrics, base beside adapter."""
    rows = [[task, m, f"{v['base']:.3f}", f"{v['adapter']:.3f}"] for task, ms in found.items() for m, v in ms.items()]
    return table(["task", "metric", "base", "adapter"], rows)


def facts(values: dict[str, float]) -> str:
    """Table of what the merge kept."""
    return table(["", ""], [[name, f"{value:.4g}"] for name, value in values.items()])


def mixed(rows: list[dict[str, str]]) -> str:
    """Questions with both answers."""
    cells = "".join(
        f"<tr><th>{html.escape(r['adapter'])}</th><td><pre>{html.escape(r['question'])}</pre></td>"
        f"<td><pre>{html.escape(r['answer'])}</pre></td><td class=base><pre>{html.escape(r['base'])}</pre></td></tr>"
        for r in rows
    )
    return f"<table><tr><th></th><th>asked</th><th>with the adapter</th><th>bare base</th></tr>{cells}</table>"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A plain table; cells that begin with a digit or a sign stand to the right."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _cell(text: str) -> str:
    numeric = text[:1].isdigit() or text[:1] in "+-"
    return f"<td{' class=n' if numeric else ''}>{html.escape(text)}</td>"
