"""`veneer serve` as a process of its own over a base and a library on disk, and answers worked out beforehand to hold it to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

import veneer as package
from tests import tinylm
from tests.engine.small import lora, lowered_of, plain_greedy, plain_logits
from veneer.library import Library
from veneer.models.base import Base
from veneer.models.load import load_base

RANKS = (8, 64, 16, 32)
MAIN = """
from veneer.cli.main import main
from veneer.ops import frozen
frozen._onednn = lambda: False
main()
"""
"""`veneer`, but fp32 products don't go through oneDNN: it keeps compiled code for a thousand shapes, up to half a gigabyte, which
would hide what the server itself holds."""
PROMPTS = ("hello there", "where is my parcel?", "a")


@dataclass(frozen=True)
class Expected:
    """A greedy answer and the log-probability of each of its tokens, from whole sequences without cache or batch."""

    text: str
    logprobs: tuple[float, ...]

    def check(self, text: str, logprobs: Sequence[float]) -> None:
        assert text == self.text
        worst = max(abs(a - b) for a, b in zip(logprobs, self.logprobs, strict=True))
        assert worst < 2e-3, f"log-probabilities are off by {worst}"


class Shop:
    """A base and a library of adapters a0, a1, ... of different ranks, and what each should say."""

    def __init__(self, folder: Path, adapters: int) -> None:
        self.folder = folder
        tinylm.folder(folder / "base", initializer_range=0.4)
        for i in range(adapters):
            self.library.add(self.adapter(i), f"a{i}")

    @cached_property
    def library(self) -> Library:
        return Library(self.folder / "library")

    @cached_property
    def base(self) -> Base:
        return load_base(self.folder / "base", dtype="float32")

    def adapter(self, seed: int) -> Any:
        return lora(self.base, seed, rank=RANKS[seed % len(RANKS)])

    def expected(self, seed: int | None, prompt: str, count: int) -> Expected | None:
        """The answer of adapter `seed`, or of the base; None where the two likeliest tokens were once too close to call."""
        base, tokenizer = self.base, self.base.require_tokenizer()
        lowered = lowered_of(base, None if seed is None else self.adapter(seed))
        asked = tokenizer.encode(prompt)
        said = plain_greedy(base, asked, lowered, count)
        scores = plain_logits(base, [*asked, *said], lowered)[len(asked) - 1 : -1].log_softmax(1)
        best = scores.topk(2).values
        if float((best[:, 0] - best[:, 1]).min()) < 1e-3:
            return None
        chosen = scores.gather(1, torch.tensor(said)[:, None])[:, 0]
        return Expected(tokenizer.decode(said), tuple(chosen.tolist()))


class Outside:
    """One server process. Started by `start`, ended by `stop` (SIGTERM) or `kill` (SIGKILL)."""

    def __init__(self, shop: Shop, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = shop.folder / "server.log"
        self._command = [
            *(sys.executable, "-c", MAIN, "serve", "--dtype", "float32"),
            *("--base", str(shop.folder / "base"), "--library", str(shop.folder / "library")),
            *("--port", str(self.port), "--kv-memory", "0.02", "--log-level", "warning", *options),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        source = str(Path(package.__file__).parents[1])
        environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, env=environment, stdout=log, stderr=log)
        end = time.monotonic() + 90
        while time.monotonic() < end and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/ready", timeout=1).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"the server did not start:\n{self.said()}")

    def said(self) -> str:
        """What it wrote to its log."""
        return self.log.read_text(errors="replace")[-4000:]

    def rss(self) -> int:
        """Bytes of memory that the process holds."""
        assert self._process is not None
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def stop(self) -> None:
        """SIGTERM; it finishes its streams and ends by itself."""
        if self._process is not None:
            self._process.terminate()
            try:
                assert self._process.wait(60) in (0, -signal.SIGTERM), self.said()
            finally:
                self._process.kill()
                self._process = None

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(60)
        self._process = None


def body(model: str, prompt: str, count: int, **more: Any) -> dict[str, Any]:
    """A greedy completion with the log-probabilities of its tokens."""
    asked = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    return {**asked, **more}


def heard(lines: Sequence[str]) -> tuple[str, list[float]]:
    """Text and log-probabilities of a streamed answer that came to its end."""
    assert lines[-1] == "data: [DONE]", lines[-3:]
    text, logprobs = "", list[float]()
    for line in lines:
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            assert "error" not in event, event
            for choice in event["choices"]:
                text += choice["text"]
                logprobs += (choice.get("logprobs") or {}).get("token_logprobs", [])
    return text, logprobs


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of (time, value)."""
    n = len(samples)
    middle, mean = sum(t for t, _ in samples) / n, sum(v for _, v in samples) / n
    spread = sum((t - middle) ** 2 for t, _ in samples)
    return sum((t - middle) * (v - mean) for t, v in samples) / spread
