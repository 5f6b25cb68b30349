"""Losses of 200 real steps beside transformers + peft, from the same adapters on the same rows.

    python benchmarks/losses.py [--steps 200] [--seeds 3]

fp32: every loss of one run, as a relative difference. bf16: several runs of each, one a seed of the adapter; what two programs
differ by from one seed, beside what peft's own runs differ by between seeds. Results go to `results/losses.json`,
`results/losses.md` and `results/losses.png`. About fifteen minutes; nothing here is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _report import BLUE, GREY, HERE, ORANGE, RESULTS, markdown, publish, say, write_folder

sys.path.insert(0, str(HERE.parent))
from tests.parity.runs import ours, theirs

MODEL = "smollm2-135m"


def curves(dtype: str, seed: int, steps: int, folder: str) -> dict[str, list[float]]:
    """The losses of both programs from the adapter of one seed."""
    from transformers import AutoModelForCausalLM

    from veneer.data import encode, load
    from veneer.methods.lora import LoRA
    from veneer.models.load import load_base
    from veneer.train.config import TrainConfig

    base = load_base(MODEL, dtype=dtype)
    assert base.tokenizer is not None
    dataset = encode(load(HERE.parent / "examples/data/jive.train.jsonl"), base.tokenizer, max_length=256)
    config = TrainConfig(lr=2e-4, epochs=4, max_steps=steps, tokens_per_step=64, tokens_per_pass=64)
    with tempfile.TemporaryDirectory() as scratch:
        mine, schedule = ours(base, dataset, LoRA(rank=8), config, Path(scratch), seed)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        found = {"veneer": mine, "peft": theirs(model, dataset, schedule, config, Path(scratch))}
    say(f"{dtype}, seed {seed}: last losses {mine[-1]:.4f} and {found['peft'][-1]:.4f}")
    return found


def summary(fp32: dict[str, list[float]], bf16: list[dict[str, list[float]]]) -> dict[str, Any]:
    """The figures of the claim, from the curves."""
    relative = [abs(a - b) / abs(b) for a, b in zip(fp32["veneer"], fp32["peft"], strict=True)]
    between = [max(step) - min(step) for step in zip(*(run["peft"] for run in bf16), strict=True)]
    apart = [abs(a - b) for run in bf16 for a, b in zip(run["veneer"], run["peft"], strict=True)]
    return {
        "steps": len(relative),
        "fp32_largest_relative_difference": max(relative),
        "bf16_seeds": len(bf16),
        "bf16_mean_difference_between_programs": statistics.mean(apart),
        "bf16_mean_spread_of_peft_seeds": statistics.mean(between),
        "bf16_mean_loss_veneer": statistics.mean(loss for run in bf16 for loss in run["veneer"]),
        "bf16_mean_loss_peft": statistics.mean(loss for run in bf16 for loss in run["peft"]),
    }


def table(found: dict[str, Any]) -> str:
    """The figures in Markdown."""
    rows = [
        ["fp32, largest relative difference of a loss", f"{found['fp32_largest_relative_difference']:.1e}", "<= 1e-4"],
        [
            "bf16, mean difference between the programs, one seed",
            f"{found['bf16_mean_difference_between_programs']:.4f}",
            f"<= {found['bf16_mean_spread_of_peft_seeds']:.4f}, peft's spread between {found['bf16_seeds']} seeds",
        ],
        [
            "bf16, mean loss, veneer",
            f"{found['bf16_mean_loss_veneer']:.4f}",
            f"peft {found['bf16_mean_loss_peft']:.4f}",
        ],
    ]
    return markdown([f"over {found['steps']} steps", "", "bar"], rows)


def plot(fp32: dict[str, list[float]], bf16: list[dict[str, list[float]]], path: Path) -> None:
    """The fp32 difference by step, and the bf16 difference beside the range of peft's seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy([abs(a - b) / abs(b) + 1e-12 for a, b in zip(fp32["veneer"], fp32["peft"], strict=True)], color=BLUE)
    left.axhline(1e-4, color=ORANGE)
    left.set_title("fp32: relative difference of each loss (line: 1e-4)", loc="left", fontsize=10)
    between = [max(step) - min(step) for step in zip(*(run["peft"] for run in bf16), strict=True)]
    apart = [[abs(a - b) for a, b in zip(run["veneer"], run["peft"], strict=True)] for run in bf16]
    right.plot(between, color=GREY, linewidth=1, label="peft, range over its seeds")
    mean = [statistics.mean(step) for step in zip(*apart, strict=True)]
    right.plot(mean, color=BLUE, linewidth=1, label="veneer - peft, one seed, mean of the seeds")
    right.set_title("bf16: differences of each loss", loc="left", fontsize=10)
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_folder(Path(scratch), "float32")
        fp32 = curves("float32", 1, args.steps, folder)
        bf16 = [curves("bfloat16", seed, args.steps, folder) for seed in range(1, args.seeds + 1)]
    found = summary(fp32, bf16)
    plot(fp32, bf16, publish("losses", found | {"fp32": fp32, "bf16": bf16}, table(found), args.out))


if __name__ == "__main__":
    main()
