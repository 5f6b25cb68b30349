"""Training against transformers + peft: ratios in one run, interleaved, medians.

    python benchmarks/train.py [--rounds 5] [--cases bf16-fixed,bf16-real,...]

Each round runs veneer and the peer, one after the other, each in a process of its own, so peak memory is the operating system's
figure for the whole process. Results go to `results/train.json`, `results/train.md` and `results/train.png`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CASES: dict[str, tuple[list[str], float, float]] = {
    "bf16-fixed": (["--dtype", "bf16"], 3.0, 0.40),
    "bf16-real": (["--dtype", "bf16", "--lengths", "real", "--batch", "8"], 6.0, 0.35),
    "fp32-fixed": (["--dtype", "fp32"], 1.8, 0.45),
    "dora": (["--dtype", "bf16", "--dora"], 3.0, 0.35),
    "nf4-dq": (["--dtype", "bf16", "--nf4"], 2.5, 0.40),
}
"""Case -> (arguments of both drivers, the ratio of speeds to reach, the ratio of memory to stay under)."""


def drive(python: str, script: Path, model: str, arguments: list[str]) -> dict[str, Any]:
    """The JSON line of one driver."""
    done = subprocess.run(
        [python, str(script), model, *arguments], capture_output=True, text=True, check=False, timeout=1800
    )
    if done.returncode != 0:
        raise SystemExit(f"{script.name} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    line: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return line


def run_case(name: str, rounds: int, peer_python: str, folder: str) -> dict[str, Any]:
    """Both drivers in turn, `rounds` times."""
    arguments, speed_bar, memory_bar = CASES[name]
    ours, theirs = [], []
    for number in range(rounds):
        ours.append(drive(sys.executable, HERE / "train_veneer.py", "smollm2-135m", arguments))
        theirs.append(drive(peer_python, HERE / "peers" / "train_peft.py", folder, arguments))
        speed = ours[-1]["useful_tokens_per_s"] / theirs[-1]["useful_tokens_per_s"]
        print(f"{name} round {number + 1}/{rounds}: {speed:.2f}x", file=sys.stderr)

    def median(rows: list[dict[str, Any]], key: str) -> float:
        return statistics.median(row[key] for row in rows)

    pairs = [a["useful_tokens_per_s"] / b["useful_tokens_per_s"] for a, b in zip(ours, theirs, strict=True)]
    return {
        "case": name,
        "rounds": rounds,
        "speed_ratio": round(statistics.median(pairs), 2),
        "speed_ratio_range": [round(min(pairs), 2), round(max(pairs), 2)],
        "speed_bar": speed_bar,
        "memory_ratio": round(median(ours, "peak_bytes") / median(theirs, "peak_bytes"), 3),
        "memory_bar": memory_bar,
        "fraction_of_floor": round(median(ours, "fraction_of_floor"), 3),
        "veneer": {
            k: median(ours, k) for k in ("useful_tokens_per_s", "peak_bytes", "gemm_flops_per_s", "page_faults")
        },
        "peft": {k: median(theirs, k) for k in ("useful_tokens_per_s", "peak_bytes")},
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| case | speed vs peft | bar | peak memory vs peft | bar | of the FLOP floor | tokens/s, veneer / peft |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        low, high = r["speed_ratio_range"]
        lines.append(
            f"| {r['case']} | {r['speed_ratio']:.2f}x ({low:.2f}-{high:.2f}) | {r['speed_bar']}x | {r['memory_ratio']:.2f}x "
            f"| {r['memory_bar']}x | {r['fraction_of_floor']:.2f} "
            f"| {r['veneer']['useful_tokens_per_s']:.0f} / {r['peft']['useful_tokens_per_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Speed and memory ratios by case, with the bars to reach as ticks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [r["case"] for r in results]
    for axes, key, bar, title in (
        (left, "speed_ratio", "speed_bar", "speed, veneer / peft"),
        (right, "memory_ratio", "memory_bar", "peak memory, veneer / peft"),
    ):
        axes.barh(names, [r[key] for r in results], color="#2f6fb0", height=0.6)
        for i, r in enumerate(results):
            axes.plot([r[bar]] * 2, [i - 0.38, i + 0.38], color="#d97a27", linewidth=2)
        axes.axvline(1, color="#9aa3ab", linewidth=1)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peer-python", default=str(HERE.parent / ".venv-peers/bin/python"))
    args = parser.parse_args()

    from veneer.merge import write_checkpoint
    from veneer.models.load import load_base

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(load_base("smollm2-135m", dtype="float32"), Path(folder))
        results = [run_case(name, args.rounds, args.peer_python, folder) for name in args.cases.split(",")]
    import torch

    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "capabilities": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    where = HERE / "results"
    where.mkdir(exist_ok=True)
    document = {"command": "python benchmarks/train.py", "machine": machine, "results": results}
    (where / "train.json").write_text(json.dumps(document, indent=2) + "\n")
    (where / "train.md").write_text(table(results))
    plot(results, where / "train.png")
    print(table(results))


if __name__ == "__main__":
    main()
