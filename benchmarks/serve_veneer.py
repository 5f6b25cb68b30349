"""Decode speed of veneer's engine, one JSON line: base, the same adapter, different adapters; loading beside streams; a Zipf mix.

    python benchmarks/serve_veneer.py BASE [--adapters 8] [--rank 16] [--tokens 48] [--only NAME]

Random adapters on all linear layers. The rows of one process are taken in turn, and each figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import veneer as vn
from veneer.engine import Engine, Found, Request

PROMPT = list(range(1000, 1040))


def adapter_of(base: Any, seed: int, rank: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    fresh = vn.create(base, vn.LoRA(rank=rank, alpha=rank), generator)
    return fresh.map_tensors(lambda t: torch.randn(t.shape, generator=generator) * 0.02)


def decode_rate(engine: Engine, names: list[str | None], tokens: int) -> float:
    """Tokens a second over the steps in which every stream decodes."""
    for place, name in enumerate(names):
        prompt = [token + 50 * place for token in PROMPT]
        engine.submit(Request(prompt, adapter=name, max_tokens=tokens, ignore_eos=True))
    while any(not seq.decoding for seq in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    start, decoded = time.perf_counter(), 0
    while engine.busy:
        engine.step()
        decoded += 0 if engine.last_step is None else engine.last_step.decoded
    return decoded / (time.perf_counter() - start)


def speeds(base: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of every mix, and the byte bound of different adapters against the base."""
    engine = Engine(base)
    names: list[str | None] = []
    for i in range(args.adapters):
        names.append(f"a{i}")
        engine.add(f"a{i}", adapter_of(base, i, args.rank))
    mixes: dict[str, list[str | None]] = {
        "base": [None] * args.adapters,
        "same": ["a0"] * args.adapters,
        "mixed": names,
        "single": [None],
    }
    found: dict[str, list[float]] = {name: [] for name in mixes}
    decode_rate(engine, mixes["mixed"], 8)
    for _ in range(args.rounds):
        for name, mix in mixes.items():
            found[name].append(decode_rate(engine, mix, args.tokens))
    held = engine.residency.slots.charged
    weights = sum(
        g.frozen.in_features * g.frozen.out_features * g.frozen.dtype.itemsize for g in base.decoder.groups.values()
    )
    return {
        **{name: round(statistics.median(rates), 2) for name, rates in found.items()},
        "mixed_over_base": statistics.median(m / b for m, b in zip(found["mixed"], found["base"], strict=True)),
        "same_over_base": statistics.median(s / b for s, b in zip(found["same"], found["base"], strict=True)),
        "byte_bound": weights / (weights + held),
    }


class Shelf:
    """Adapter folders on disk."""

    def __init__(self, folder: Path, digests: dict[str, str], size: int) -> None:
        self.folder, self.digests, self.size = folder, digests, size

    def resolve(self, name: str) -> Found:
        path = self.folder / name
        return Found(name, self.digests[name], self.size, lambda: vn.Adapter.load(path), name)


def shelf_of(base: Any, folder: Path, count: int, rank: int) -> Shelf:
    """`count` adapters of two layers' projections: small, so that a thousand fit on any disk."""
    digests = {}
    method = vn.LoRA(rank=rank, targets=("q_proj", "v_proj"))
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        adapter = vn.create(base, method, generator).map_tensors(
            lambda t, g=generator: (torch.randn(t.shape, generator=g) * 0.02).bfloat16()
        )
        adapter.save(folder / f"n{i}")
        digests[f"n{i}"] = adapter.digest
    size = sum(t.nbytes for part in adapter.parts for t in part.tensors.values())
    return Shelf(folder, digests, size)


def zipf(base: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Throughput over `--on-disk` adapters by Zipf's law with memory for 50, against 5 adapters."""
    with tempfile.TemporaryDirectory() as folder:
        shelf = shelf_of(base, Path(folder), args.on_disk, 8)
        draw = random.Random(0)
        weights = [1 / (rank + 1) for rank in range(args.on_disk)]
        many = [f"n{i}" for i in draw.choices(range(args.on_disk), weights, k=args.requests)]
        few = [f"n{draw.randrange(5)}" for _ in range(args.requests)]
        rates: dict[str, list[float]] = {"few": [], "many": []}
        for _ in range(args.rounds):
            for name, asked in (("few", few), ("many", many)):
                engine = Engine(base, source=shelf, adapter_bytes=int(50.5 * shelf.size))
                start = time.perf_counter()
                done = engine.complete(
                    Request(PROMPT, adapter=one, max_tokens=args.tokens, ignore_eos=True) for one in asked
                )
                rates[name].append(sum(a[0].usage.completion for a in done) / (time.perf_counter() - start))
                engine.close()
        ratio = statistics.median(m / f for m, f in zip(rates["many"], rates["few"], strict=True))
    return {"zipf_over_few": ratio, "on_disk": args.on_disk, "memory_for": 50}


def cold(base: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of other streams with and without an adapter being loaded: the added 99th percentile, in median steps."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cold"
        adapter_of(base, 99, args.rank).save(path)
        engine = Engine(base)

        def steps(during: Callable[[], object]) -> list[float]:
            for _ in range(8):
                engine.submit(Request(PROMPT, max_tokens=100, ignore_eos=True))
            seconds: list[float] = []
            while engine.busy:
                if len(seconds) % 25 == 10:
                    during()
                engine.step()
                if engine.last_step is not None and not engine.last_step.prefilled:
                    seconds.append(engine.last_step.seconds)
            return seconds

        found = vn.Adapter.load(path)
        counter = iter(range(10_000))

        def load_one() -> None:
            shelf = Found("cold", f"cold-{next(counter)}", 10_000_000, lambda: vn.Adapter.load(path), "cold")
            from veneer.engine.source import Recipe

            engine.residency.want(Recipe.of([(shelf, 1.0)]), time.monotonic())

        quiet, loading = steps(lambda: None), steps(load_one)
        file = sum(p.stat().st_size for p in path.iterdir())
        engine.add("warm", found)
        held = engine.residency.payload(found.digest).bytes
    step = statistics.median(quiet)

    def p99(values: list[float]) -> float:
        return sorted(values)[int(len(values) * 0.99)]

    return {"load_p99_added_steps": (p99(loading) - p99(quiet)) / step, "resident_over_file": held / file}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--on-disk", type=int, default=1000)
    parser.add_argument("--quantize")
    parser.add_argument("--only", choices=["speeds", "zipf", "cold"], action="append")
    args = parser.parse_args()
    base = vn.load_base(args.model, dtype="bfloat16", quantize=args.quantize)
    rows = {"speeds": speeds, "zipf": zipf, "cold": cold}
    result: dict[str, Any] = {"peer": "veneer"}
    for name in args.only or rows:
        result |= rows[name](base, args)
    print(json.dumps({**result, "args": vars(args)}))


if __name__ == "__main__":
    main()
