"""Training speed and peak memory of veneer, on the batches that `peers/train_peft.py` trains on. One JSON line.

`--profile FILE` writes a Chrome trace of one step and adds the seconds by kind of kernel.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from dataclasses import dataclass

import torch
from _kernels import breakdown
from torch.profiler import record_function

from veneer.data import Batch
from veneer.inject import create, select
from veneer.methods import Method, parse
from veneer.models.load import load_base
from veneer.ops.frozen import product
from veneer.ops.native import attention, few, rows
from veneer.ops.scratch import keep_freed_memory
from veneer.plan import Work as Planned
from veneer.plan import estimate
from veneer.train.checkpoint import Cursor
from veneer.train.config import TrainConfig
from veneer.train.loop import Run, accumulate
from veneer.train.optim import FlatParameters
from veneer.train.optimizers import load_all
from veneer.types import Segment

IGNORED = -100


@dataclass(frozen=True)
class Work:
    """One step's packed rows, and the figures that the floor needs."""

    batch: Batch
    tokens: int
    label_share: float
    mean_segment: float


def packed(rows: list[torch.Tensor], labelled_from: list[int]) -> Work:
    """Rows of ids with labels from a position on, as one packed pass."""
    tokens, labels, segments = [], [], []
    for i, (ids, start) in enumerate(zip(rows, labelled_from, strict=True)):
        target = ids[1:].clone()
        target[: max(0, start - 1)] = IGNORED
        tokens.append(ids[:-1])
        labels.append(target)
        segments.append(Segment(len(ids) - 1, i, 0))
    joined = torch.cat(labels)
    weights = (joined != IGNORED).float()
    batch = Batch(torch.cat(tokens), tuple(segments), joined, weights, tuple(range(len(rows))))
    total = sum(len(r) for r in rows)
    mean = sum(len(r) ** 2 for r in rows) / total
    return Work(batch, total, float(weights.sum()) / total, mean)


def fixed(rows: int, length: int, vocab: int) -> Work:
    """Full rows, the first half not labelled."""
    ids = torch.randint(3, vocab, (rows, length))
    return packed(list(ids), [length // 2] * rows)


def real(rows: int, length: int, vocab: int, rng: random.Random) -> Work:
    """Log-normal lengths (mean about 120), the last third labelled, nothing padded."""
    lengths = [min(length, max(24, int(rng.lognormvariate(4.6, 0.7)))) for _ in range(rows)]
    return packed([torch.randint(3, vocab, (n,)) for n in lengths], [n * 2 // 3 for n in lengths])


def gemm_rate(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of the fastest of many products of the shape 2048x576x1536, by torch's two ways, in this process."""
    a, b = torch.randn(2048, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for multiply in (lambda: torch.mm(a, b.t()), lambda: product(a, b.t())):
            begin = time.perf_counter()
            for _ in range(5):
                multiply()
            best = max(best, 5 * 2 * 2048 * 576 * 1536 / (time.perf_counter() - begin))
    return best


def floor_flops(run: Run, work: Work) -> float:
    """FLOPs that a LoRA step needs for each useful token: 4 (N + dV share) + 6 P + 7 L d_attn s."""
    config = run.base.config
    weights = sum(s.in_features * s.out_features for s in run.base.layout.groups if s.name != "head")
    head = config.hidden * config.vocab
    attention = 7 * config.layers * config.heads * config.head_dim * work.mean_segment
    return 4 * (weights + head * work.label_share) + 6 * run.parameters.count + attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--lengths", choices=["fixed", "real"], default="fixed")
    parser.add_argument("--passes", type=int, default=1, help="passes a step, each of --batch rows")
    parser.add_argument("--profile", metavar="FILE", help="write a Chrome trace of one step")
    args = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(0)
    rng = random.Random(0)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    quantize = "nf4-dq" if args.nf4 else None
    base = load_base(args.model, dtype=dtype, quantize=quantize)
    spec = parse({"kind": "dora" if args.dora else "lora", "rank": args.rank, "alpha": 2 * args.rank})
    parameters = FlatParameters(create(base, spec, torch.Generator().manual_seed(0)), base.decoder.device)
    config = TrainConfig(lr=1e-4)
    optimizer = load_all()["adamw"](parameters, config, None)
    run = Run(base, parameters, optimizer, None, [], config, Cursor())  # type: ignore[arg-type]  # no data set: made here

    def make() -> Work:
        if args.lengths == "fixed":
            return fixed(args.batch, args.seq, base.config.vocab)
        return real(args.batch, args.seq, base.config.vocab, rng)

    def update() -> None:
        parameters.grad_norm()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    resting = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gemm = gemm_rate(dtype)
    rates = []
    for step in range(args.steps + 1):
        works = [make() for _ in range(args.passes if step else 1)]  # the first step only warms up
        begin = time.perf_counter()
        accumulate(run, [work.batch for work in works], sum(float(work.batch.weights.sum()) for work in works))
        update()
        if step:
            rates.append(sum(work.tokens for work in works) / (time.perf_counter() - begin))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = sorted(rates)[len(rates) // 2]
    work = works[-1]
    flops = floor_flops(run, work)
    gemm = max(gemm, gemm_rate(dtype))
    floor = gemm / flops
    result = {
        "peer": "veneer",
        "useful_tokens_per_s": round(rate, 2),
        "peak_bytes": peak,
        "resting_bytes": resting,
        "predicted_bytes": predicted_bytes(run, spec, work, str(dtype).removeprefix("torch."), quantize),
        "tokens_a_pass": work.tokens,
        "trainable": parameters.count,
        "gemm_flops_per_s": round(gemm),
        "floor_tokens_per_s": round(floor, 1),
        "fraction_of_floor": round(rate / floor, 4),
        "page_faults": faults,
        "args": vars(args),
    }
    if args.profile:
        label_native()
        labels = float(work.batch.weights.sum())
        result["breakdown_seconds"] = breakdown(lambda: accumulate(run, [work.batch], labels), update, args.profile)
    print(json.dumps(result))


def predicted_bytes(run: Run, spec: Method, work: Work, dtype: str, quantize: str | None) -> dict[str, int]:
    """What `veneer plan` says of this run, by category."""
    base = run.base
    plan = Planned(work.tokens, work.label_share, dtype, quantize)
    return dict(estimate(base.config, base.layout, spec, select(base.shape, spec).targets, plan).bytes)


def label_native() -> None:
    """The profiler sees torch's operators only: give the kernels in C a name of theirs."""
    kinds = {
        attention: {"forward": "attention", "backward": "attention"},
        few: {"product": "product"},
        rows: {
            **dict.fromkeys(("rms_forward", "rms_backward", "rotary", "gated_forward", "gated_backward"), "rows"),
            "scale_backward": "rows",
            "cross_entropy": "cross_entropy",
            "dequantise_four_bit": "dequantise",
        },
    }
    for module, functions in kinds.items():
        for name, kind in functions.items():
            setattr(module, name, record_function(f"veneer::{kind}")(getattr(module, name)))


if __name__ == "__main__":
    main()
