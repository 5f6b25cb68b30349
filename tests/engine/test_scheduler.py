"""The scheduler never loses, starves or duplicates a sequence, whatever arrives, ends, loads or is cancelled in between."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from veneer.engine.scheduler import Limits, Pace, Scheduler, Seq, Step, Verdict

LIMITS = Limits(streams=3, adapters=2, patience=5.0, chunk=(4, 16), alone=24)


class Room:
    """A gate with so many units of memory, and adapters that may still be loading."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.loading: set[str] = set()
        self.held: dict[int, int] = {}
        self.foreseen: list[int] = []

    def enter(self, seq: Seq, now: float) -> Verdict:
        if seq.adapter in self.loading:
            return "later"
        if sum(self.held.values()) + seq.prompt > self.units:
            return "full"
        self.held[seq.id] = seq.prompt
        return "enter"

    def foresee(self, sequences: Sequence[Seq], now: float) -> None:
        assert 0 < len(sequences) <= 8 and not {s.id for s in sequences} & self.held.keys()
        self.foreseen = [s.id for s in sequences]


class Traffic(RuleBasedStateMachine):
    """Arrivals, steps, ends, cancellations and loads in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.room = Room(60)
        self.scheduler = Scheduler(LIMITS, self.room)
        self.now = 0.0
        self.alive: dict[int, Seq] = {}
        self.stuck: dict[int, float] = {}
        self.number = 0

    @rule(prompt=st.integers(1, 50), limit=st.integers(1, 4), adapter=st.sampled_from(["", "a", "b", "c"]))
    def arrive(self, prompt: int, limit: int, adapter: str) -> None:
        self.number += 1
        seq = Seq(self.number, "r", 0, list(range(prompt)), prompt, limit, adapter, self.now)
        self.alive[seq.id] = seq
        self.scheduler.add(seq)

    @rule(adapter=st.sampled_from(["a", "b", "c"]))
    def begin_load(self, adapter: str) -> None:
        if not any(s.adapter == adapter for s in self.scheduler.running):
            self.room.loading.add(adapter)

    @rule()
    def end_load(self) -> None:
        self.room.loading.clear()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._end(self.alive[data.draw(st.sampled_from(sorted(self.alive)))])

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0]))
    def step(self, seconds: float) -> None:
        self.now += seconds
        waited = {s.id: self.now - s.waiting_since for s in self.scheduler.waiting}
        before = [s.id for s in self.scheduler.waiting]
        loading = {s.id for s in self.scheduler.waiting if s.adapter in self.room.loading}
        step = self.scheduler.plan(self.now)
        self._check(step)
        entered = {s.id for s in step.entered}
        for place, id in enumerate(before):
            if id not in entered and id not in loading and waited[id] >= LIMITS.patience:
                assert not entered & set(before[place + 1 :]), "overtaken after its patience had run out"
        self._run(step)

    def _check(self, step: Step) -> None:
        ids = [s.id for s in step.decode] + [s.id for s, _ in step.prefill]
        assert len(ids) == len(set(ids)), "a sequence twice in one step"
        assert {s.id for s in step.decode} == {s.id for s in self.scheduler.running if s.decoding}
        assert all(1 <= count <= seq.pending for seq, count in step.prefill)
        budget = LIMITS.chunk[1] if step.decode else LIMITS.alone
        assert sum(count for _, count in step.prefill) <= budget
        if any(not s.decoding for s in self.scheduler.running):
            assert step.prefill, "a prompt that could be read was not"

    def _run(self, step: Step) -> None:
        for seq in step.decode:
            seq.stored += 1
        for seq, count in step.prefill:
            seq.stored += count
        for seq in (*step.decode, *(s for s, _ in step.prefill)):
            if not seq.pending:
                seq.tokens.append(0)
                if seq.generated >= seq.limit:
                    self._end(seq)

    def _end(self, seq: Seq) -> None:
        held = self.scheduler.remove(seq)
        assert held == (self.room.held.pop(seq.id, None) is not None), "room lost or given back twice"
        del self.alive[seq.id]

    @invariant()
    def everyone_is_somewhere_once(self) -> None:
        waiting, running = {s.id for s in self.scheduler.waiting}, {s.id for s in self.scheduler.running}
        assert not waiting & running
        assert waiting | running == set(self.alive)

    @invariant()
    def limits_hold(self) -> None:
        assert len(self.scheduler.running) <= LIMITS.streams
        assert len({s.adapter for s in self.scheduler.running} - {""}) <= LIMITS.adapters
        assert {s.id for s in self.scheduler.running} == set(self.room.held)

    def teardown(self) -> None:
        """Left alone, everybody gets to the end."""
        self.room.loading.clear()
        for _ in range(len(self.alive) * 30 + 10):
            self.step(1.0)
        assert not self.alive, "starved"


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_one_that_does_not_fit_is_overtaken_only_for_a_while() -> None:
    room = Room(10)
    scheduler = Scheduler(LIMITS, room)
    small, big, late = (Seq(i, "r", 0, [0] * n, n, 100, "", 0.0) for i, n in ((1, 4), (2, 10), (3, 4)))
    scheduler.add(small)
    scheduler.plan(0.0)
    scheduler.add(big)
    scheduler.add(late)
    assert scheduler.plan(4.9).entered == (late,)
    scheduler.remove(late)
    room.held.pop(3)
    scheduler.add(Seq(4, "r", 0, [0], 1, 1, "", 5.0))
    assert scheduler.plan(5.0).entered == ()
    scheduler.remove(small)
    room.held.pop(1)
    assert scheduler.plan(5.1).entered[0] is big


def test_choices_of_one_request_wait_for_the_one_that_reads_the_prompt() -> None:
    scheduler = Scheduler(LIMITS, Room(100))
    leader = Seq(1, "r", 0, [0] * 8, 8, 4)
    follower = Seq(2, "r", 1, [0] * 8, 8, 4, after=leader)
    scheduler.add(leader)
    scheduler.add(follower)
    assert scheduler.plan(0.0).entered == (leader,)
    leader.stored = 8
    assert scheduler.plan(0.1).entered == (follower,)


def test_short_prompts_go_first_until_a_long_one_has_waited() -> None:
    limits = Limits(alone=16, patience=1.0)
    scheduler = Scheduler(limits, Room(10_000))
    long = Seq(1, "r", 0, [0] * 100, 100, 4, arrived=0.0)
    short = Seq(2, "r", 0, [0] * 12, 12, 4, arrived=0.0)
    scheduler.add(long)
    scheduler.add(short)
    assert scheduler.plan(0.0).prefill == ((short, 12), (long, 4))
    assert scheduler.plan(1.5).prefill[0] == (long, 16)


def test_the_chunk_follows_the_measured_time_and_stays_within_its_bounds() -> None:
    pace = Pace(Limits(chunk=(32, 512), step_seconds=0.1))
    assert pace.chunk == 128
    for _ in range(40):
        pace.observe(100, 0.1)
    assert 95 <= pace.chunk <= 105
    pace.observe(8, 100.0)  # too small to say anything
    assert 95 <= pace.chunk <= 105
    for _ in range(40):
        pace.observe(100, 50.0)
    assert pace.chunk == 32


def test_deciding_needs_no_torch() -> None:
    modules = ["request", "scheduler", "slots", "kvcache", "source", "text"]
    code = f"import sys, {', '.join(f'veneer.engine.{m}' for m in modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": "src"}).returncode == 0


def test_the_gate_hears_who_waits_while_all_places_are_taken() -> None:
    room = Room(1000)
    scheduler = Scheduler(LIMITS, room)
    for number in range(14):
        scheduler.add(Seq(number, "r", 0, [1], 1, 2, "", 0.0))
    assert [s.id for s in scheduler.plan(0.0).entered] == [0, 1, 2]
    scheduler.foresee(0.0)
    assert room.foreseen == list(range(3, 11)), "the next eight, in their order"
    room.foreseen = []
    for seq in scheduler.running:
        scheduler.remove(seq)
        del room.held[seq.id]
    for seq in scheduler.waiting[1:]:
        scheduler.remove(seq)
    scheduler.plan(1.0)
    scheduler.foresee(1.0)
    assert room.foreseen == [], "nobody waits"
