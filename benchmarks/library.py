"""What does the library cost? Ratios and milliseconds, written to results/library.json.

add      a 20 MB adapter, against a durable copy of the same bytes (copy + flush), and against the floor of any library addressed
         by content: that copy and one SHA-256
verbs    list, show, resolve and alias change in a library of 10,000 adapters, in process, medians
rebuild  a catalogue of 10,000 adapters from its manifests

The surprise: a plain `cp` does not flush, and SHA-256 alone takes longer than it, so the copy compared with is a durable one.

    python benchmarks/library.py [--adapters 10000] [--rounds 9]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from veneer.adapter import Adapter, Part, Provenance
from veneer.library import Library
from veneer.library.manifest import FileRecord, Manifest, seal
from veneer.methods.lora import LoRA

RESULTS = Path(__file__).parent / "results" / "library.json"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def adapter(seed: int, *, layers: int = 28, width: int = 1489) -> Adapter:
    """About 20 MB of fp32: rank 16 on q, k, v and o of `layers` blocks."""
    generator = torch.Generator().manual_seed(seed)
    parts = tuple(
        Part(
            "lora",
            "weight",
            f"model.layers.{layer}.self_attn.{name}_proj",
            {
                "A": torch.randn(16, width, generator=generator),
                "B": torch.randn(width, 16, generator=generator),
            },
        )
        for layer in range(layers)
        for name in "qkvo"
    )
    targets = tuple(f"{name}_proj" for name in "qkvo")
    return Adapter(LoRA(rank=16, targets=targets), parts, Provenance(base="ab" * 32, base_name="bench"))


def durable_copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for path in target.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def add_once(library: Library, folder: Path, number: int) -> tuple[float, float, float, float]:
    """Seconds of a plain copy, a durable copy, one SHA-256, and an add, of the same new adapter."""
    source = folder / f"source{number}"
    adapter(number).save(source)
    content = (source / "adapter_model.safetensors").read_bytes()
    row = (
        seconds(lambda: shutil.copytree(source, folder / "plain")),
        seconds(lambda: durable_copy(source, folder / "durable")),
        seconds(lambda: hashlib.sha256(content).digest()),
        seconds(lambda: library.add(source, "bench")),
    )
    for name in ("plain", "durable", source.name):
        shutil.rmtree(folder / name)
    return row


def measure_add(folder: Path, rounds: int) -> dict[str, float]:
    """Interleaved, each round with an adapter of its own."""
    library = Library(folder / "library")
    library.add(adapter(0, layers=1), "warm")
    rows = [add_once(library, folder, number) for number in range(1, rounds + 1)]
    plain, durable, hashed, added = (list(column) for column in zip(*rows, strict=True))
    middle = {
        "plain": statistics.median(plain),
        "durable": statistics.median(durable),
        "hashed": statistics.median(hashed),
        "added": statistics.median(added),
    }
    return {
        "megabytes": round(library.resolve("bench").bytes / 1e6, 2),
        "add_ms": round(1e3 * middle["added"], 1),
        "durable_copy_ms": round(1e3 * middle["durable"], 1),
        "plain_copy_ms": round(1e3 * middle["plain"], 1),
        "sha256_ms": round(1e3 * middle["hashed"], 1),
        "add_over_durable_copy": round(middle["added"] / middle["durable"], 2),
        "add_over_durable_copy_and_hash": round(middle["added"] / (middle["durable"] + middle["hashed"]), 2),
        "best_add_over_best_durable_copy": round(min(added) / min(durable), 2),
    }


def grow(root: Path, count: int) -> None:
    """A library of `count` adapters: the manifests of one real adapter under many names, and no catalogue."""
    library = Library(root)
    first = library.add(adapter(0, layers=1, width=64), "name-00000").version
    record = library.show(first.ref)
    files = tuple(FileRecord(path=f.path, blob=f.blob, bytes=f.bytes) for f in record.files)
    library.close()
    for number in range(1, count):
        facts = {key: getattr(first, key) for key in first._fields if key != "manifest"}
        facts |= {"name": f"name-{number // 4:05d}", "version": number % 4 + 1}
        facts |= {"digest": hashlib.sha256(str(number).encode()).hexdigest(), "belonging": None, "note": ""}
        facts |= {"files": files, "parents": (), "spec": dict(record.spec), "provenance": {}, "run": {}, "metrics": {}}
        target = root / "manifests" / facts["name"] / f"{facts['version']}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(seal(Manifest(**facts)))
    for file in root.glob("catalogue.sqlite*"):
        file.unlink()


def measure_verbs(folder: Path, count: int, rounds: int) -> dict[str, float]:
    root = folder / "large"
    grow(root, count)
    library = Library(root)
    rebuilt = seconds(library.rebuild)
    versions = library.list()
    assert len(versions) == count, len(versions)
    for version in versions[: count // 10 : 4]:
        library.alias(version.ref, "production")
    name = versions[count // 2].name
    number = iter(range(10**6))
    for version in (1, 2, 3):
        library.alias(f"{name}@{version}", "production")
    verbs: dict[str, Callable[[], object]] = {
        "list_all": library.list,
        "list_newest": lambda: library.list(newest=True),
        "list_one_name": lambda: library.list(name),
        "list_hundred": lambda: library.list(limit=100),
        "show": lambda: library.show(f"{name}@2"),
        "resolve": lambda: library.resolve(name),
        "revision": library.revision,
        "alias_change": lambda: library.alias(f"{name}@{1 + next(number) % 2}", "production"),
        "rollback": lambda: library.rollback(name),
    }
    found = {}
    for verb, work in verbs.items():
        work()
        found[f"{verb}_ms"] = round(1e3 * statistics.median(seconds(work) for _ in range(rounds)), 2)
    return {"adapters": count, "rebuild_seconds": round(rebuilt, 1), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "add": measure_add(folder, asked.rounds),
            "verbs": measure_verbs(folder, asked.adapters, asked.rounds),
            "cores": os.cpu_count(),
            "load_average": round(os.getloadavg()[0], 1),
        }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
