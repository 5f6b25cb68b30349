"""Training speed and peak memory of veneer, on the batches that `peers/train_peft.py` trains on. One JSON line."""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from dataclasses import dataclass

import torch

from veneer.data import Batch
from veneer.inject import create, select
from veneer.methods import parse
from veneer.models.load import load_base
from veneer.ops.scratch import keep_freed_memory
from veneer.train.checkpoint import Cursor
from veneer.train.config import TrainConfig
from veneer.train.loop import Run, accumulate
from veneer.train.optim import OPTIMIZERS, FlatParameters
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


def gemm_rate(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of the fastest of several products of the shape 2048x576x1536, in this process."""
    a, b = torch.randn(2048, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(5):
            torch.mm(a, b.t())
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
    parser.add_argument("--profile", metavar="FILE", help="write a Chrome trace of one step")
    args = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(0)
    rng = random.Random(0)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    base = load_base(args.model, dtype=dtype, quantize="nf4-dq" if args.nf4 else None)
    spec = parse({"kind": "dora" if args.dora else "lora", "rank": args.rank, "alpha": 2 * args.rank})
    parameters = FlatParameters(create(base, spec, torch.Generator().manual_seed(0)), base.decoder.device)
    config = TrainConfig(lr=1e-4)
    optimizer = OPTIMIZERS["adamw"](parameters, config, None)
    run = Run(base, parameters, optimizer, None, [], config, Cursor())  # type: ignore[arg-type]  # no data set: made here
    assert select(base.shape, spec).targets

    vocab, seconds, works = base.config.vocab, [], []
    for _ in range(args.steps + 1):
        work = fixed(args.batch, args.seq, vocab) if args.lengths == "fixed" else real(args.batch, args.seq, vocab, rng)
        begin = time.perf_counter()
        accumulate(run, [work.batch], float(work.batch.weights.sum()))
        run.parameters.grad_norm()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
        works.append(work)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rates = sorted(w.tokens / s for w, s in zip(works[1:], seconds[1:], strict=True))
    rate = rates[len(rates) // 2]
    flops = floor_flops(run, works[-1])
    gemm = gemm_rate(dtype)
    result = {
        "peer": "veneer",
        "useful_tokens_per_s": round(rate, 2),
        "peak_bytes": peak,
        "trainable": parameters.count,
        "gemm_flops_per_s": round(gemm),
        "floor_tokens_per_s": round(gemm / flops, 1),
        "fraction_of_floor": round(rate * flops / gemm, 4),
        "page_faults": faults,
        "args": vars(args),
    }
    if args.profile:
        result["breakdown_seconds"] = profile(run, works[-1], args.profile)
    print(json.dumps(result))


def profile(run: Run, work: Work, path: str) -> dict[str, float]:
    """Self seconds of one step by operator, the ten largest, and a trace in `path`."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU]) as trace:
        accumulate(run, [work.batch], float(work.batch.weights.sum()))
    trace.export_chrome_trace(path)
    rows = sorted(trace.key_averages(), key=lambda row: -row.self_cpu_time_total)
    return {row.key: round(row.self_cpu_time_total / 1e6, 4) for row in rows[:10]}


if __name__ == "__main__":
    main()
