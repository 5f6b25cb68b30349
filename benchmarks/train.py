"""Training against transformers + peft: ratios in one run, interleaved, medians.

    python benchmarks/train.py [--rounds 5] [--cases bf16-fixed,bf16-real,...]

Each round runs veneer and the peer, one after the other, each in a process of its own, so peak memory is the operating system's
figure for the whole process. Results go to `results/train.json`, `results/train.md` and `results/train.png`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _report import HERE, PEER_PYTHON, bars, drive, markdown, publish, say, write_folder

CASES: dict[str, tuple[list[str], float, float]] = {
    "bf16-fixed": (["--dtype", "bf16"], 3.0, 0.40),
    "bf16-real": (["--dtype", "bf16", "--lengths", "real", "--batch", "8"], 6.0, 0.35),
    "fp32-fixed": (["--dtype", "fp32"], 1.8, 0.45),
    "dora": (["--dtype", "bf16", "--dora"], 3.0, 0.35),
    "nf4-dq": (["--dtype", "bf16", "--nf4"], 2.5, 0.40),
}
"""Case -> (arguments of both drivers, the ratio of speeds to reach, the ratio of memory to stay under)."""


def run_case(name: str, rounds: int, peer_python: str, folder: str) -> dict[str, Any]:
    """Both drivers in turn, `rounds` times."""
    arguments, speed_bar, memory_bar = CASES[name]
    ours, theirs = [], []
    for number in range(rounds):
        ours.append(drive(sys.executable, HERE / "train_veneer.py", "smollm2-135m", *arguments))
        theirs.append(drive(peer_python, HERE / "peers" / "train_peft.py", folder, *arguments))
        speed = ours[-1]["useful_tokens_per_s"] / theirs[-1]["useful_tokens_per_s"]
        say(f"{name} round {number + 1}/{rounds}: {speed:.2f}x")

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
    head = [
        "case",
        "speed vs peft",
        "bar",
        "peak memory vs peft",
        "bar",
        "of the FLOP floor",
        "tokens/s, veneer / peft",
    ]
    return markdown(head, [_line(result) for result in results])


def _line(r: dict[str, Any]) -> list[str]:
    low, high = r["speed_ratio_range"]
    return [
        r["case"],
        f"{r['speed_ratio']:.2f}x ({low:.2f}-{high:.2f})",
        f"{r['speed_bar']}x",
        f"{r['memory_ratio']:.2f}x",
        f"{r['memory_bar']}x",
        f"{r['fraction_of_floor']:.2f}",
        f"{r['veneer']['useful_tokens_per_s']:.0f} / {r['peft']['useful_tokens_per_s']:.0f}",
    ]


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
        bars(axes, names, [r[key] for r in results], [r[bar] for r in results], title)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peer-python", default=str(PEER_PYTHON))
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_folder(Path(scratch), "float32")
        results = [run_case(name, args.rounds, args.peer_python, folder) for name in args.cases.split(",")]
    plot(results, publish("train", results, table(results)))


if __name__ == "__main__":
    main()
