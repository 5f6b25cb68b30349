"""Which tokens go into the next step: continuous batching without a tensor.

Every running sequence that is decoding takes part in every step; then prompts are read in chunks, under a token budget
that follows the measured time of a step, so that a long prompt can't stall the streams beside it. Short prompts go
first, until a long one has waited `patience` seconds.

A waiting sequence is let in when the gate finds room for it. Others may overtake one that does not fit, but only until
it has waited `patience` seconds: from then on nobody enters before it, so it gets its place as soon as the running
ones end.

The surprise: waiting for an adapter to be read from disk is not waiting for room. Such a sequence blocks nobody, and
its patience starts when the adapter is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

_LOOKAHEAD = 16
"""Waiting sequences without room that are asked in one step, so that a long queue costs a step nothing."""

_FORESEEN = 8
"""Waiting sequences whose adapters are read while all places are taken."""

Verdict: TypeAlias = Literal["enter", "full", "later"]
"""enter: room was taken.  full: no room now, it counts as waiting.  later: something else must happen first."""


@dataclass(eq=False)
class Seq:
    """One answer in the making.

    id         unique in this engine
    tokens     the prompt, then what was generated
    prompt     how many of `tokens` are the prompt
    limit      most tokens to generate
    adapter    residency key of its adapter, "" for the base
    arrived    when it was asked for (seconds of the engine's clock)
    after      another choice of the same request that reads the prompt for both
    virtual    rows that the adapter puts before the prompt
    switch     the adapter applies from this token on (0, but for invoked adapters)
    stored     how many of `tokens` have keys and values in the cache; 0 again where all have to be read anew
    cached     how many of those were copied from the prefix cache
    """

    id: int
    request: str
    choice: int
    tokens: list[int]
    prompt: int
    limit: int
    adapter: str = ""
    arrived: float = 0.0
    after: Seq | None = None
    virtual: int = 0
    switch: int = 0
    stored: int = 0
    cached: int = 0
    entered: float | None = None
    ended: bool = False
    waiting_since: float = field(init=False)

    def __post_init__(self) -> None:
        self.waiting_since = self.arrived

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def decoding(self) -> bool:
        """The prompt is read and every step gives one token."""
        return len(self.tokens) > self.prompt and self.pending == 1

    @property
    def pending(self) -> int:
        """Tokens that are known but not yet in the cache."""
        return len(self.tokens) - self.stored

    @property
    def positions(self) -> int:
        """Positions of all that is known, virtual rows counted."""
        return self.virtual + len(self.tokens)

    @property
    def most_positions(self) -> int:
        """Positions it can come to hold: the last token generated is never stored."""
        return self.virtual + self.prompt + self.limit - 1

    @property
    def prompt_read(self) -> bool:
        return self.stored >= self.prompt or self.decoding


class Gate(Protocol):
    """Whoever owns memory: decides whether a sequence can start now, and takes the room if so."""

    def enter(self, sequence: Seq, now: float) -> Verdict: ...

    def foresee(self, sequences: Sequence[Seq], now: float) -> None:
        """These wait for a place, in this order: what takes time before they can start may begin now."""


@dataclass(frozen=True)
class Limits:
    """What one engine takes on.

    streams       sequences running at once
    adapters      distinct adapters running at once; they are what a decode step pays for
    waiting       sequences waiting at once; more are refused
    answer        most tokens of an answer whose request names no limit
    patience      seconds after which nobody may overtake a waiting sequence any more
    chunk         prompt tokens in a step while others decode: least and most
    alone         prompt tokens in a step while nobody decodes
    fixed         where not 0: one prompt a step, in chunks of exactly this size, so that chunks depend on nothing else
    step_seconds  how long a step with prompt tokens in it should take
    """

    streams: int = 64
    adapters: int = 32
    waiting: int = 1024
    answer: int = 2048
    patience: float = 2.0
    chunk: tuple[int, int] = (32, 512)
    alone: int = 1024
    fixed: int = 0
    step_seconds: float = 0.15


@dataclass(frozen=True)
class Step:
    """What to run: one token of each of `decode`, and the next `count` tokens of each of `prefill`."""

    decode: tuple[Seq, ...] = ()
    prefill: tuple[tuple[Seq, int], ...] = ()
    entered: tuple[Seq, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)

    @property
    def seqs(self) -> tuple[Seq, ...]:
        return self.decode + tuple(seq for seq, _ in self.prefill)

    @property
    def tokens(self) -> int:
        return len(self.decode) + sum(count for _, count in self.prefill)


@dataclass(frozen=True)
class StepReport:
    """What one step did: for metrics. `merged`: on the merged set of the hot adapter."""

    decoded: int
    prefilled: int
    adapters: int
    seconds: float
    merged: bool = False


class Pace:
    """How many prompt tokens fit into the time of a step, from the steps measured so far."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._per_token: float | None = None

    def observe(self, prompt_tokens: int, seconds: float) -> None:
        """A step with this many prompt tokens took so long. Small steps say little about the cost of a token."""
        if prompt_tokens < self._limits.chunk[0]:
            return
        cost = seconds / prompt_tokens
        self._per_token = cost if self._per_token is None else 0.8 * self._per_token + 0.2 * cost

    @property
    def chunk(self) -> int:
        """Prompt tokens to put into a step beside decoding sequences."""
        low, high = self._limits.chunk
        if self._per_token is None:
            return min(high, max(low, 128))
        return min(high, max(low, int(self._limits.step_seconds / self._per_token)))


class Scheduler:
    """Sequences waiting and running. A sequence is in exactly one of the two from `add` until `remove`."""

    def __init__(self, limits: Limits, gate: Gate) -> None:
        self.limits = limits
        self.pace = Pace(limits)
        self._gate = gate
        self._waiting: dict[int, Seq] = {}
        self._running: dict[int, Seq] = {}

    @property
    def waiting(self) -> tuple[Seq, ...]:
        return tuple(self._waiting.values())

    @property
    def running(self) -> tuple[Seq, ...]:
        return tuple(self._running.values())

    def add(self, sequence: Seq) -> None:
        """Take a new sequence into the queue, at its end."""
        assert sequence.id not in self._waiting and sequence.id not in self._running
        self._waiting[sequence.id] = sequence

    def remove(self, sequence: Seq) -> bool:
        """Forget a sequence, wherever it is. True if it was running and so holds room."""
        sequence.ended = True
        self._waiting.pop(sequence.id, None)
        return self._running.pop(sequence.id, None) is not None

    def plan(self, now: float) -> Step:
        """Let in whoever fits, then say what the next step runs."""
        entered = tuple(self._enter(now))
        decode = tuple(s for s in self._running.values() if s.decoding)
        budget = self.pace.chunk if decode else self.limits.alone
        return Step(decode, tuple(self._prefill(budget, now)), entered)

    def foresee(self, now: float) -> None:
        """Start to read the adapters of those who wait next, where all streams are taken."""
        if self._waiting and len(self._running) >= self.limits.streams:
            self._gate.foresee(tuple(itertools.islice(self._waiting.values(), _FORESEEN)), now)

    def _enter(self, now: float) -> Iterator[Seq]:
        adapters = {s.adapter for s in self._running.values() if s.adapter}
        turned_away = 0
        for sequence in tuple(self._waiting.values()):
            if len(self._running) >= self.limits.streams:
                return
            verdict = self._verdict(sequence, adapters, now)
            if verdict == "later":
                sequence.waiting_since = now
            elif verdict == "enter":
                del self._waiting[sequence.id]
                sequence.entered = now
                self._running[sequence.id] = sequence
                adapters |= {sequence.adapter} - {""}
                yield sequence
            else:
                turned_away += 1
                if turned_away == _LOOKAHEAD or now - sequence.waiting_since >= self.limits.patience:
                    return

    def _verdict(self, sequence: Seq, adapters: set[str], now: float) -> Verdict:
        leader = sequence.after
        if leader is not None and not (leader.prompt_read or leader.ended):
            return "later"
        crowded = sequence.adapter not in adapters and len(adapters) >= self.limits.adapters
        if sequence.adapter and crowded:
            return "full"
        return self._gate.enter(sequence, now)

    def _prefill(self, budget: int, now: float) -> Iterator[tuple[Seq, int]]:
        reading = [s for s in self._running.values() if not s.decoding]
        reading.sort(key=lambda s: self._reading_order(s, now))
        if self.limits.fixed:
            yield from ((s, min(s.pending, self.limits.fixed)) for s in reading[:1])
            return
        for sequence in reading:
            count = min(sequence.pending, budget)
            if count == 0:
                return
            budget -= count
            yield sequence, count

    def _reading_order(self, sequence: Seq, now: float) -> tuple[int, float]:
        since = sequence.arrived if sequence.entered is None else sequence.entered
        if now - since >= self.limits.patience:
            return (0, since)
        return (1, sequence.pending)
