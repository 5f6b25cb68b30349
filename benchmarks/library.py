"""What do the library, merging and combining cost? Ratios with their bars, in results/library.{json,md,png}.

add      a 20 MB adapter, against a durable copy of the same files (copy, then flush each), and against a copy that is not flushed
verbs    list, show, alias change and others with 10,000 adapters, in process, against 50 ms
merge    LoRA r=16 on every linear layer of a 1.5 B bf16 checkpoint in shards (random weights, Qwen2.5's shapes), against `cp` of
         the same files: then flushed, as a merge is, and not flushed; and its memory in tensors
combine  8 adapters of r=16 on the 168 targets of a 0.5 B shape, svd to r=16, against PEFT's svd

The surprise: PEFT's svd is timed on the targets of `--peft-layers` of the 24 layers and multiplied, because all layers have the
same shapes and the whole takes many minutes.

    python benchmarks/library.py [--adapters 10000] [--rounds 9] [--merge-layers 28] [--merge-rounds 5] [--layers 24]
                                 [--peft-layers 2] [--out DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _report import HERE, PEER_PYTHON, RESULTS, Row, drive, markdown, publish, row_plot, row_table, say
from safetensors.torch import save_file

from veneer.adapter import Adapter, Part, Provenance
from veneer.algebra import combination
from veneer.library import Library
from veneer.library.manifest import FileRecord, Manifest, seal
from veneer.merge.store import Entry, Shard, write_shards
from veneer.methods.lora import LoRA

RANK = 16
SMALL = {"hidden": 896, "inter": 4864, "kv": 128}
LARGE = {"hidden": 1536, "inter": 8960, "kv": 256, "vocab": 151936}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def random_lora(seed: int, shapes: dict[str, tuple[int, int]], size: float = 1.0) -> Adapter:
    """LoRA r=16 with random factors on `shapes`: path -> (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    parts = tuple(
        Part(
            "lora",
            "weight",
            path,
            {
                "A": torch.randn(RANK, into, generator=generator),
                "B": size * torch.randn(out, RANK, generator=generator),
            },
        )
        for path, (out, into) in shapes.items()
    )
    names = tuple(dict.fromkeys(path.rpartition(".")[2] for path in shapes))
    return Adapter(LoRA(rank=RANK, alpha=RANK, targets=names), parts, Provenance(base_name="bench"))


def projections(layers: int, hidden: int, inter: int, kv: int, **_: int) -> dict[str, tuple[int, int]]:
    """The linear layers of a Qwen2 decoder: path -> (out, in)."""
    of_layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in of_layer.items()}


# Adding


def twenty_megabytes(seed: int, *, layers: int = 28, width: int = 1489) -> Adapter:
    shapes = {f"model.layers.{i}.self_attn.{name}_proj": (width, width) for i in range(layers) for name in "qkvo"}
    return random_lora(seed, shapes)


def copy_files(source: Path, target: Path, *, flush: bool) -> None:
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        if flush:
            flush_file(target / path.name)


def flush_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def measure_add(folder: Path, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """Interleaved, each round with an adapter of its own; the first round only warms up."""
    library, found = Library(folder / "library"), []
    for number in range(rounds + 1):
        source = folder / f"source{number}"
        twenty_megabytes(number).save(source)
        os.sync()
        plain = seconds(lambda source=source: copy_files(source, folder / "plain", flush=False))  # type: ignore[misc]
        durable = seconds(lambda source=source: copy_files(source, folder / "durable", flush=True))  # type: ignore[misc]
        added = seconds(lambda source=source: library.add(source, "bench"))  # type: ignore[misc]
        content = (source / "adapter_model.safetensors").read_bytes()
        hashed = seconds(lambda content=content: hashlib.sha256(content).digest())  # type: ignore[misc]
        loaded = seconds(lambda: library.load("bench"))
        found.append({"plain": plain, "durable": durable, "added": added, "sha256": hashed, "loaded": loaded})
        for name in ("plain", "durable", source.name):
            shutil.rmtree(folder / name)
    found = found[1:]
    rows = [
        Row("add a 20 MB adapter", "durable copy", [r["added"] / r["durable"] for r in found], 1.5, most=True),
        Row(
            "add a 20 MB adapter",
            "durable copy + one SHA-256",
            [r["added"] / (r["durable"] + r["sha256"]) for r in found],
        ),
        Row("add a 20 MB adapter", "copy without flush", [r["added"] / r["plain"] for r in found]),
    ]
    middle = {f"{key}_ms": round(1e3 * statistics.median(r[key] for r in found), 2) for key in found[0]}
    return rows, {"megabytes": round(library.resolve("bench").bytes / 1e6, 2), **middle}


# Ten thousand adapters


def grow(root: Path, count: int) -> None:
    """A library of `count` adapters: the manifests of one real adapter under many names, and no catalogue."""
    library = Library(root)
    first = library.add(twenty_megabytes(0, layers=1, width=64), "name-00000").version
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


def measure_verbs(folder: Path, count: int, rounds: int) -> tuple[list[Row], dict[str, Any]]:
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
    for wanted in (1, 2, 3):
        library.alias(f"{name}@{wanted}", "production")
    verbs: dict[str, Callable[[], object]] = {
        "list": library.list,
        "list the newest": lambda: library.list(newest=True),
        "list one name": lambda: library.list(name),
        "show": lambda: library.show(f"{name}@2"),
        "resolve": lambda: library.resolve(name),
        "alias change": lambda: library.alias(f"{name}@{1 + next(number) % 2}", "production"),
        "rollback": lambda: library.rollback(name),
    }
    rows, found = [], {}
    for verb, work in verbs.items():
        work()
        taken = [seconds(work) for _ in range(rounds)]
        found[f"{verb} ms"] = round(1e3 * statistics.median(taken), 2)
        rows.append(Row(f"{verb} of {count:,}", "50 ms", [t / 0.05 for t in taken], 1.0, most=True))
    return rows, {"adapters": count, "rebuild_seconds": round(rebuilt, 1), **found}


# Merging


def write_large(folder: Path, layers: int) -> int:
    """Qwen2.5-1.5B's tensors with random values, in shards of 2 GB; bytes of the largest."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (LARGE["vocab"], LARGE["hidden"])}
    for path, (out, into) in projections(layers, **LARGE).items():
        shapes[f"{path}.weight"] = (out, into)
        if path.endswith(("q_proj", "k_proj", "v_proj")):
            shapes[f"{path}.bias"] = (out,)
    for i in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (LARGE["hidden"],)
    shapes["model.norm.weight"] = (LARGE["hidden"],)
    files: list[list[Entry]] = [[]]
    for name, shape in shapes.items():
        entry = Entry(name, torch.bfloat16, shape)
        if sum(e.nbytes for e in files[-1]) + entry.nbytes > 2e9:
            files.append([])
        files[-1].append(entry)
    count = len(files)
    shards = [
        Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(entries), {"format": "pt"})
        for i, entries in enumerate(files, 1)
    ]
    pool = (0.02 * torch.randn(2**24, generator=torch.Generator().manual_seed(0))).bfloat16()

    def produce(name: str) -> torch.Tensor:
        """Random values: a cut of the pool that begins elsewhere for every tensor."""
        shape = shapes[name]
        size = int(torch.Size(shape).numel())
        begin = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % 10**6
        return pool[begin:].repeat(-(-size // (len(pool) - begin)))[:size].view(shape)

    folder.mkdir()
    write_shards(folder, shards, produce)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": LARGE["hidden"],
        "intermediate_size": LARGE["inter"],
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": LARGE["vocab"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return max(entry.nbytes for shard in shards for entry in shard.entries)


def measure_merge(folder: Path, layers: int, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    largest = write_large(base, layers)
    random_lora(1, projections(layers, **LARGE), size=1e-5).save(adapter)
    total = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    files = [str(path) for path in sorted(base.iterdir())]
    found = []
    for number in range(rounds + 1):  # the first round brings everything into the cache, and is not counted
        os.sync()
        out.mkdir()
        copied = seconds(lambda: subprocess.run(["cp", *files, str(out)], check=True))
        flushed = copied + seconds(lambda: [flush_file(path) for path in out.iterdir()])
        shutil.rmtree(out)
        os.sync()
        made = drive(sys.executable, HERE / "library_veneer.py", str(base), str(adapter), str(out))
        shutil.rmtree(out)
        found.append({"cp": copied, "cp_flushed": flushed, "merge": made["seconds"], "extra": made["extra_bytes"]})
        say(f"merge, round {number}: cp {copied:.2f} s, flushed {flushed:.2f} s, merge {made['seconds']:.2f} s")
    found = found[1:]
    shutil.rmtree(base)
    changed = 2 * LARGE["hidden"] * LARGE["inter"]
    rows = [
        Row("speed of a 1.5 B merge", "cp, flushed", [r["cp_flushed"] / r["merge"] for r in found], 0.7),
        Row("speed of a 1.5 B merge", "cp, not flushed", [r["cp"] / r["merge"] for r in found]),
        Row("memory of a merge", "the largest tensor", [r["extra"] / largest for r in found], 2.0, most=True),
        Row("memory of a merge", "the largest tensor that changes", [r["extra"] / changed for r in found]),
    ]
    middle = {key: round(statistics.median(r[key] for r in found), 3) for key in ("cp", "cp_flushed", "merge")}
    return rows, {"gigabytes": round(total / 1e9, 2), **middle, "lost": made["lost"]}


# Combining


def measure_combine(
    folder: Path, layers: int, peft_layers: int, rounds: int, peer: str
) -> tuple[list[Row], dict[str, Any]]:
    shapes = projections(layers, **SMALL)
    adapters = {f"a{seed}": random_lora(seed, shapes) for seed in range(8)}
    few = projections(peft_layers, **SMALL)
    names = set(few)
    file = folder / "factors.safetensors"
    chosen = [(name, part) for name, adapter in adapters.items() for part in adapter.parts if part.target in names]
    save_file({f"{part.target}|{name}|{key}": t for name, part in chosen for key, t in part.tensors.items()}, file)
    work = lambda: combination(adapters, "svd", rank=RANK)  # noqa: E731
    work()
    taken = [seconds(work) for _ in range(rounds)]
    theirs = drive(peer, HERE / "peers" / "library_peft.py", str(file), str(RANK))
    taken += [seconds(work) for _ in range(rounds)]
    made = work()
    optimal = combined_error(adapters, [path for path in shapes if path in names], made.adapter)
    whole = theirs["seconds"] * layers / peft_layers
    rows = [
        Row(
            "combine 8 adapters, svd",
            f"PEFT ({theirs['targets']} of {len(shapes)} targets timed)",
            [whole / t for t in taken],
            50,
        ),
        Row(
            "error of combining",
            "the optimum (dense SVD in fp64)",
            [optimal["ours"] / optimal["best"]],
            1.0001,
            most=True,
        ),
        Row("error of combining", "PEFT's", [optimal["ours"] / theirs["error"]]),
    ]
    facts = {"targets": len(shapes), "veneer_seconds": statistics.median(taken), "peft_seconds": whole}
    return rows, {**facts, "peft_targets_timed": theirs["targets"], "peft_error": theirs["error"], **optimal}


def combined_error(adapters: dict[str, Adapter], targets: Sequence[str], made: Adapter) -> dict[str, float]:
    """Relative Frobenius error over `targets`: ours, and the least that rank 16 can have, from the dense spectrum in fp64."""
    ours = best = whole = 0.0
    for target in targets:
        exact = sum(
            a.part(target).tensors["B"].double() @ a.part(target).tensors["A"].double() for a in adapters.values()
        )
        assert isinstance(exact, torch.Tensor)
        part = made.part(target)
        ours += float((part.tensors["B"].double() @ part.tensors["A"].double() - exact).square().sum())
        gram = exact @ exact.t() if exact.shape[0] <= exact.shape[1] else exact.t() @ exact
        squares = torch.linalg.eigvalsh(gram).clamp_min(0)
        best, whole = best + float(squares[:-RANK].sum()), whole + float(squares.sum())
    return {"ours": (ours / whole) ** 0.5, "best": (best / whole) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--merge-layers", type=int, default=28, help="of the large checkpoint")
    parser.add_argument("--merge-rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24, help="of the small shape")
    parser.add_argument("--peft-layers", type=int, default=2, help="that PEFT is timed on")
    parser.add_argument("--peer-python", default=str(PEER_PYTHON))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure; 10 GB for the whole")
    args = parser.parse_args()
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        parts: dict[str, Callable[[], tuple[list[Row], dict[str, Any]]]] = {
            "add": lambda: measure_add(folder, args.rounds),
            "verbs": lambda: measure_verbs(folder, args.adapters, args.rounds),
            "merge": lambda: measure_merge(folder, args.merge_layers, args.merge_rounds),
            "combine": lambda: measure_combine(folder, args.layers, args.peft_layers, 5, args.peer_python),
        }
        for part, measure in parts.items():
            say(f"{part} ...")
            found, facts[part] = measure()
            rows += found
    results = {"rows": [{**vars(row)} for row in rows], **facts}
    figures = [[part, key, told(value)] for part, found in facts.items() for key, value in found.items()]
    table = f"{row_table(rows)}\n{markdown(['part', 'what', 'figure'], figures)}"
    row_plot(rows, publish("library", results, table, args.out))


def told(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
