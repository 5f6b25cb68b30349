"""Bookkeeping of the key/value cache: bytes promised, bytes kept for reuse, and which stored prefix a new prompt can start from.

Room for the longest a sequence can become is promised when it enters, so nothing is ever thrown out half-way. What a
finished sequence leaves behind is kept for reuse in the bytes that nobody has been promised, the least recently used
going first.

A prefix is known by a chain of SHA-256 digests over blocks of tokens: H(previous, adapter digests of the block, its
tokens), and the chain starts from the identity of the base. Names play no part, so an adapter replaced under its name
can't be answered from the keys and values of the old one. The surprise: with an invoked adapter (aLoRA) the blocks
before the invocation carry the base's digest, so they are shared with the base and with every other such adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from veneer.errors import ResourceError

BLOCK = 16
"""Tokens in a block: what is reused is a whole number of them."""


class Chain:
    """The block keys of one sequence, extended as it grows.

    base, adapter  their identities ("" for no adapter)
    switch         the adapter applies from this token on, the bare base before
    """

    def __init__(self, base: str, adapter: str, switch: int = 0) -> None:
        self._adapter, self._switch = adapter, switch
        self._last = hashlib.sha256(base.encode()).digest()
        self.keys: list[bytes] = []

    def extend(self, tokens: Sequence[int], stop: int) -> list[bytes]:
        """The keys of the whole blocks within `tokens[:stop]`, no others. Earlier tokens are as they were at the last call."""
        for start in range(len(self.keys) * BLOCK, stop - BLOCK + 1, BLOCK):
            bare = min(max(self._switch - start, 0), BLOCK) if self._adapter else BLOCK
            digest = hashlib.sha256(self._last)
            digest.update(f"{bare}|{self._adapter if bare < BLOCK else ''}|".encode())
            digest.update(b"".join(token.to_bytes(4, "little") for token in tokens[start : start + BLOCK]))
            self._last = digest.digest()
            self.keys.append(self._last)
        return self.keys[: max(stop, 0) // BLOCK]


@dataclass
class _Kept:
    """What is known of one sequence. `secret`: its contents are its own, and no other may start from them."""

    keys: list[bytes] = field(default_factory=list)
    promised: int = 0
    kept: int = 0
    live: bool = True
    owner: str = ""
    secret: bool = False


class KVBook:
    """Promises and leftovers, by sequence id. The store itself (`arena`) does what this says.

    budget    bytes for keys and values in all
    position  bytes of one position over all layers
    """

    def __init__(self, budget: int, position: int) -> None:
        self.budget = budget
        self.position = position
        self._entries: dict[int, _Kept] = {}
        self._holders: dict[bytes, dict[int, int]] = {}

    @property
    def promised(self) -> int:
        """Bytes promised to sequences that run."""
        return sum(e.promised for e in self._entries.values())

    @property
    def kept(self) -> int:
        """Bytes of finished sequences kept for reuse."""
        return sum(e.kept for e in self._entries.values())

    def check(self, positions: int) -> None:
        """Refuse what could never run."""
        need = positions * self.position
        if need > self.budget:
            raise ResourceError(
                f"prompt and answer may take {positions:,} positions, {need:,} bytes of keys and values; "
                f"the budget is {self.budget:,} bytes, {self.budget // self.position:,} positions",
                help="ask for a shorter answer (max_tokens), or start with a larger KV budget",
            )

    def promise(self, id: int, positions: int, owner: str = "") -> list[int] | None:
        """Take room for a sequence of adapter `owner`. Ids of leftovers to free for it, or None where there is no room now."""
        need = positions * self.position
        if self.promised + need > self.budget:
            return None
        dropped = []
        for other in [i for i, e in self._entries.items() if not e.live]:
            if self.promised + self.kept + need <= self.budget:
                break
            self._drop(other)
            dropped.append(other)
        self._entries[id] = _Kept(promised=need, owner=owner)
        return dropped

    def wrote(self, id: int, keys: Sequence[bytes]) -> None:
        """The blocks with these keys (the whole chain from the start) are stored under `id` now."""
        entry = self._entries[id]
        if entry.secret:
            return
        for index in range(len(entry.keys), len(keys)):
            entry.keys.append(keys[index])
            self._holders.setdefault(keys[index], {})[id] = index

    def rewrite(self, id: int) -> None:
        """What is stored under `id` will be written anew: nobody starts from what was there."""
        self._unlist(id, self._entries[id])

    def end(self, id: int, positions: int, *, keep: bool) -> bool:
        """A sequence has ended; what it stored takes room for `positions`.

        True if its contents are kept for reuse, else they are to be freed.
        """
        entry = self._entries[id]
        entry.promised, entry.live = 0, False
        size = positions * self.position
        if not (keep and entry.keys) or self.promised + self.kept + size > self.budget:
            self._drop(id)
            return False
        entry.kept = size
        self._entries[id] = self._entries.pop(id)
        return True

    def find(self, keys: Sequence[bytes]) -> tuple[int, int] | None:
        """The stored sequence with the longest prefix of this chain, and how many blocks of it; None without a match."""
        for count in range(len(keys), 0, -1):
            holders = self._holders.get(keys[count - 1])
            if holders:
                id = next(reversed(holders))
                if not self._entries[id].live:
                    self._entries[id] = self._entries.pop(id)
                return id, count
        return None

    def clear(self) -> list[int]:
        """Forget all leftovers; their ids, to be freed."""
        ids = [i for i, e in self._entries.items() if not e.live]
        for id in ids:
            self._drop(id)
        return ids

    def forget(self, owner: str) -> list[int]:
        """Let nobody start from what sequences of adapter `owner` stored; ids of the leftovers among them, to be freed."""
        gone = [i for i, e in self._entries.items() if not e.live and e.owner == owner]
        for id in gone:
            self._drop(id)
        for id, entry in self._entries.items():
            if entry.owner == owner:
                self._unlist(id, entry)
                entry.secret = True
        return gone

    def holders(self) -> Iterator[int]:
        """Ids with anything stored or promised."""
        return iter(self._entries)

    def _drop(self, id: int) -> None:
        self._unlist(id, self._entries.pop(id))

    def _unlist(self, id: int, entry: _Kept) -> None:
        for key in entry.keys:
            holders = self._holders[key]
            del holders[id]
            if not holders:
                del self._holders[key]
        entry.keys = []
