"""Adapter slots: never over budget, never evicted in use, uses given back once, failures kept apart and retried later."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from veneer.engine.slots import PASSING, Slots
from veneer.errors import Conflict, NotFound

KEYS = st.sampled_from(["a", "b", "c", "d", "huge"])
SIZE = {"a": 3, "b": 4, "c": 5, "d": 1, "huge": 50}


class Life(RuleBasedStateMachine):
    """Wants, loads, failures, uses, pins and drains in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: Slots[str] = Slots(10)
        self.now = 0.0
        self.uses: dict[str, int] = {}
        for key, size in SIZE.items():
            self.slots.know(key, size)

    @rule(key=KEYS)
    def want(self, key: str) -> None:
        self.now += 1
        if self.slots.want(key, self.now) == "resident":
            assert self.slots.acquire(key, self.now) == key.upper()
            self.uses[key] = self.uses.get(key, 0) + 1

    @rule(key=KEYS, more=st.integers(0, 2))
    def load_ends(self, key: str, more: int) -> None:
        if self.slots.states()[key] == "loading":
            fits = self.slots.loaded(key, key.upper(), SIZE[key] + more, self.now)
            assert self.slots.states()[key] == ("resident" if fits else "available")

    @rule(key=KEYS)
    def load_fails(self, key: str) -> None:
        if self.slots.states()[key] == "loading":
            self.slots.failed(key, "bad file", self.now)

    @rule(key=KEYS)
    def release(self, key: str) -> None:
        if self.uses.get(key):
            self.slots.release(key, self.now)
            self.uses[key] -= 1

    @rule(key=KEYS, pinned=st.booleans())
    def pin(self, key: str, pinned: bool) -> None:
        self.slots.pin(key, pinned)

    @rule(key=KEYS)
    def drain(self, key: str) -> None:
        if self.slots.states()[key] == "loading":
            with pytest.raises(Conflict):
                self.slots.drain(key)
        else:
            self.slots.drain(key)

    @invariant()
    def never_over_budget(self) -> None:
        assert self.slots.charged <= 10

    @invariant()
    def in_use_means_in_memory(self) -> None:
        for key, count in self.uses.items():
            slot = self.slots.slot(key)
            assert slot.uses == count
            assert not count or (slot.state in ("resident", "draining") and slot.payload == key.upper())


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def filled() -> Slots[str]:
    slots: Slots[str] = Slots(10)
    for at, key in enumerate(("a", "b")):
        slots.know(key, 5)
        assert slots.want(key, at) == "loading"
        assert slots.loaded(key, key.upper(), 5, at)
    return slots


def test_the_least_recently_used_goes_first_and_pinned_ones_stay() -> None:
    slots = filled()
    slots.acquire("a", 2.0)
    slots.release("a", 3.0)
    slots.know("c", 5)
    assert slots.want("c", 4.0) == "loading"
    assert slots.states() == {"a": "resident", "b": "available", "c": "loading"}
    slots = filled()
    slots.pin("a")
    slots.know("c", 5)
    slots.want("c", 4.0)
    assert slots.states()["a"] == "resident"


def test_nothing_is_evicted_for_something_that_does_not_fit_anyway() -> None:
    slots = filled()
    slots.acquire("b", 1.0)
    slots.know("c", 6)
    assert slots.want("c", 2.0) == "available"
    assert slots.states()["a"] == "resident"


def test_draining_ends_with_the_last_use_and_lets_nobody_in() -> None:
    slots = filled()
    slots.acquire("a", 1.0)
    slots.acquire("a", 1.0)
    assert slots.drain("a") == 0
    assert slots.want("a", 2.0) == "draining"
    slots.release("a", 3.0)
    assert slots.states()["a"] == "draining"
    slots.release("a", 3.0)
    assert slots.states()["a"] == "available"
    assert slots.charged == 5
    assert slots.drain("b") == 5


def test_a_failed_adapter_is_left_alone_for_longer_each_time() -> None:
    slots: Slots[str] = Slots(10, backoff=1.0)
    slots.know("a", 5)
    now = 0.0
    for wait in (1.0, 2.0, 4.0):
        assert slots.want("a", now) == "loading"
        slots.failed("a", "rank 0 tensors", now)
        assert slots.want("a", now + wait - 0.01) == "failed"
        assert slots.slot("a").reason == "rank 0 tensors"
        now += wait
    assert slots.want("a", now) == "loading"
    slots.loaded("a", "A", 5, now)
    assert slots.slot("a").failures == 0


def test_what_can_never_fit_fails_with_the_numbers() -> None:
    slots: Slots[str] = Slots(10)
    slots.know("a", 11)
    assert slots.want("a", 0.0) == "failed"
    assert "11" in slots.slot("a").reason
    assert "10" in slots.slot("a").reason


def test_what_is_larger_than_it_was_said_to_be_waits_for_room() -> None:
    slots = filled()
    slots.acquire("a", 2.0)
    slots.know("c", 5)
    assert slots.want("c", 3.0) == "loading"
    assert not slots.loaded("c", "C", 6, 4.0)
    assert slots.want("c", 5.0) == "available" and slots.charged == 5
    slots.release("a", 6.0)
    assert slots.want("c", 7.0) == "loading" and slots.charged == 6
    assert slots.loaded("c", "C", 6, 8.0)


def test_what_pins_leave_no_room_for_is_told_so() -> None:
    slots = filled()
    slots.pin("a")
    slots.know("c", 5)
    slots.know("d", 6)
    assert slots.hopeless("c") is None and slots.hopeless("a") is None
    refusal = slots.hopeless("d")
    assert refusal is not None and "6" in refusal.message and "leaves 5" in refusal.message
    slots.pin("a", False)
    assert slots.hopeless("d") is None


def test_a_load_that_is_not_unloaded_keeps_its_pin() -> None:
    slots: Slots[str] = Slots(10)
    slots.know("a", 5)
    slots.want("a", 0.0)
    slots.pin("a")
    with pytest.raises(Conflict):
        slots.drain("a")
    assert slots.slot("a").pinned


def test_unknown_and_busy_keys_are_refused() -> None:
    slots = filled()
    with pytest.raises(NotFound):
        slots.slot("zzz")
    with pytest.raises(Conflict):
        slots.forget("a")
    slots.drain("a")
    slots.forget("a")
    assert "a" not in slots.states()


def test_what_is_spared_is_not_evicted() -> None:
    slots: Slots[str] = Slots(10)
    for key, size in SIZE.items():
        slots.know(key, size)
    for key in ("a", "b"):
        assert slots.want(key, 1.0) == "loading"
        assert slots.loaded(key, key, SIZE[key], 1.0)
    assert slots.want("c", 2.0, {"a", "b"}) == "available", "there is room only in the place of those"
    assert slots.want("c", 3.0, {"a"}) == "loading"
    assert slots.states() | {"d": ""} == {
        "a": "resident",
        "b": "available",
        "c": "loading",
        "d": "",
        "huge": "available",
    }


def test_sums_out_of_memory_are_forgotten_when_there_are_many() -> None:
    slots: Slots[str] = Slots(10)
    slots.know("adapter", 1)
    slots.know("in memory", 1, {"a part"})
    slots.want("in memory", 0)
    slots.loaded("in memory", "A", 1, 0)
    for number in range(1000):
        slots.know(f"{number}", 100 if number % 2 else 1, {"a part"})
        if number % 2:
            assert slots.want(f"{number}", number) == "failed"
    assert len(slots.states()) == 3 + PASSING and {"adapter", "in memory", "999"} <= slots.states().keys()
    assert slots.know("0", 1, {"a part"}).state == "available"


def test_sums_leave_with_an_adapter_they_hold() -> None:
    slots: Slots[str] = Slots(10)
    for key, parts in (("a", ()), ("b", ()), ("a+b", ("a", "b")), ("2*b", ("b",))):
        slots.know(key, 2, parts)
        slots.want(key, 0.0)
        if key != "2*b":
            slots.loaded(key, key, 2, 0.0)
    slots.acquire("a+b", 1.0)
    with pytest.raises(Conflict):
        slots.drain("b")
    assert slots.drain("a") == 2, "the sum is in use"
    assert slots.states() == {"a": "available", "b": "resident", "a+b": "draining", "2*b": "loading"}
    slots.release("a+b", 2.0)
    slots.loaded("2*b", "2*b", 2, 2.0)
    assert slots.states()["a+b"] == "available"
    assert slots.drain("b") == 4 and slots.charged == 0
