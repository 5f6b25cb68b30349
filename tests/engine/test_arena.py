"""The store gives what the definition of attention gives, seated or in place, through growth, moves and reuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.engine.arena import Arena, capacity, whole_capacity
from veneer.models.state import Run
from veneer.ops.attention import attention_over_reference
from veneer.ops.native.few import decodes

KV, HEADS, DIM = 2, 4, 16
CPU = torch.device("cpu")


@pytest.fixture(params=["seats", "in place"], scope="module")
def kind(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype that makes a store use seats or, with the kernel, decode in place."""
    if request.param == "seats":
        return torch.float32
    if not decodes(torch.bfloat16, CPU, HEADS // KV, DIM, None):
        pytest.skip("no kernel that decodes in place: it needs AVX512-BF16 and a C compiler")
    return torch.bfloat16


def store(kind: torch.dtype, layers: int = 1) -> Arena:
    return Arena(layers, KV, DIM, kind, CPU, in_place=kind == torch.bfloat16)


class Plain:
    """The definition: every sequence's keys and values in a list."""

    def __init__(self) -> None:
        self.k: dict[int, torch.Tensor] = {}
        self.v: dict[int, torch.Tensor] = {}

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: list[Run], window: int | None
    ) -> torch.Tensor:
        out, row = [], 0
        for run in runs:
            stop = row + run.length
            old_k, old_v = self.k.get(run.sequence, k[:0]), self.v.get(run.sequence, v[:0])
            self.k[run.sequence] = torch.cat([old_k, k[row:stop]])
            self.v[run.sequence] = torch.cat([old_v, v[row:stop]])
            pair = self.k[run.sequence], self.v[run.sequence]
            out.append(attention_over_reference(q[row:stop], *pair, scale=0.4, window=window))
            row = stop
        return torch.cat(out)


def rows(n: int, generator: torch.Generator, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (torch.randn(n, heads, DIM, generator=generator).to(kind) for heads in (HEADS, KV, KV))
    return q, k, v


@pytest.mark.parametrize("window", [None, 9])
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5), steps=st.integers(1, 12), seed=st.integers(0, 99))
def test_reading_in_chunks_and_decoding_equal_the_definition(
    kind: torch.dtype, window: int | None, lengths: list[int], steps: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    arena, plain = store(kind), Plain()
    stored = dict.fromkeys(range(len(lengths)), 0)
    for id, length in enumerate(lengths):
        arena.open(id, length)
        while stored[id] < length:
            count = min(40, length - stored[id])
            _compare(arena, plain, [Run(id, stored[id], count)], generator, window)
            stored[id] += count
    for step in range(steps):
        if step == 4 and len(stored) > 1:
            gone = min(stored)
            arena.close(gone)
            del stored[gone]
        for id in stored:
            arena.seat(id, stored[id])
            arena.reserve(id, stored[id] + 1)
        _compare(arena, plain, [Run(id, stored[id], 1) for id in stored], generator, window)
        for id in stored:
            stored[id] += 1


def _compare(arena: Arena, plain: Plain, runs: list[Run], generator: torch.Generator, window: int | None) -> None:
    q, k, v = rows(sum(r.length for r in runs), generator, arena._dtype)
    got = arena.attend(0, q, k, v, runs, scale=0.4, window=window, softcap=None)
    close = 1e-5 if arena._dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, plain.attend(q, k, v, runs, window), atol=close, rtol=close)


def test_some_of_a_table_may_decode_without_the_others(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    arena, plain = store(kind), Plain()
    for id in range(3):
        arena.open(id, 5)
        _compare(arena, plain, [Run(id, 0, 5)], generator, None)
        arena.seat(id, 5)
    _compare(arena, plain, [Run(2, 5, 1), Run(0, 5, 1)], generator, None)
    _compare(arena, plain, [Run(1, 5, 1)], generator, None)


def test_what_a_broken_sequence_leaves_behind_is_never_seen(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    arena, plain = store(kind), Plain()
    arena.open(9, 50)
    _compare(arena, plain, [Run(9, 0, 50)], generator, None)
    arena.seat(9, 50)  # the table stays while somebody sits in it, and with it the seat that is left
    arena.open(0, 60)
    q, k, v = rows(60, generator, kind)
    arena.attend(0, q, k * torch.nan, v * torch.nan, [Run(0, 0, 60)], scale=1.0, window=None, softcap=None)
    arena.seat(0, 60)
    arena.close(0)
    for id, length in ((1, 3), (2, 40)):
        arena.open(id, length)
        _compare(arena, plain, [Run(id, 0, length)], generator, None)
        arena.seat(id, length)
    _compare(arena, plain, [Run(1, 3, 1), Run(2, 40, 1), Run(9, 50, 1)], generator, None)


def test_a_prefix_is_copied_and_a_kept_sequence_shrinks_to_its_size(kind: torch.dtype) -> None:
    arena = store(kind, layers=2)
    arena.open(0, 50)
    for layer in (0, 1):
        arena.put_prefix(layer, 0, torch.full((50, KV, DIM), float(layer)), torch.full((50, KV, DIM), layer + 10.0))
    assert arena.remains(0, 33) == 33
    arena.keep(0, 33)
    arena.open(1, 40)
    arena.copy(0, 1, 32)
    view = arena._view(1)
    assert view[1, 1, :32].eq(11.0).all()
    assert view[0, 0, :32].eq(0.0).all()
    assert arena._view(0).shape[2] == 33
    assert arena.remains(1, 60) == 64
    arena.keep(1, 60)
    assert arena.allocated == (33 + 64) * arena.position_bytes  # it took the room that 0 gave back


def test_everything_is_given_back(monkeypatch: pytest.MonkeyPatch, kind: torch.dtype) -> None:
    arena = store(kind)
    monkeypatch.setattr("veneer.engine.arena._SPARE", 8 * capacity(60) * arena.position_bytes)
    sizes = []
    for _ in range(5):
        for id in range(20):
            arena.open(id, 40 + id)
            arena.seat(id, 40 + id)
        arena.close_all(range(20))
        sizes.append(arena.allocated)
    assert len(set(sizes[1:])) == 1
    assert sizes[-1] <= 8 * capacity(60) * arena.position_bytes


def test_a_store_keeps_a_bounded_amount_of_free_room(monkeypatch: pytest.MonkeyPatch, kind: torch.dtype) -> None:
    arena = store(kind)
    monkeypatch.setattr("veneer.engine.arena._SPARE", 5 * 64 * arena.position_bytes)
    for id in range(20):
        arena.open(id, 64)
    arena.close_all(range(20))
    assert arena.allocated == 5 * 64 * arena.position_bytes


def test_rows_of_a_call_with_prompts_decode_as_they_would_alone(kind: torch.dtype) -> None:
    """Rows that decode are scattered among those of prompts, new and continued, and q, k, v are columns of one tensor."""
    generator = torch.Generator().manual_seed(0)
    arena, plain = store(kind), Plain()
    for id, length in enumerate((7, 70, 20)):
        arena.open(id, length)
        _compare(arena, plain, [Run(id, 0, length)], generator, None)
    for id in (0, 1):
        arena.seat(id, (7, 70)[id])
        arena.reserve(id, (8, 71)[id])
    arena.open(3, 9)
    arena.reserve(2, 33)
    _compare(arena, plain, [Run(3, 0, 9), Run(1, 70, 1), Run(2, 20, 13), Run(0, 7, 1)], generator, None)
    arena.reserve(3, 10)
    whole = torch.randn(2, (HEADS + 2 * KV) * DIM, generator=generator).to(kind).view(2, HEADS + 2 * KV, DIM)
    parts = whole.split([HEADS, KV, KV], dim=1)
    runs = [Run(3, 9, 1), Run(2, 33, 1)]
    got = arena.attend(0, *parts, runs, scale=0.4, window=5, softcap=None)
    torch.testing.assert_close(got, plain.attend(*parts, runs, 5), atol=2e-2, rtol=2e-2)


def test_sizes() -> None:
    assert [capacity(n) for n in (1, 64, 65, 96, 97, 129, 200)] == [64, 64, 96, 96, 128, 192, 256]
    for n in range(64, 3000, 37):
        assert whole_capacity(n) <= n < capacity(whole_capacity(n) + 1)
