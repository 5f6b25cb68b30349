"""Prefix keys hold identity, never names; promises are kept; leftovers give way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.engine.kvcache import BLOCK, Chain, KVBook
from veneer.errors import ResourceError

NEVER = 1 << 62
TOKENS = st.lists(st.integers(0, 3), min_size=BLOCK, max_size=4 * BLOCK)


def keys(base: str, adapter: str, tokens: list[int], switch: int = 0) -> list[bytes]:
    return Chain(base, adapter, switch).extend(tokens, len(tokens))


@given(TOKENS, TOKENS, st.sampled_from(["", "A", "B"]), st.sampled_from(["", "A", "B"]), st.sampled_from(["x", "y"]))
def test_two_chains_share_a_block_only_if_everything_before_is_the_same(
    one: list[int], two: list[int], a: str, b: str, base: str
) -> None:
    first, second = keys("x", a, one), keys(base, b, two)
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        same = one[: (index + 1) * BLOCK] == two[: (index + 1) * BLOCK] and a == b and base == "x"
        assert (left == right) == same


def test_before_its_invocation_an_invoked_adapter_has_the_bases_keys() -> None:
    tokens = list(range(4 * BLOCK))
    base, invoked = keys("x", "", tokens), keys("x", "A", tokens, switch=2 * BLOCK + 3)
    assert invoked[:2] == base[:2]
    assert invoked[2] != base[2]
    assert invoked[2] != keys("x", "A", tokens, switch=2 * BLOCK + 4)[2]
    assert keys("x", "A", tokens, switch=NEVER) == base
    assert not set(keys("x", "A", tokens)) & set(base)


def test_a_chain_grows_as_its_sequence_does() -> None:
    tokens = list(range(70))
    chain = Chain("x", "A")
    for stop in (5, 16, 40, 70):
        grown = list(chain.extend(tokens, stop))
    assert grown == keys("x", "A", tokens)
    assert len(grown) == 70 // BLOCK
    assert [len(chain.extend(tokens, stop)) for stop in (0, 15, 16, 40, 70)] == [0, 0, 1, 2, 4], (
        "no key of what comes later"
    )


def test_the_longest_stored_prefix_is_found() -> None:
    book = KVBook(10_000, 1)
    tokens = list(range(80))
    chain = keys("x", "A", tokens)
    assert book.promise(1, 100) == []
    book.wrote(1, chain[:2])
    assert book.promise(2, 100) == []
    book.wrote(2, chain[:4])
    assert book.find(chain) == (2, 4)
    assert book.find(chain[:3]) == (2, 3)
    assert book.find(keys("x", "B", tokens)) is None
    book.end(2, 64, keep=False)
    assert book.find(chain) == (1, 2)


def test_promises_are_never_broken_and_leftovers_give_way_oldest_first() -> None:
    book = KVBook(100, 1)
    for id in (1, 2, 3):
        assert book.promise(id, 30) == []
        book.wrote(id, keys("x", str(id), list(range(16))))
        assert book.end(id, 30, keep=True)
    assert (book.promised, book.kept) == (0, 90)
    assert book.promise(4, 60) == [1, 2]
    assert book.promise(5, 50) is None
    assert (book.promised, book.kept) == (60, 30)
    assert book.promise(6, 40) == [3]


def test_reuse_keeps_a_leftover_young() -> None:
    book = KVBook(100, 1)
    chains = {id: keys("x", str(id), list(range(16))) for id in (1, 2)}
    for id in (1, 2):
        book.promise(id, 40)
        book.wrote(id, chains[id])
        book.end(id, 40, keep=True)
    assert book.find(chains[1]) == (1, 1)
    assert book.promise(3, 50) == [2]


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    book = KVBook(1000, 10)
    book.check(100)
    with pytest.raises(ResourceError, match="1,010 bytes"):
        book.check(101)


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=30))
def test_the_sum_never_exceeds_the_budget(traffic: list[tuple[int, bool]]) -> None:
    book, live = KVBook(100, 1), []
    for id, (size, ends) in enumerate(traffic):
        if book.promise(id, size) is not None:
            book.wrote(id, keys("x", str(id), list(range(16))))
            live.append((id, size))
        if ends and live:
            old, positions = live.pop(0)
            book.end(old, positions, keep=True)
        assert book.promised + book.kept <= 100
    for id, positions in live:
        book.end(id, positions, keep=False)
    book.clear()
    assert list(book.holders()) == []
    assert book.find(keys("x", "0", list(range(16)))) is None
