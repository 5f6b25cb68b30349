"""Veneer's engine, one JSON line: speeds, exactness in company, memory of adapters, loading beside streams, a full disk.

    python benchmarks/serve_veneer.py BASE [--only speeds ...] [--mixes base,drawn,same,mixed,single] [--quantize int8]

Random adapters on all linear layers of every block. What is compared within this process is taken in turn.

    speeds   tokens a second of each mix: `decode` once every stream decodes, `whole` from the first request to the last token;
             `drawn` is the base by temperature 0.8 and top-p 0.95, the others are greedy
    exact    logits of rows in a mixed batch against the same rows alone
    memory   what an adapter adds to the process, and what the engine counts for it, over its file
    cold     delays between tokens of other streams while adapters are loaded back to back, and without
    zipf     throughput over adapters on disk by Zipf's law with memory for 50, against 5 adapters by the same law
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

import veneer as vn
from veneer.adapter import Adapter, Provenance
from veneer.base.quantized import QuantizedFrozen
from veneer.diagnose import probed
from veneer.engine import Engine, Limits, Request, Sampling
from veneer.library import Library
from veneer.server.run import settle_collector
from veneer.server.shelf import Shelf

PROMPT = 40
"""Tokens of a prompt: about what the chats of the rivals' drivers have."""

GREEDY, DRAWN = Sampling(), Sampling(0.8, top_p=0.95)

_prompts = itertools.count()


def prompt() -> list[int]:
    """One that nobody has asked before, so that no prefix is reused."""
    generator = torch.Generator().manual_seed(next(_prompts))
    return torch.randint(1000, 40000, (PROMPT,), generator=generator).tolist()


class Adapters:
    """Random adapters of one shape, quickly made: each is another window of one pool of numbers, in bf16 as it would be saved."""

    def __init__(self, base: Any, rank: int) -> None:
        self._shape = vn.create(base, vn.LoRA(rank=rank, alpha=rank), torch.Generator().manual_seed(0))
        self._pool = (torch.randn(1 << 23, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()

    def __getitem__(self, seed: int) -> Adapter:
        place = 64 * seed

        def window(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal place
            place = place % (len(self._pool) - tensor.numel())
            found = self._pool[place : place + tensor.numel()].reshape(tensor.shape)
            place += tensor.numel()
            return found

        return self._shape.map_tensors(window)


def weight_bytes(base: Any) -> int:
    """Bytes of the base that every greedy step reads: of a head that has a sketch, the sketch."""
    return sum(_bytes(group.frozen) for group in base.decoder.groups.values())


def _bytes(frozen: Any) -> int:
    if (sketch := vars(frozen).get("sketch")) is not None:
        return sketch.nbytes
    dense = frozen.in_features * frozen.out_features * frozen.dtype.itemsize
    return frozen.nbytes if isinstance(frozen, QuantizedFrozen) else dense


# -- speeds ------------------------------------------------------------------------------------------------------------


def rates(engine: Engine, names: Sequence[str | None], tokens: int, how: Sampling = GREEDY) -> tuple[float, float]:
    """Tokens a second: once every stream decodes, and in all."""
    start = time.perf_counter()
    for name in names:
        engine.submit(Request(prompt(), adapter=name, max_tokens=tokens, ignore_eos=True, sampling=how))
    while engine.scheduler.waiting or any(not seq.decoding for seq in engine.scheduler.running):
        engine.step()
    reading, decoded = time.perf_counter(), 0
    while engine.busy:
        engine.step()
        decoded += 0 if engine.last_step is None else engine.last_step.decoded
    end = time.perf_counter()
    return decoded / (end - reading), len(names) * tokens / (end - start)


def speeds(base: Any, args: argparse.Namespace) -> dict[str, Any]:
    engine, adapters = Engine(base), Adapters(base, args.rank)
    names: list[str | None] = []
    mixes: dict[str, list[str | None]] = {"base": [None] * args.adapters, "single": [None]}
    mixes["drawn"] = mixes["base"]
    how = {name: DRAWN if name == "drawn" else GREEDY for name in args.mixes}
    if {"same", "mixed"} & set(args.mixes):
        for i in range(args.adapters):
            names.append(f"a{i}")
            engine.add(f"a{i}", adapters[i])
        mixes |= {"same": ["a0"] * args.adapters, "mixed": names}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in args.mixes}
    for name in args.mixes:
        rates(engine, mixes[name], 8, how[name])
    for _ in range(args.rounds):
        for name in args.mixes:
            found[name].append(rates(engine, mixes[name], args.tokens, how[name]))
    result: dict[str, Any] = {}
    for name, pairs in found.items():
        result[f"{name}_decode"] = round(statistics.median(decode for decode, _ in pairs), 2)
        result[f"{name}_whole"] = round(statistics.median(whole for _, whole in pairs), 2)
        if name != "base" and "base" in found:
            ratios = [a / b for (a, _), (b, _) in zip(pairs, found["base"], strict=True)]
            result[f"{name}_over_base"] = round(statistics.median(ratios), 4)
    if names:
        weights, held = weight_bytes(base), engine.residency.slots.charged
        result["byte_bound"] = round(weights / (weights + held), 4)
    return result


# -- exactness ---------------------------------------------------------------------------------------------------------


def logits_of(base: Any, asked: Sequence[tuple[str | None, list[int]]], adapters: Adapters, tokens: int) -> list[Any]:
    """For each request its greedy tokens and the logits `[tokens, vocab]` they were chosen from."""
    engine = Engine(base)
    for name in {name for name, _ in asked if name is not None}:
        engine.add(name, adapters[int(name)])
    seen: dict[str, list[torch.Tensor]] = {str(i): [] for i in range(len(asked))}
    run = engine._runner.run

    def recording(*args: Any, greedy: bool) -> Any:
        scores = run(*args)  # all of them, whoever asks for the likeliest alone
        for batch in scores:
            for seq, row in zip(batch.seqs, batch.logits, strict=True):
                seen[seq.request].append(row.float().clone())
        return scores

    engine._runner.run = recording  # type: ignore[method-assign]
    done = engine.complete(Request(p, adapter=a, max_tokens=tokens, ignore_eos=True) for a, p in asked)
    return [(answer[0].tokens, torch.stack(seen[str(i)])) for i, answer in enumerate(done)]


def company(base: Any, asked: Sequence[tuple[str | None, list[int]]], adapters: Adapters, tokens: int) -> float:
    """How far rows in one batch are from the same rows alone: the norm of the difference over that of the logits, the worst row.

    Compared as long as both chose the same tokens.
    """
    worst = 0.0
    together = logits_of(base, asked, adapters, tokens)
    for one, (words, logits) in zip(asked, together, strict=True):
        ((alone, expected),) = logits_of(base, [one], adapters, tokens)
        same = next((i for i, (a, b) in enumerate(zip(words, alone, strict=True)) if a != b), tokens - 1) + 1
        difference = (logits[:same] - expected[:same]).norm() / expected[:same].norm()
        worst = max(worst, float(difference))
    return worst


def exact(base: Any, args: argparse.Namespace) -> dict[str, Any]:
    adapters, n = Adapters(base, args.rank), args.adapters
    prompts = [prompt() for _ in range(n)]
    mixed = company(base, [(str(i), p) for i, p in enumerate(prompts)], adapters, args.tokens // 4)
    plain = company(base, [(None, p) for p in prompts], adapters, args.tokens // 4)
    return {"mixed_from_alone": mixed, "base_from_alone": plain}


# -- a library on disk -------------------------------------------------------------------------------------------------


@dataclass
class Stock:
    """A library with adapters n0, n1, ...; `resident` are the bytes of one in memory and `file` those on disk."""

    library: Library
    file: int
    resident: int

    def engine(self, base: Any, room: int, streams: int) -> Engine:
        """With memory for `room` adapters (and the little by which a file is larger than what is kept of it)."""
        budget = room * self.resident + max(0, self.file - self.resident)
        return Engine(base, source=Shelf(self.library), limits=Limits(streams=streams), adapter_bytes=budget)


def _as_saved_by_a_run(adapter: Adapter, base: Any) -> Adapter:
    """With what it said, and where it came from: looked at when it is loaded."""
    samples = {target: base.samples(target) for target in adapter.targets}
    origin = Provenance(base.identity, base.name, samples, trained_on=base.precision)
    return probed(replace(adapter, provenance=origin), base)


@contextmanager
def stocked(base: Any, count: int, rank: int) -> Iterator[Stock]:
    with tempfile.TemporaryDirectory() as folder:
        library, adapters = Library(Path(folder) / "library"), Adapters(base, rank)
        for i in range(count):
            library.add(_as_saved_by_a_run(adapters[i], base), f"n{i}")
        stock = Stock(library, library.resolve("n0").bytes, 0)
        probe = Engine(base)
        stock.resident = probe.residency.payload(probe.add("probe", adapters[0])).bytes
        probe.close()
        yield stock


def resident(engine: Engine, name: str) -> None:
    """Load an adapter and wait for it."""
    engine.load(name)
    while engine.loading:
        engine.wait(1.0)
        engine.publish()


def memory(base: Any, args: argparse.Namespace) -> dict[str, Any]:
    process, count = psutil.Process(), 32
    with stocked(base, count + 4, args.rank) as stock:
        engine = stock.engine(base, count + 4, args.adapters)
        for i in range(4):  # what the first loads cost once
            resident(engine, f"n{i}")
        rates(engine, ["n0", "n1", "n2", "n3"], 8)
        before = process.memory_info().rss
        for i in range(4, count + 4):
            resident(engine, f"n{i}")
        grown = process.memory_info().rss - before
        engine.close()
        file = stock.library.show("n0").files
        weights = max(f.bytes for f in file)
        return {"counted_over_file": stock.resident / weights, "grown_over_file": grown / count / weights}


def cold(base: Any, args: argparse.Namespace) -> dict[str, Any]:
    with stocked(base, 24, args.rank) as stock:
        engine = stock.engine(base, 8, args.adapters)
        names = itertools.cycle(f"n{i}" for i in range(24))

        def gaps(loading: bool) -> list[float]:
            """Seconds between the tokens of every stream; an adapter is always being loaded, or none ever is."""
            for _ in range(args.adapters):
                engine.submit(Request(prompt(), max_tokens=args.gap_tokens, ignore_eos=True))
            found, last = [], None
            while engine.busy:
                if loading and not engine.loading:
                    engine.load(next(names))
                engine.step()
                step, now = engine.last_step, time.perf_counter()
                if step is not None and step.decoded == args.adapters:
                    if last is not None:
                        found.append(now - last)
                    last = now
            while engine.loading:
                engine.wait(1.0)
                engine.publish()
            return found

        def p99(values: Sequence[float]) -> float:
            return sorted(values)[int(len(values) * 0.99)]

        gaps(True)
        added, seconds = [], []
        for _ in range(args.rounds):
            quiet, busy = gaps(False), gaps(True)
            added.append((p99(busy) - p99(quiet)) / statistics.median(quiet))
            seconds.append(statistics.median(busy) / statistics.median(quiet))
        loads = engine.residency.load_seconds
        engine.close()
        return {
            "added_p99_steps": added,
            "step_while_loading": seconds,
            "load_ms": round(1e3 * statistics.median(loads), 2),
        }


def zipf(base: Any, args: argparse.Namespace) -> dict[str, Any]:
    room, few = 50, 5
    with stocked(base, args.on_disk, args.rank) as stock:
        weights, found = weight_bytes(base), dict[str, list[dict[str, float]]]()
        for number in range(args.rounds):
            for side, count in (("few", few), ("many", args.on_disk)):
                found.setdefault(side, []).append(_traffic(base, stock, args, room, count, seed=number))
        for sides in found.values():
            for side in sides:
                side["bound"] = weights / (weights + side["distinct"] * stock.resident)
    ratios = [m["rate"] / f["rate"] for m, f in zip(found["many"], found["few"], strict=True)]
    bounds = [m["bound"] / f["bound"] for m, f in zip(found["many"], found["few"], strict=True)]
    return {"zipf_over_few": ratios, "byte_bound": statistics.median(bounds), "sides": found}


def _traffic(
    base: Any, stock: Stock, args: argparse.Namespace, room: int, count: int, *, seed: int
) -> dict[str, float]:
    """Answers of 32 to 96 tokens by adapters drawn from `count`, after the memory has filled: tokens a second."""
    engine, draw = stock.engine(base, room, args.adapters), random.Random(seed)
    law = [1 / (rank + 1) for rank in range(count)]

    def name() -> str:
        return f"n{draw.choices(range(count), law)[0]}"

    for _ in range(min(count, room) * 4):
        resident(engine, name())
    counters = engine.residency.slots.counters
    lengths = random.Random(seed + 1000)
    loads, steps, distinct = counters.loads, 0, 0
    start = time.perf_counter()
    tokens = 0
    for _ in range(args.requests):
        length = lengths.randint(32, 96)
        tokens += length
        engine.submit(Request(prompt(), adapter=name(), max_tokens=length, ignore_eos=True))
    while engine.busy:
        engine.step()
        if engine.last_step is None:
            engine.wait(1.0)
        else:
            steps, distinct = steps + 1, distinct + engine.last_step.adapters
    seconds = time.perf_counter() - start
    engine.close()
    return {"rate": tokens / seconds, "distinct": distinct / steps, "loads": counters.loads - loads}


# -- the command -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapters", type=int, default=8, help="and streams")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--gap-tokens", type=int, default=220)
    parser.add_argument("--on-disk", type=int, default=1000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize")
    parser.add_argument(
        "--mixes", type=lambda text: text.split(","), default=["base", "drawn", "same", "mixed", "single"]
    )
    rows = {"speeds": speeds, "exact": exact, "memory": memory, "cold": cold, "zipf": zipf}
    parser.add_argument("--only", choices=list(rows), action="append")
    args = parser.parse_args()
    base = vn.load_base(args.model, dtype=args.dtype, quantize=args.quantize)
    settle_collector()
    result: dict[str, Any] = {"peer": "veneer"}
    for name in args.only or rows:
        result[name] = rows[name](base, args)
    print(json.dumps({**result, "args": vars(args)}))


if __name__ == "__main__":
    main()
