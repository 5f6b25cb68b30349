"""The kernels that a decoding step lives on, against the rate at which this machine reads memory.

    python benchmarks/decoding.py [--rounds 25] [--against SRC]

Every weight and every adapter is read once a step, so no kernel can be quicker than a plain sum over as many bytes; 1.00 is that
limit. All take turns in one process. With `--against` the kernels of another source tree (the `src` folder of another checkout)
are compiled too and take their turns on the same memory: pages lie differently in every process, which moves these figures by a
third and hides what a change is worth. Under a minute. Results go to `results/decoding.json` and `.md`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, Row, markdown, publish, row_table, say, spread
from serve_veneer import Adapters

from veneer.engine.batch import prepare
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.ops.native import build, few, mixed

STREAMS = 8


@dataclass(frozen=True, eq=False)
class Case:
    """Work that reads `bytes` once."""

    name: str
    bytes: int
    work: Callable[[], object]


def products(base: Base, rows: int) -> Case:
    """All projections of a step but the head, for `rows` rows."""
    held = [group.frozen for name, group in base.decoder.groups.items() if name != "head"]
    inputs = {f.in_features: torch.randn(rows, f.in_features).to(torch.bfloat16) for f in held}
    size = sum(getattr(f, "nbytes", 2 * f.in_features * f.out_features) for f in held)
    form = base.quantize or "bf16"

    def work() -> None:
        for frozen in held:
            frozen.apply(inputs[frozen.in_features])

    return Case(f"products of {rows} row{'s' * (rows > 1)}, {form}", size, work)


def updates(base: Base, rank: int) -> Case:
    """The low-rank updates of a step in which every stream has an adapter of its own."""
    adapters = Adapters(base, rank)
    banks = [prepare([(adapters[i], 1.0)], base).bank for i in range(STREAMS)]
    jobs, size = [], 0
    for name, group in base.decoder.groups.items():
        if name not in banks[0].groups:
            continue
        packs = [bank.groups[name].packs[0] for bank in banks]
        size += sum(t.nbytes for pack in packs for t in pack.tensors() if t is not None)
        made = mixed.jobs([(row, 1, pack.factors) for row, pack in enumerate(packs) if pack.factors is not None])
        if made is None or any(pack.factors is None for pack in packs):
            raise SystemExit(f"the kernel for updates does not take rank {rank} on {name}")
        frozen = group.frozen
        y, x = (torch.randn(STREAMS, n).to(torch.bfloat16) for n in (frozen.out_features, frozen.in_features))
        jobs.append((made, y, x))

    def work() -> None:
        for made, y, x in jobs:
            made.add(y, x)

    return Case(f"updates of {STREAMS} rows by {STREAMS} adapters, rank {rank}", size, work)


def kernels_of(source: Path) -> ctypes.CDLL:
    """The kernels of another source tree, compiled by its own rules."""
    ask = "from veneer.ops.native.build import library; print(library()._name)"
    done = subprocess.run(
        [sys.executable, "-c", ask],
        env={**os.environ, "PYTHONPATH": str(source.resolve())},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{source} has no kernels that run here:\n{done.stderr[-1000:]}")
    return build._typed(ctypes.CDLL(done.stdout.strip()))


def use(kernels: ctypes.CDLL | None) -> None:
    for module in (few, mixed):
        module.library = lambda: kernels  # type: ignore[attr-defined]


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measured(case: Case, sides: dict[str, ctypes.CDLL | None], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side and of reading as many bytes, taking turns."""
    plain = torch.ones(case.bytes // 8, dtype=torch.int64)
    found: dict[str, list[float]] = {"reading": [], **{side: [] for side in sides}}
    for number in range(rounds + 2):
        taken = {"reading": seconds(plain.sum)}
        for side, kernels in sides.items():
            use(kernels)
            taken[side] = seconds(case.work)
        if number > 1:  # the first two warm up
            for side, value in taken.items():
                found[side].append(value)
    use(sides["ours"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--against", type=Path, metavar="SRC", help="the `src` folder of another checkout")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for decoding.json and .md")
    args = parser.parse_args()

    sides = {"ours": build.library()}
    if sides["ours"] is None:
        raise SystemExit("the kernels do not run here: no compiler, or a CPU without AVX512-BF16")
    if args.against is not None:
        sides["theirs"] = kernels_of(args.against)
    rows: list[Row] = []
    lines: list[list[str]] = []
    raw: dict[str, Any] = {}
    with torch.inference_mode():
        for quantize in (None, "bf12", "int8"):
            base = load_base(args.base, dtype="bfloat16", quantize=quantize)
            cases = [products(base, 1), products(base, STREAMS)]
            for case in [*cases, updates(base, args.rank)] if quantize is None else cases:
                found = measured(case, sides, args.rounds)
                limit = [a / b for a, b in zip(found["reading"], found["ours"], strict=True)]
                rows.append(Row(case.name, "reading as many bytes", limit))
                if "theirs" in found:
                    ratios = [a / b for a, b in zip(found["theirs"], found["ours"], strict=True)]
                    rows.append(Row(case.name, "the other source's kernels", ratios))
                rates = [f"{case.bytes / statistics.median(found[side]) / 1e9:.1f}" for side in ("ours", "reading")]
                taken = spread([1e3 * value for value in found["ours"]])
                lines.append([case.name, f"{case.bytes / 1e6:.0f}", taken, *rates])
                raw[case.name] = found
                say(f"{case.name}: {rows[-1].median:.2f} of {rows[-1].against}")
    table = row_table(rows) + "\n" + markdown(["what", "MB", "ms", "GB/s", "GB/s of a plain sum"], lines)
    publish("decoding", {"ratios": [asdict(row) for row in rows], "seconds": raw}, table, args.out)


if __name__ == "__main__":
    main()
