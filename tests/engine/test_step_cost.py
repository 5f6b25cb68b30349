"""What a step costs: every weight of the base once, whoever the rows belong to, and no tensor of tokens x rank x width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.engine.small import ids, lora, small_base
from tests.engine.test_engine import engine, shaken
from veneer.adapter import Adapter
from veneer.engine import Engine, Limits, Request
from veneer.models.base import Base
from veneer.models.step import GROUPS
from veneer.ops.low_rank import DenseFrozen
from veneer.ops.native.block import Stack
from veneer.ops.native.build import library
from veneer.ops.native.shortlist import Sketch

KINDS: dict[str, Callable[[Base], Adapter]] = {
    "lora of rank 3": lambda base: lora(base, 1, rank=3),
    "lora of rank 16": lambda base: lora(base, 2, rank=16),
    "lora on attention": lambda base: lora(base, 3, rank=5, targets=("q_proj", "o_proj")),
    "dora": lambda base: shaken(base, "dora"),
    "vera": lambda base: shaken(base, "vera"),
    "ia3": lambda base: shaken(base, "ia3"),
    "bitfit": lambda base: shaken(base, "bitfit"),
    "bottleneck": lambda base: shaken(base, "bottleneck"),
    "prompt": lambda base: shaken(base, "prompt"),
    "prefix": lambda base: shaken(base, "prefix"),
}
MIXES = {
    "one": ["lora of rank 3"] * 8,
    "eight": ["lora of rank 3", "lora of rank 16", "lora on attention", "dora", "vera", "ia3", "bitfit", "bottleneck"],
    "with virtual rows": ["prompt", "prefix", "lora of rank 3", "lora of rank 16", "dora", "ia3", "bottleneck", ""],
    "base": [""] * 8,
}


def base_of(dtype: torch.dtype, heads: int = 4) -> Base:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
    }
    return small_base(dtype=dtype, attention_bias=True, **sizes)


class Products:
    """Counts the products with weights of the base: how often each weight was read."""

    def __init__(self, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: dict[str, int] = {}
        names = {id(group.frozen): name for name, group in base.decoder.groups.items()}
        for method in ("apply", "scores"):
            monkeypatch.setattr(DenseFrozen, method, self._counting(getattr(DenseFrozen, method), names))
        monkeypatch.setattr(Stack, "run", self._in_one_call(Stack.run))
        monkeypatch.setattr(Sketch, "likeliest", self._sketched(Sketch.likeliest))
        self._inside = False
        self.one_call = 0

    def _in_one_call(self, original: Any) -> Any:
        def counted(stack: Stack, *args: Any) -> torch.Tensor:
            self.one_call += 1
            for layer in range(len(stack.blocks)):
                for group in GROUPS:
                    name = f"layers.{layer}.{group}"
                    self.reads[name] = self.reads.get(name, 0) + 1
            found: torch.Tensor = original(stack, *args)
            return found

        return counted

    def _sketched(self, original: Any) -> Any:
        """Half of the head is read in its place."""

        def counted(sketch: Sketch, x: torch.Tensor) -> Any:
            found = original(sketch, x)
            if found is not None:
                self.reads["head"] = self.reads.get("head", 0) + 1
            return found

        return counted

    def _counting(self, original: Any, names: dict[int, str]) -> Any:
        def counted(frozen: DenseFrozen, x: torch.Tensor) -> torch.Tensor:
            outer, self._inside = self._inside, True
            try:
                found: torch.Tensor = original(frozen, x)
            finally:
                self._inside = outer
            if not outer:  # scores may ask apply
                name = names.get(id(frozen), "a part of a group")
                self.reads[name] = self.reads.get(name, 0) + 1
            return found

        return counted


def phases(running: Engine, mix: Sequence[str]) -> dict[str, list[dict[str, int]]]:
    """The reads of each step: prompts in chunks, then decoding, then both at once."""
    counting: Products = running.counting  # type: ignore[attr-defined]
    found: dict[str, list[dict[str, int]]] = {"prefill": [], "decode": [], "both": []}

    def step(phase: str) -> None:
        counting.reads.clear()
        running.step()
        assert running.last_step is not None
        found[phase].append(dict(counting.reads))

    for i, name in enumerate(mix):
        running.submit(Request(ids(i, 30), adapter=name or None, max_tokens=12))
    while any(not s.decoding for s in (*running.scheduler.waiting, *running.scheduler.running)):
        step("prefill")
    for _ in range(3):
        step("decode")
    for i, name in enumerate(mix):
        running.submit(Request(ids(20 + i, 9), adapter=name or None, max_tokens=3))
    while any(not s.decoding for s in (*running.scheduler.waiting, *running.scheduler.running)):
        step("both")
    return found


@pytest.mark.parametrize("dtype, heads", [(torch.float32, 4), (torch.bfloat16, 4), (torch.bfloat16, 2)])
def test_every_weight_of_the_base_is_read_once_a_step_for_any_mix(
    dtype: torch.dtype, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With wide heads the blocks of a decoding step are one call, which reads each of their weights once."""
    base = base_of(dtype, heads)
    every = dict.fromkeys(base.decoder.groups, 1)
    without_head = {name: 1 for name in every if name != "head"}
    counting = Products(base, monkeypatch)
    for mix, names in MIXES.items():
        running = engine(base, limits=Limits(alone=64, chunk=(16, 16)))
        running.counting = counting  # type: ignore[attr-defined]
        for name in set(names) - {""}:
            running.add(name, KINDS[name](base))
        found = phases(running, names)
        assert len(found["prefill"]) > 3, "prompts are read in several steps"
        for phase, steps in found.items():
            assert steps, phase
            for reads in steps:
                assert reads in (every, without_head), (mix, phase, reads)
        assert all(reads == every for reads in found["decode"] + found["both"]), mix
    assert bool(counting.one_call) == (heads == 2 and library() is not None)


class Largest(TorchDispatchMode):
    """The largest tensor that was made while this is on; views and what was there before do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.what = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            fresh = isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given
            if fresh and tensor.numel() > self.numel:
                self.numel, self.what = tensor.numel(), f"{func} {tuple(tensor.shape)}"
        return out


RANK, WIDTH = 40, 64


def largest_of(step: Callable[[], Any]) -> tuple[int, str]:
    with Largest() as seen:
        step()
    return seen.numel, seen.what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_in_a_step_grows_with_tokens_times_rank_times_width(dtype: torch.dtype) -> None:
    base = base_of(dtype)
    running = engine(base, limits=Limits(alone=400))
    for i in range(4):
        running.add(str(i), lora(base, i, rank=RANK))
    for i in range(24):
        running.submit(Request(ids(i, 12), adapter=str(i % 4), max_tokens=20))
    reading, what = largest_of(running.step)
    assert running.last_step is not None
    rows = running.last_step.prefilled
    assert rows == 24 * 12
    assert reading < rows * RANK * WIDTH / 8, what
    for _ in range(3):
        running.step()  # tables of keys and values have their size
    decoding, what = largest_of(running.step)
    assert running.last_step.decoded == 24
    assert decoding < 24 * RANK * WIDTH / 4, what


def test_a_gather_of_factors_for_each_row_would_be_seen() -> None:
    """The control: what a gather per token makes is above the bounds of the test above."""
    rows = torch.arange(24) % 4
    table, x = torch.randn(4, RANK, WIDTH), torch.randn(24, WIDTH)
    numel, what = largest_of(lambda: torch.einsum("nrw,nw->nr", table[rows], x))
    assert numel >= 24 * RANK * WIDTH
    assert "index" in what or "40" in what
