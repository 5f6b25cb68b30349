"""Which adapters are in memory: their states, their bytes, and who uses them. No tensors, no threads, no clock of its own.

    available --want--> loading --loaded--> resident --drain--> draining --last use ends--> available
                           |                    \\--evicted (unused, least recently used)--> available
                           |--larger than told, and no room for that now--> available
                           \\--failed--> failed(reason, retry after)

Uses are counted per sequence, taken and given back in one place. An adapter in use or pinned is never evicted. The
bytes of an adapter are charged when its loading starts, so the sum never exceeds the budget, whatever finishes first.

Keys are content digests. A name is only how somebody asks for one: replacing an adapter under its name gives a new
key, and the old one stays until its last sequence has ended.
"""

from __future__ import annotations

from collections.abc import Collection, Container
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeAlias, TypeVar

from veneer.errors import Conflict, NotFound, ResourceError

P = TypeVar("P")

PASSING = 64
"""Records of sums out of memory that are remembered: their factors are the clients' to choose, so there is no end of them."""

State: TypeAlias = Literal["available", "loading", "resident", "draining", "failed"]
_IN_MEMORY: frozenset[State] = frozenset({"loading", "resident", "draining"})


@dataclass
class Slot(Generic[P]):
    """One adapter, or a sum of those in `parts`. `payload` is its packed form while it is resident or draining."""

    key: str
    bytes: int
    state: State = "available"
    payload: P | None = None
    uses: int = 0
    pinned: bool = False
    last_used: float = 0.0
    reason: str = ""
    failures: int = 0
    retry_at: float = 0.0
    parts: Collection[str] = ()


@dataclass
class Counters:
    """What happened so far: `hits` and `misses` count sequences that found their adapter resident or not."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    failures: int = 0


@dataclass
class Slots(Generic[P]):
    """All adapters that were asked for, under a budget in bytes.

    backoff  seconds before a failed adapter may be tried again; doubles with each failure in a row, up to `backoff_most`
    """

    budget: int
    backoff: float = 1.0
    backoff_most: float = 300.0
    counters: Counters = field(default_factory=Counters)
    _slots: dict[str, Slot[P]] = field(default_factory=dict)

    @property
    def charged(self) -> int:
        """Bytes of adapters that are loading, resident or draining."""
        return sum(s.bytes for s in self._slots.values() if s.state in _IN_MEMORY)

    def states(self) -> dict[str, State]:
        return {key: slot.state for key, slot in self._slots.items()}

    def slot(self, key: str) -> Slot[P]:
        """The slot of `key`, or NotFound."""
        if key not in self._slots:
            raise NotFound(f"no adapter with digest {key[:12]} is known here")
        return self._slots[key]

    def know(self, key: str, bytes: int, parts: Collection[str] = ()) -> Slot[P]:
        """Make `key` known; `bytes` is what it will take in memory, as far as one can tell before loading."""
        if key not in self._slots:
            if parts:
                out = [k for k, s in self._slots.items() if s.parts and s.state in ("available", "failed")]
                for old in out[:-PASSING]:
                    del self._slots[old]
            self._slots[key] = Slot(key, bytes, parts=parts)
        return self._slots[key]

    def holding(self, key: str) -> list[Slot[P]]:
        """Those that an adapter is in: its own and the sums it is a part of."""
        return [slot for slot in self._slots.values() if key == slot.key or key in slot.parts]

    def want(self, key: str, now: float, sparing: Container[str] = ()) -> State:
        """Ask for `key`. Where there is room it goes from available (or failed long ago) to loading: the caller starts the load.

        Room is made by evicting unused adapters, the least recently used first, but none of `sparing`. The answer is the
        state after that; "available" means that there is no room now.
        """
        slot = self.slot(key)
        retry = slot.state == "failed" and now >= slot.retry_at
        if slot.state != "available" and not retry:
            return slot.state
        if slot.bytes > self.budget:
            self._fail(slot, f"it takes {slot.bytes:,} bytes and the budget for adapters is {self.budget:,}", now)
            return slot.state
        if self._make_room(slot.bytes, sparing):
            slot.state, slot.reason = "loading", ""
        return slot.state

    def loaded(self, key: str, payload: P, bytes: int, now: float) -> bool:
        """The load of `key` is done and takes `bytes`. False if there is no room now: it is available, its size known."""
        slot = self.slot(key)
        assert slot.state == "loading", f"{slot.state} slot loaded"
        slot.bytes = 0
        if not self._make_room(bytes):
            slot.bytes, slot.state = bytes, "available"
            slot.reason = f"it takes {bytes:,} bytes in memory, and other adapters in use leave too few"
            return False
        slot.bytes, slot.payload, slot.state = bytes, payload, "resident"
        slot.last_used, slot.failures = now, 0
        self.counters.loads += 1
        return True

    def hopeless(self, key: str) -> ResourceError | None:
        """Why there is no room for `key` even when nobody uses anything; None where there is."""
        held = (s.bytes for s in self._slots.values() if s.pinned and s.key != key and s.state in _IN_MEMORY)
        need, most = self.slot(key).bytes, self.budget - sum(held)
        if need <= most:
            return None
        return ResourceError(
            f"there is no room in memory for this adapter of {need:,} bytes: what is pinned or merged leaves {most:,}",
            help="unpin an adapter, or start with a larger adapter budget",
        )

    def failed(self, key: str, reason: str, now: float) -> None:
        """The load of `key` failed for `reason`; others are not affected, and it is not tried again at once."""
        self._fail(self.slot(key), reason, now)

    def acquire(self, key: str, now: float) -> P:
        """One sequence starts to use a resident adapter."""
        slot = self.slot(key)
        assert slot.state == "resident" and slot.payload is not None, f"{slot.state} slot acquired"
        slot.uses += 1
        slot.last_used = now
        return slot.payload

    def release(self, key: str, now: float) -> None:
        """One sequence has ended. The last one out of a draining adapter frees it."""
        slot = self.slot(key)
        assert slot.uses > 0, "a slot was released more often than acquired"
        slot.uses -= 1
        slot.last_used = now
        if slot.state == "draining" and slot.uses == 0:
            self._free(slot)

    def pin(self, key: str, pinned: bool = True) -> None:
        """Keep `key` from being evicted, or let it go again."""
        self.slot(key).pinned = pinned

    def drain(self, key: str) -> int:
        """Let no new sequence in and free the adapter, and sums that hold it, once unused. The bytes that were freed at once."""
        slots = self.holding(key)
        if any(slot.state == "loading" for slot in slots):
            raise Conflict("the adapter is being loaded; unload it when that is done")
        freed = 0
        for slot in slots:
            slot.pinned = False
            if slot.state == "resident" and slot.uses:
                slot.state = "draining"
            elif slot.state == "resident":
                freed += self._free(slot)
        return freed

    def forget(self, key: str) -> None:
        """Drop the record of an adapter that is not in memory."""
        if self.slot(key).state not in ("available", "failed"):
            raise Conflict(f"adapter {key[:12]} is {self.slot(key).state}; drain it first")
        del self._slots[key]

    def _make_room(self, bytes: int, sparing: Container[str] = ()) -> bool:
        free = self.budget - self.charged
        victims: list[Slot[P]] = []
        idle = (s for s in self._slots.values() if s.state == "resident" and not s.uses and not s.pinned)
        for slot in sorted(idle, key=lambda s: s.last_used):
            if free >= bytes:
                break
            if slot.key in sparing:
                continue
            victims.append(slot)
            free += slot.bytes
        if free < bytes:
            return False
        for slot in victims:
            self._free(slot)
            self.counters.evictions += 1
        return True

    def _free(self, slot: Slot[P]) -> int:
        slot.state, slot.payload = "available", None
        return slot.bytes

    def _fail(self, slot: Slot[P], reason: str, now: float) -> None:
        slot.state, slot.payload, slot.reason = "failed", None, reason
        slot.failures += 1
        slot.retry_at = now + min(self.backoff * 2 ** (slot.failures - 1), self.backoff_most)
        self.counters.failures += 1
