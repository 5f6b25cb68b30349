"""The main job on a real model and real data: train three adapters, prove what they do, merge one, mix them in a batch.

    make demo            (or: python examples/demo.py [--out demo-out])

It ends with a page, `demo-out/index.html`. Nothing here is hard-coded: every figure is measured as it runs. About 6 minutes
on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from page import write_page
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import veneer as vn
from veneer.data import load
from veneer.evaluate import Report, Settings, evaluate
from veneer.merge.check import agreement, opened
from veneer.train import Evaluation, Step

HERE = Path(__file__).parent
DATA = HERE / "data"
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "jive": ("says a sentence in a dialect", {"epochs": 1}),
    "spam": ("reads a mail, answers with a verdict as JSON", {"epochs": 1}),
    "shell": ("turns a request into one Bash command", {"epochs": 2}),
}
COMMON = {"lr": 3e-4, "tokens_per_step": 1024, "eval_every": 20, "save_every": 1000, "max_length": 512}
QUESTIONS = {
    "jive": "Say it your way: The teacher asked the students to read the first chapter of the book.",
    "spam": "Is this mail spam or ham? Answer as JSON.\n\nSubject: Free prize inside\nYou have been chosen to win a free "
    "holiday. Click here today to claim your reward!",
    "shell": 'Answer with one Bash command. Count the lines in "/workspace/notes.txt"',
}
console = Console(width=None if sys.stdout.isatty() else 120)


def train(base: Any, task: str, out: Path) -> Any:
    """One LoRA adapter, with a bar."""
    columns = (
        TextColumn(f"  {task:6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  held out {task.fields[held]}  {task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        line = bar.add_task(task, total=None, loss=float("nan"), held="-", rate=0.0)

        def show(event: Any) -> None:
            if isinstance(event, Step):
                rate = event.tokens_per_second
                bar.update(line, total=event.total, completed=event.step, loss=event.loss, rate=rate)
            elif isinstance(event, Evaluation) and event.eval_loss is not None:
                bar.update(line, held=f"{event.eval_loss:.3f}")

        return vn.train(
            base,
            DATA / f"{task}.train.jsonl",
            eval=DATA / f"{task}.eval.jsonl",
            method=vn.LoRA(rank=16, alpha=32),
            out=out / "runs" / task,
            on_event=show,
            **(COMMON | TASKS[task][1]),
        )


def compare(base: Any, adapters: dict[str, Any], questions: int) -> dict[str, Report]:
    """Base and every adapter on every task's held-out rows and on general text."""
    reports = {}
    general = load(DATA / "general.jsonl")
    for number, task in enumerate(TASKS):
        with console.status(f"  {task}: measuring") as status:
            reports[task] = evaluate(
                base,
                adapters,
                load(DATA / f"{task}.eval.jsonl"),
                general=general if number == 0 else None,
                settings=Settings(max_length=512, on_too_long="truncate", generate=questions),
                progress=lambda what, task=task, status=status: status.update(f"  {task}: {what}"),  # type: ignore[misc]
            )
    return reports


def show_changes(reports: dict[str, Report]) -> list[dict[str, Any]]:
    """Each adapter on its own task, on the others', and on general text; raises where one does not help its own."""
    rows = []
    for name in TASKS:
        own = reports[name]
        change = own.changes[name]["loss"]
        general = reports["jive"].changes[name]["general_loss"]
        elsewhere = {task: reports[task].changes[name]["loss"].value for task in TASKS if task != name}
        rows.append(
            {
                "adapter": name,
                "base": own.base["loss"].value,
                "loss": own.adapters[name]["loss"].value,
                "change": [change.value, change.low, change.high],
                "general": [general.value, general.low, general.high],
                "elsewhere": elsewhere,
            }
        )
    table = Table("adapter", "base", "with it", "change (95 % interval)", "general text", "other tasks", box=None)
    for row in rows:
        value, low, high = row["change"]
        other = ", ".join(f"{task} {moved:+.2f}" for task, moved in row["elsewhere"].items())
        table.add_row(
            row["adapter"],
            f"{row['base']:.3f}",
            f"{row['loss']:.3f}",
            f"{value:+.3f} ({low:+.3f} to {high:+.3f})",
            f"{row['general'][0]:+.3f}",
            other,
        )
    console.print(table)
    return rows


def show_answers(reports: dict[str, Report]) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics of written answers and of label scores, base beside the task's own adapter."""
    shown: dict[str, dict[str, dict[str, float]]] = {}
    table = Table("task", "metric", "base", "adapter", box=None)
    for task, report in reports.items():
        for metric, figure in report.base.items():
            if metric in ("loss", "perplexity", "bits_per_byte", "general_loss"):
                continue
            own = report.adapters[task][metric].value
            shown.setdefault(task, {})[metric] = {"base": figure.value, "adapter": own}
            table.add_row(task, metric, f"{figure.value:.3f}", f"{own:.3f}")
    console.print(table)
    return shown


def merge(base: Any, name: str, adapter: Any, out: Path) -> dict[str, Any]:
    """Write base + adapter as a plain checkpoint and prove that it is the same model."""
    report = vn.merge(base, adapter, out)
    agreed = agreement(base, adapter, out)
    rows = load(DATA / f"{name}.eval.jsonl")
    quiet = Settings(max_length=512, on_too_long="truncate", generate=0, labels=False)
    attached = evaluate(base, {name: adapter}, rows, settings=quiet)
    merged = evaluate(opened_with_tokenizer(base, out), {}, rows, settings=quiet)
    facts = {
        "lost to rounding": report.lost,
        "KL per token": agreed.kl,
        "same first choice": agreed.top1,
        "loss attached": attached.adapters[name]["loss"].value,
        "loss merged": merged.base["loss"].value,
    }
    gain = attached.base["loss"].value - facts["loss attached"]
    console.print(
        f"  {report.lost:.2%} of the update lost to bf16 rounding; KL {agreed.kl:.2e} nats per token, "
        f"{agreed.top1:.1%} equal first choices over {agreed.tokens} tokens\n"
        f"  held-out loss {facts['loss attached']:.4f} attached, {facts['loss merged']:.4f} merged "
        f"({abs(facts['loss merged'] - facts['loss attached']) / gain:.1%} of the adapter's gain)"
    )
    if abs(facts["loss merged"] - facts["loss attached"]) > 0.1 * gain:
        raise SystemExit("the merged model is not the adapted one")
    return facts


def opened_with_tokenizer(base: Any, folder: Path) -> Any:
    """The merged checkpoint as a base, read from its own files."""
    merged = opened(folder, base.dtype)
    merged.folder = folder
    return merged


def mix(base: Any, adapters: dict[str, Any]) -> list[dict[str, str]]:
    """One batch in which every row uses another adapter, and what the bare base says to the same questions."""
    engine = vn.Engine(base)
    for name, adapter in adapters.items():
        engine.add(name, adapter)
    requests = [
        vn.Request([{"role": "user", "content": question}], adapter=who, max_tokens=40)
        for name, question in QUESTIONS.items()
        for who in (name, None)
    ]
    texts = [answers[0].text.strip() for answers in engine.complete(requests)]
    engine.close()
    found = []
    for i, (name, question) in enumerate(QUESTIONS.items()):
        found.append({"adapter": name, "question": question, "answer": texts[2 * i], "base": texts[2 * i + 1]})
        console.print(f"  [bold]{name}[/]  {question.splitlines()[0]}")
        console.print(f"      adapter: {texts[2 * i]}", markup=False)
        console.print(f"      base:    {texts[2 * i + 1]}", markup=False, style="dim")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--questions", type=int, default=24, help="held-out questions answered by each")
    args = parser.parse_args()
    begin = time.perf_counter()
    mark = args.out / ".made-by-the-demo"
    ours = mark.exists() or (args.out / "demo.json").exists()
    if args.out.exists() and not ours and (not args.out.is_dir() or any(args.out.iterdir())):
        sys.exit(f"{args.out} is there already and no earlier demo made it; nothing was touched. Choose another --out")
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    mark.touch()

    console.rule("1  the base")
    base = vn.load_base("smollm2-135m")
    console.print(f"  {base.name}: {base.num_parameters:,} frozen parameters in {base.dtype}")

    console.rule("2  three adapters")
    adapters = {}
    for task, (what, _) in TASKS.items():
        console.print(f"  {task}: {what}")
        adapters[task] = train(base, task, args.out)

    console.rule("3  what each changed, on rows it has never seen (nats per token; lower is better)")
    reports = compare(base, adapters, args.questions)
    changes = show_changes(reports)
    answers = show_answers(reports)

    console.rule("4  one merged into a plain model")
    facts = merge(base, "jive", adapters["jive"], args.out / "merged")

    console.rule("5  one batch, every row its own adapter")
    mixed = mix(base, adapters)

    result = {"changes": changes, "answers": answers, "merge": facts, "mixed": mixed}
    result["seconds"] = round(time.perf_counter() - begin, 1)
    result["reports"] = {task: report.as_dict() for task, report in reports.items()}
    (args.out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    page = write_page(args.out, result)
    console.rule(f"done in {result['seconds']:.0f} s")
    console.print(f"  look at {page}")
    bad = [row["adapter"] for row in changes if row["change"][2] >= 0]
    if bad:
        sys.exit(f"no proven gain on its own task: {', '.join(bad)}")


if __name__ == "__main__":
    main()
