"""From a cold process to work: imports, the command line, a base in memory, the first training step.

    python benchmarks/startup.py [--rounds 5] [--base smollm2-135m]

import     `python -c "import veneer"` and `veneer --help`, whole processes, beside a Python that does nothing
base       `load_base` and its tokenizer, in a process that has imported what they need; the base was converted before
memory     what that process grows by while every weight is read once, and how much of that is its own (mapped from no file)
first step `veneer train` from the start of the process to the end of the first optimiser step, rows and base cached

One round that is not counted fills the caches. Medians go to `results/startup.json` and `results/startup.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import HERE, drive, markdown, publish, say, spread

VENEER = Path(sys.executable).with_name("veneer")
LIMITS = {
    "import veneer": (0.3, "s"),
    "veneer --help": (0.3, "s"),
    "base ready, after imports": (1.5, "s"),
    "memory over the weights": (1.2, "x"),
    "own memory over the weights": (None, "x"),
    "start to the end of the first step": (5.0, "s"),
    "python that does nothing": (None, "s"),
}
"""What is measured, the bar, the unit."""


def seconds(*command: str | Path) -> float:
    """Wall time of a process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def memory() -> dict[str, int]:
    """Bytes of this process: peak resident since `forget_peak`, resident now, and the part that is no file's."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    keys = {"peak": "VmHWM", "resident": "VmRSS", "own": "RssAnon"}
    return {name: int(fields[key].split()[0]) * 1024 for name, key in keys.items()}


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def load(name: str) -> dict[str, float]:
    """Runs in a process of its own: seconds to a base that is ready, and its memory with every weight read."""
    import tokenizers
    import torch

    import veneer.models.chat
    from veneer.models.load import load_base

    assert tokenizers and veneer.models.chat
    torch.ones(64, 64) @ torch.ones(64, 64)
    forget_peak()
    before = memory()
    start = time.perf_counter()
    base = load_base(name)
    base.require_tokenizer().encode("ready")
    ready = time.perf_counter() - start
    tensors = {t.data_ptr(): t for t in base.decoder.tensors.values() if isinstance(t, torch.Tensor)}
    weights = sum(t.nbytes for t in tensors.values())
    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8)[::1024].sum()
    after = memory()
    return {
        "ready": ready,
        "weights": weights,
        "peak": (after["peak"] - before["resident"]) / weights,
        "own": (after["own"] - before["own"]) / weights,
    }


def first_step(name: str, folder: Path) -> float:
    """Seconds from the start of `veneer train` until the line of its first step is written."""
    config, out = folder / "run.yaml", folder / "run"
    data = HERE.parent / "examples/data/spam.train.jsonl"
    train = "{max_steps: 1, tokens_per_step: 1024, max_length: 512}"
    config.write_text(f"base: {name}\ndata: {{train: {data}}}\ntrain: {train}\n")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    begin = time.time()
    subprocess.run([VENEER, "train", str(config), "--out", str(out)], check=True, **quiet)
    return (out / "metrics.jsonl").stat().st_mtime - begin


def measure(name: str) -> dict[str, float]:
    """One round."""
    loaded = drive(sys.executable, Path(__file__), "--load", name)
    with tempfile.TemporaryDirectory() as folder:
        step = first_step(name, Path(folder))
    return {
        "import veneer": seconds(sys.executable, "-c", "import veneer"),
        "veneer --help": seconds(VENEER, "--help"),
        "base ready, after imports": loaded["ready"],
        "memory over the weights": loaded["peak"],
        "own memory over the weights": loaded["own"],
        "start to the end of the first step": step,
        "python that does nothing": seconds(sys.executable, "-c", "pass"),
    }


def table_of(results: list[dict[str, Any]]) -> str:
    verdicts = {True: "yes", False: "no", None: ""}
    rows = []
    for found in results:
        bar = "" if found["bar"] is None else f"<= {found['bar']:g} {found['unit']}"
        rows.append([found["what"], f"{spread(found['values'])} {found['unit']}", bar, verdicts[found["holds"]]])
    return markdown(["what", "median (range)", "bar", "holds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--load", metavar="NAME", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.load:
        print(json.dumps(load(asked.load)))
        return
    measure(asked.base)
    rounds = []
    for number in range(asked.rounds):
        rounds.append(measure(asked.base))
        say(f"round {number + 1}/{asked.rounds}: " + ", ".join(f"{k} {v:.2f}" for k, v in rounds[-1].items()))
    results: list[dict[str, Any]] = []
    for what, (bar, unit) in LIMITS.items():
        values = [one[what] for one in rounds]
        middle = statistics.median(values)
        found = {"what": what, "median": round(middle, 3), "values": [round(v, 3) for v in values], "unit": unit}
        results.append(found | {"bar": bar, "holds": None if bar is None else middle <= bar})
    publish("startup", results, table_of(results))


if __name__ == "__main__":
    main()
