"""The store gives what the definition of attention gives, seated or not, through growth, moves and reuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.engine.arena import Arena, capacity, whole_capacity
from veneer.models.state import Run
from veneer.ops.attention import attention_over_reference

KV, HEADS, DIM = 2, 4, 8


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


def rows(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(n, HEADS, DIM, generator=generator),
        torch.randn(n, KV, DIM, generator=generator),
        torch.randn(n, KV, DIM, generator=generator),
    )


@pytest.mark.parametrize("window", [None, 9])
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5), steps=st.integers(1, 12), seed=st.integers(0, 99))
def test_reading_in_chunks_and_decoding_equal_the_definition(
    window: int | None, lengths: list[int], steps: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    arena, plain = Arena(1, KV, DIM, torch.float32, torch.device("cpu")), Plain()
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
    q, k, v = rows(sum(r.length for r in runs), generator)
    got = arena.attend(0, q, k, v, runs, scale=0.4, window=window, softcap=None)
    torch.testing.assert_close(got, plain.attend(q, k, v, runs, window), atol=1e-5, rtol=1e-5)


def test_some_of_a_table_may_decode_without_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    arena, plain = Arena(1, KV, DIM, torch.float32, torch.device("cpu")), Plain()
    for id in range(3):
        arena.open(id, 5)
        _compare(arena, plain, [Run(id, 0, 5)], generator, None)
        arena.seat(id, 5)
    _compare(arena, plain, [Run(2, 5, 1), Run(0, 5, 1)], generator, None)
    _compare(arena, plain, [Run(1, 5, 1)], generator, None)


def test_what_a_broken_sequence_leaves_behind_is_never_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    arena, plain = Arena(1, KV, DIM, torch.float32, torch.device("cpu")), Plain()
    arena.open(9, 50)
    _compare(arena, plain, [Run(9, 0, 50)], generator, None)
    arena.seat(9, 50)  # the table stays while somebody sits in it, and with it the seat that is left
    arena.open(0, 60)
    q, k, v = rows(60, generator)
    arena.attend(0, q, k * torch.nan, v * torch.nan, [Run(0, 0, 60)], scale=1.0, window=None, softcap=None)
    arena.seat(0, 60)
    arena.close(0)
    for id, length in ((1, 3), (2, 40)):
        arena.open(id, length)
        _compare(arena, plain, [Run(id, 0, length)], generator, None)
        arena.seat(id, length)
    _compare(arena, plain, [Run(1, 3, 1), Run(2, 40, 1), Run(9, 50, 1)], generator, None)


def test_a_prefix_is_copied_and_a_kept_sequence_shrinks_to_its_size() -> None:
    arena = Arena(2, KV, DIM, torch.float32, torch.device("cpu"))
    arena.open(0, 50)
    for layer in (0, 1):
        arena.put_prefix(layer, 0, torch.full((50, KV, DIM), float(layer)), torch.full((50, KV, DIM), layer + 10.0))
    arena.keep(0, 33)
    arena.open(1, 40)
    arena.copy(0, 1, 32)
    view = arena._view(1)
    assert view[1, 1, :32].eq(11.0).all()
    assert view[0, 0, :32].eq(0.0).all()
    assert arena._view(0).shape[2] == 33


def test_everything_is_given_back() -> None:
    arena = Arena(1, KV, DIM, torch.float32, torch.device("cpu"))
    sizes = []
    for _ in range(5):
        for id in range(20):
            arena.open(id, 40 + id)
            arena.seat(id, 40 + id)
        arena.close_all(range(20))
        sizes.append(arena.allocated)
    assert len(set(sizes[1:])) == 1
    assert sizes[-1] <= 8 * capacity(60) * arena.position_bytes


def test_sizes() -> None:
    assert [capacity(n) for n in (1, 64, 65, 96, 97, 129, 200)] == [64, 64, 96, 96, 128, 192, 256]
    for n in range(64, 3000, 37):
        assert whole_capacity(n) <= n < capacity(whole_capacity(n) + 1)
