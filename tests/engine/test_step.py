"""Decoding steps run all blocks in one call where they can: the same bits as the ordinary way, whoever is in the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.engine.small import ids, lora, small_base
from tests.engine.test_dense import quantised
from tests.engine.test_engine import engine, shaken
from veneer.adapter import Adapter
from veneer.engine import Engine, Limits, Request
from veneer.engine.batch import _in_one_piece
from veneer.models.bank import Bank, Packed
from veneer.models.base import Base
from veneer.models.step import Steps
from veneer.ops.native import block, build
from veneer.ops.pack import Pack
from veneer.ops.threads import own_core

pytestmark = pytest.mark.skipif(build.library() is None, reason="no native kernels on this machine")

COVERED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 9},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 7, "sliding_window_pattern": 2},
    "olmo2": {},
}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "final_logit_softcapping": 30.0},
    "gpt2": {"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 512, "activation_function": "gelu_new"},
    "llama with narrow heads": {"num_attention_heads": 4},
}
MIXES: dict[str, list[Callable[[Base], Adapter] | None]] = {
    "the base": [None] * 3,
    "one adapter": [lambda base: lora(base, 1, rank=3)] * 3,
    "several": [None, *(lambda base, r=r: lora(base, r, rank=r) for r in (1, 3, 4, 16)), None],  # type: ignore[misc]
    "on attention alone": [lambda base: lora(base, 3, rank=5, targets=("q_proj", "o_proj")), None],
    "beside DoRA": [lambda base: lora(base, 1), lambda base: shaken(base, "dora"), None],
    "beside IA3": [lambda base: lora(base, 1), lambda base: shaken(base, "ia3")],
    "beside a bottleneck": [lambda base: lora(base, 1), lambda base: shaken(base, "bottleneck")],
    "beside a prefix": [lambda base: lora(base, 1), lambda base: shaken(base, "prefix"), None],
}
AS_A_WHOLE = {"the base", "one adapter", "several", "on attention alone", "beside a prefix"}


def base_of(name: str, **more: Any) -> Base:
    changes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    return small_base(name.split()[0], dtype=torch.bfloat16, **{**changes, **{**COVERED, **OTHERS}[name], **more})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of every step that was one call."""
    seen: list[int] = []
    original = block.Stack.run

    def counted(self: block.Stack, h: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(len(h))
        return original(self, h, *args)

    monkeypatch.setattr(block.Stack, "run", counted)
    yield seen


def scores(base: Base, mix: list[Callable[[Base], Adapter] | None], **settings: Any) -> list[torch.Tensor]:
    """The logits of every step of a batch."""
    running: Engine = engine(base, limits=Limits(alone=64, chunk=(32, 32)), **settings)
    found: list[torch.Tensor] = []
    original = running._runner.run

    def recorded(*args: Any, greedy: bool) -> Any:
        given = original(*args)
        found.extend(batch.logits.clone() for batch in given)
        return given

    running._runner.run = recorded  # type: ignore[method-assign]
    for i, make in enumerate(mix):
        if make is not None:
            running.add(f"a{i}", make(base), replace=True)
    asked = [Request(ids(i, 5 + 3 * i), adapter=make and f"a{i}", max_tokens=12) for i, make in enumerate(mix)]
    running.complete(asked)
    running.close()
    return found


def test_the_number_of_threads_changes_no_bit() -> None:
    """A step that leaves a core to somebody who loads says what it would have said."""
    base = base_of("llama")
    torch.set_num_threads(2)
    try:
        together = scores(base, MIXES["several"])
        with own_core():
            less = scores(base, MIXES["several"])
    finally:
        torch.set_num_threads(1)
    assert len(together) == len(less) and all(torch.equal(a, b) for a, b in zip(together, less, strict=True))


def both(
    base: Base, mix: list[Callable[[Base], Adapter] | None], monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    fast = scores(base, mix, **settings)
    with monkeypatch.context() as ordinary:
        ordinary.setattr(Steps, "run", lambda *_: None)
        return fast, scores(base, mix, **settings)


def same(found: tuple[list[torch.Tensor], list[torch.Tensor]]) -> bool:
    return len(found[0]) == len(found[1]) > 10 and all(map(torch.equal, *found))


@pytest.mark.parametrize("name", COVERED)
@pytest.mark.parametrize("mix", ["the base", "several"])
def test_every_covered_family_gives_the_same_bits(
    name: str, mix: str, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert same(both(base_of(name), MIXES[mix], monkeypatch))
    assert len(runs) > 8 and max(runs) == len(MIXES[mix])


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_gives_the_same_bits(mix: str, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert same(both(base_of("llama with biases"), MIXES[mix], monkeypatch))
    assert bool(len(runs) > 8) == (mix in AS_A_WHOLE)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_go_the_ordinary_way(name: str, runs: list[int]) -> None:
    assert scores(base_of(name), MIXES["several"])
    assert runs == []


@pytest.mark.parametrize("kind", ["int8", "bf12"])
def test_a_base_of_stored_rows_gives_the_same_bits(kind: str, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantised(kind, torch.bfloat16, num_attention_heads=2, num_key_value_heads=1)
    assert same(both(base, MIXES["several"], monkeypatch))
    assert len(runs) > 8


@pytest.mark.parametrize("mix", ["the base", "several", "beside DoRA"])
def test_bf12_gives_the_bits_of_bf16(mix: str, runs: list[int]) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    plain = small_base(dtype=torch.bfloat16, hidden_size=64, intermediate_size=64, **heads)
    packed = quantised("bf12", torch.bfloat16, **heads)
    assert same((scores(packed, MIXES[mix]), scores(plain, MIXES[mix])))
    assert bool(runs) == (mix in AS_A_WHOLE)


def test_more_rows_than_the_kernel_takes_go_the_ordinary_way(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert same(both(base_of("llama"), [None] * 34, monkeypatch))
    assert not runs or max(runs) <= 32


def test_a_sequence_alone_in_reproducible_mode_takes_it_too(runs: list[int]) -> None:
    mix = MIXES["several"]
    base = base_of("llama")
    together = scores(base, mix, reproducible=True)
    assert len(runs) > 8 and set(runs) == {1}
    again = scores(base, mix, reproducible=True)
    assert all(map(torch.equal, together, again))


def test_what_a_bank_was_given_goes_with_it() -> None:
    """Adapters that were evicted are not kept alive by what was made ready for them."""
    base = base_of("llama")
    running = engine(base)
    running.add("a", lora(base, 1))
    running.complete([Request(ids(0, 4), adapter="a", max_tokens=6)])
    steps = base.decoder._steps
    assert len(steps._stacks) == 1
    running.residency.unload(running.residency.resolve("a").digest)
    running._runner.forget_bank()
    del running
    assert len(steps._stacks) == 0


def test_a_tensor_that_groups_share_is_packed_once_and_right() -> None:
    base = base_of("llama")
    groups = ["layers.0.qkv", "layers.1.qkv"]
    shared = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    b = torch.randn(128, 4, generator=torch.Generator().manual_seed(1))
    width = base.decoder.groups[groups[0]].out_features
    packed = {g: Packed((Pack(A=shared, B=(b[:width],), columns=((0, width),)),), (0,)) for g in groups}
    bank, room = _in_one_piece(Bank(size=1, groups=packed), base.decoder)
    first, second = (bank.groups[g].packs[0] for g in groups)
    assert first.A is second.A and first.A is not None
    assert torch.equal(first.A, shared.bfloat16()) and torch.equal(second.B[0], b[:width].bfloat16())
    assert room.numel() == shared.numel() + 2 * b[:width].numel()
