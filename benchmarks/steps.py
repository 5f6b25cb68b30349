"""One optimiser step of DoRA beside LoRA's, and on an NF4 base beside bf16: ratios of interleaved steps.

    python benchmarks/steps.py [--rounds 9] [--tokens 2048] [--rank 8]

All of them take turns in one process, step by step, on the same rows of 512 full tokens, half of them labelled; every ratio is
the median over rounds of steps that stand side by side. About three minutes. Results go to `results/steps.json` and `.md`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from _report import RESULTS, Row, markdown, publish, row_table, say, spread
from train_veneer import fixed

from veneer.data import Batch
from veneer.inject import create
from veneer.methods import parse
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.ops.scratch import keep_freed_memory
from veneer.train.checkpoint import Cursor
from veneer.train.config import TrainConfig
from veneer.train.loop import Run, accumulate
from veneer.train.optim import FlatParameters
from veneer.train.optimizers import load_all

ROW = 512
CASES: dict[str, tuple[str, str | None]] = {
    "lora, bf16": ("lora", None),
    "dora, bf16": ("dora", None),
    "lora, nf4": ("lora", "nf4"),
    "lora, nf4-dq": ("lora", "nf4-dq"),
    "dora, nf4": ("dora", "nf4"),
}
RATIOS: tuple[tuple[str, str, float | None], ...] = (
    ("dora, bf16", "lora, bf16", 1.10),
    ("lora, nf4", "lora, bf16", 1.25),
    ("lora, nf4-dq", "lora, bf16", 1.25),
    ("dora, nf4", "lora, nf4", None),
)
"""What is compared: this case, over that one, and the bar it should stay below."""


def run_of(base: Base, kind: str, rank: int) -> Run:
    """A run at its start, without data of its own."""
    spec = parse({"kind": kind, "rank": rank, "alpha": 2 * rank})
    parameters = FlatParameters(create(base, spec, torch.Generator().manual_seed(0)), base.decoder.device)
    config = TrainConfig(lr=1e-4)
    optimizer = load_all()["adamw"](parameters, config, None)
    return Run(base, parameters, optimizer, None, [], config, Cursor())  # type: ignore[arg-type]  # no data set: made here


def step(run: Run, batch: Batch) -> float:
    """Seconds of one whole optimiser step."""
    begin = time.perf_counter()
    accumulate(run, [batch], float(batch.weights.sum()))
    run.parameters.grad_norm()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - begin


def measured(runs: dict[str, Run], rounds: int, tokens: int, vocab: int) -> dict[str, list[float]]:
    """Seconds by case, one step of each in every round. The order turns round, so that no case always follows the same one."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds + 1):
        batch = fixed(max(1, tokens // ROW), min(ROW, tokens), vocab).batch
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken = step(runs[name], batch)
            if number > 0:  # the first round warms up
                seconds[name].append(taken)
        say(f"round {number}/{rounds}")
    return seconds


def rows_of(seconds: dict[str, list[float]]) -> list[Row]:
    """The paired ratios of every round."""
    return [
        Row(
            f"{ours}, step",
            f"{theirs}, step",
            [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)],
            bar,
            True,
        )
        for ours, theirs, bar in RATIOS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048, help="in one step")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for steps.json and .md")
    args = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(0)
    bases = {q: load_base(args.base, dtype="bfloat16", quantize=q) for q in dict.fromkeys(q for _, q in CASES.values())}
    runs = {name: run_of(bases[quantize], kind, args.rank) for name, (kind, quantize) in CASES.items()}
    seconds = measured(runs, args.rounds, args.tokens, bases[None].config.vocab)
    rows = rows_of(seconds)
    table = row_table(rows) + "\n"
    head = ["case", "seconds per step", "tokens/s"]
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    table += markdown(head, [[n, spread(seconds[n]), f"{args.tokens / m:.0f}"] for n, m in middle.items()])
    found = {"tokens": args.tokens, "rank": args.rank, "ratios": [asdict(row) for row in rows], "seconds": seconds}
    publish("steps", found, table, args.out)


if __name__ == "__main__":
    main()
