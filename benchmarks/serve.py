"""Serving against transformers, peft and llama.cpp: ratios in one run, interleaved, medians.

    python benchmarks/serve.py [--rounds 5] [--long 3]

Each round runs veneer, transformers + peft, and llama.cpp, one after the other, each in a process of its own. The first
row is the base alone: a slow base makes every ratio to it look good. Rows against rivals count whole requests, from the
prompt to the last token; rows against our own base count steps in which every stream decodes, as the byte bound does.
Results go to `results/serve.json`, `results/serve.md` and `results/serve.png`.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _report import HERE, PEER_PYTHON, RESULTS, Row, drive, gguf_file, publish, row_plot, row_table, say, write_folder

BASE = "smollm2-135m"
OURS = HERE / "serve_veneer.py"
FIRST_TOKEN_PEER = """
import os, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file = (os.path.split(sys.argv[1]) if sys.argv[1].endswith(".gguf") else (sys.argv[1], None))
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16).eval()
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0]), flush=True)
"""
FIRST_TOKEN = """
import sys
import veneer as vn
engine = vn.Engine(vn.load_base(sys.argv[1], dtype="bfloat16"))
print(engine.complete([vn.Request("Once upon a time", max_tokens=1)])[0][0].text, flush=True)
engine.close()
"""
FIRST_ANSWER = b'{"model": "", "prompt": "Once upon a time", "max_tokens": 1, "temperature": 0, "stream": true}'


@dataclass
class World:
    """Who is measured on what. `more` goes to our driver."""

    peer_python: str
    folder: str
    gguf: str
    more: list[str]
    peer_more: list[str]
    found: dict[str, list[float]] = field(default_factory=dict)
    raw: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def note(self, name: str, ratio: float) -> None:
        self.found.setdefault(name, []).append(ratio)

    def ours(self, *arguments: str, **environment: str) -> dict[str, Any]:
        return self._kept("veneer", drive(sys.executable, OURS, BASE, *arguments, *self.more, **environment))

    def peer(self, name: str, *arguments: str) -> dict[str, Any]:
        return self._kept(name, drive(self.peer_python, HERE / "peers" / f"{name}.py", *arguments, *self.peer_more))

    def _kept(self, name: str, line: dict[str, Any]) -> dict[str, Any]:
        line["args"]["model"] = Path(line["args"]["model"]).name  # where it lies is nobody's business
        self.raw.setdefault(name, []).append(line)
        return line


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def first_line(python: str, code: str, model: str) -> float:
    """Seconds from the start of a process to the first line that it prints."""
    start = time.perf_counter()
    with subprocess.Popen([python, "-c", code, model], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        line, end = process.stdout.readline(), time.perf_counter()
        _, told = process.communicate(timeout=600)
    if process.returncode or not line.strip():
        raise SystemExit(f"{python} ended with {process.returncode}: {told.decode(errors='replace')[-2000:]}")
    return end - start


def served(model: str) -> None:
    """`veneer serve` from the start of its process to the first token of a stream."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("veneer")), "serve", "--base", model, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=60) as wire:
                    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(FIRST_ANSWER)}\r\n"
                    wire.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + FIRST_ANSWER)
                    answer = b""
                    while b'"text"' not in answer:
                        piece = wire.recv(65536)
                        if not piece:
                            raise SystemExit(f"the server answered {answer!r}")
                        answer += piece
                    return
            except ConnectionRefusedError:
                time.sleep(0.01)
        raise SystemExit(f"{' '.join(command)} ended with {server.returncode}")
    finally:
        server.terminate()
        server.wait(60)


def round_of(world: World, number: int, long: int) -> None:
    """Every side in turn."""
    note = world.note
    ours = world.ours("--only", "speeds")["speeds"]
    peft = world.peer("serve_peft", world.folder)
    llama = world.peer("serve_llamacpp", world.gguf)
    int8 = world.ours("--only", "speeds", "--mixes", "single", "--quantize", "int8")["speeds"]
    bf12 = world.ours("--only", "speeds", "--mixes", "base,mixed", "--quantize", "bf12")["speeds"]
    plain = world.ours("--only", "speeds", "--mixes", "base,mixed", VENEER_NATIVE="0")["speeds"]
    note("base", ours["base_whole"] / peft["base"])
    note("bf12", bf12["base_whole"] / peft["base"])
    note("bf12-mixed", bf12["mixed_whole"] / peft["mixed"])
    note("mixed", ours["mixed_over_base"])
    note("bound", ours["byte_bound"])
    note("plain", plain["mixed_over_base"])
    note("drawn", ours["drawn_over_base"])
    note("same", ours["same_over_base"])
    note("peft", ours["mixed_whole"] / peft["mixed"])
    note("llama", ours["mixed_whole"] / llama["mixed"])
    note("llama-base", ours["base_whole"] / llama["base_n"])
    note("single", ours["single_whole"] / peft["base_1"])
    note("int8", int8["single_whole"] / peft["base_1"])
    theirs = first_line(world.peer_python, FIRST_TOKEN_PEER, world.folder)
    note("start", first_line(sys.executable, FIRST_TOKEN, world.folder) / theirs)
    note("torch", first_line(sys.executable, "import torch; print(torch.__version__)", "") / theirs)
    if number < long:
        theirs = first_line(world.peer_python, FIRST_TOKEN_PEER, world.gguf)
        note("gguf", first_line(sys.executable, FIRST_TOKEN, world.gguf) / theirs)
        note("serve", seconds(lambda: served(world.gguf)) / theirs)


def alone(world: World, long: int) -> dict[str, Any]:
    """What has no rival: exactness, memory, cold loads, a full disk."""
    found = world.ours("--only", "memory", "--only", "cold", "--rounds", "5")
    found["bf16"] = world.ours("--only", "exact")["exact"]
    found["fp32"] = world.ours("--only", "exact", "--dtype", "float32")["exact"]
    found |= world.ours("--only", "zipf", "--rounds", str(long))
    return found


def rows_of(found: dict[str, list[float]], rest: dict[str, Any]) -> list[Row]:
    """The table of claims."""
    bound, zipf = statistics.median(found["bound"]), rest["zipf"]
    bf16, fp32 = rest["bf16"], rest["fp32"]
    return [
        Row("8 streams, base", "transformers generate", found["base"], 3.0),
        Row("8 streams, base as bf12: the same numbers", "transformers generate", found["bf12"]),
        Row("8 streams, base, drawn (temperature 0.8, top-p 0.95)", "our base, greedy", found["drawn"]),
        Row("8 streams, 8 adapters", f"our base (byte bound {bound:.2f})", found["mixed"], 0.70),
        Row("8 streams, 8 adapters, plain torch", "our base in plain torch", found["plain"], 0.62),
        Row("8 streams, the same adapter", "our base", found["same"], 0.85),
        Row("8 streams, 8 adapters", "peft adapter_names", found["peft"], 8.0),
        Row("8 streams, 8 adapters, base as bf12", "peft adapter_names", found["bf12-mixed"]),
        Row("8 streams, 8 adapters", "llama.cpp (Q4_1)", found["llama"], 3.5),
        Row("8 streams, base in bf16", "llama.cpp (Q4_1), base", found["llama-base"]),
        Row("1 stream, int8 base", "transformers generate", found["int8"], 3.0),
        Row("1 stream, bf16 base", "transformers generate", found["single"]),
        Row(
            "1,000 adapters on disk, Zipf, memory for 50",
            f"5 adapters (byte bound {zipf['byte_bound']:.2f})",
            zipf["zipf_over_few"],
            0.9,
        ),
        Row("p99 between tokens while adapters load, added", "one step", rest["cold"]["added_p99_steps"], 1.0, True),
        Row("bytes counted for a resident adapter", "its file", [rest["memory"]["counted_over_file"]], 1.2, True),
        Row("process grown by a resident adapter", "its file", [rest["memory"]["grown_over_file"]], 1.2, True),
        Row("logits, mixed batch - alone, fp32", "their norm", [fp32["mixed_from_alone"]], 1e-5, True),
        Row(
            "logits, mixed batch - alone, bf16",
            f"their norm (base rows: {bf16['base_from_alone']:.1e})",
            [bf16["mixed_from_alone"]],
            max(2 * bf16["base_from_alone"], 1e-5),
            True,
        ),
        Row(
            "process start to first token, safetensors",
            f"transformers, same files (`import torch` alone {statistics.median(found['torch']):.2f})",
            found["start"],
            0.3,
            True,
        ),
        Row("process start to first token, .gguf", "transformers, same file", found["gguf"], 0.3, True),
        Row("`veneer serve` to first streamed token, .gguf", "transformers, same file", found["serve"], 0.3, True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", type=int, default=3, help="rounds of the rows that take long")
    parser.add_argument("--peer-python", default=str(PEER_PYTHON))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="see whether it runs; the figures mean nothing")
    args = parser.parse_args()
    tiny = {"--tokens": 8, "--requests": 8, "--gap-tokens": 24, "--on-disk": 60}
    more = [str(word) for pair in tiny.items() for word in pair] if args.tiny else []

    began = time.perf_counter()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a package that pip installed has its bytecode beside it
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["VENEER_CACHE"] = f"{scratch}/cache"
        folder = write_folder(Path(scratch) / "folder", "bfloat16")
        world = World(args.peer_python, folder, gguf_file(), more, more[:2])
        first = first_line(sys.executable, FIRST_TOKEN, folder)
        for number in range(args.rounds):
            round_of(world, number, args.long)
            done = {name: round(ratios[-1], 2) for name, ratios in world.found.items()}
            say(f"round {number + 1}/{args.rounds}, {time.perf_counter() - began:.0f} s: {done}")
        rest = alone(world, args.long)
    rows = rows_of(world.found, rest)
    results = {
        "rows": [asdict(row) for row in rows],
        "first_start_with_conversion_seconds": round(first, 2),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "alone": rest,
        "raw": world.raw,
    }
    row_plot(rows, publish("serve", results, row_table(rows), args.out))


if __name__ == "__main__":
    main()
