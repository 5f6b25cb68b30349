"""Where adapters come from: a name is resolved once, when a request arrives, to a digest and a way to load it.

The library is one source (the server plugs it in); `Local` is the other, for adapters that a program already holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from veneer.adapter import Adapter
from veneer.errors import ConfigError, Conflict, NotFound
from veneer.registry import did_you_mean


@dataclass(frozen=True, eq=False)
class Found:
    """An adapter that a name stood for at one moment.

    digest   content identity: what caches are keyed by and logs name
    bytes    about what it takes in memory
    load     reads it; called on a worker thread, never on the step path
    version  what the source calls it ("tickets@3"), for people
    allow    why it may run on a base that it does not belong to, where somebody decided so
    template gives the chat template that it brings along, or None for the base's
    """

    name: str
    digest: str
    bytes: int
    load: Callable[[], Adapter]
    version: str = ""
    allow: str | None = None
    template: Callable[[], str | None] = lambda: None


class AdapterSource(Protocol):
    """Anything that knows adapters by name."""

    def resolve(self, name: str) -> Found:
        """What `name` stands for now, or NotFound. Must be quick: it runs when a request arrives."""


class Local:
    """Adapters held in memory, by name."""

    def __init__(self) -> None:
        self._adapters: dict[str, Found] = {}

    def add(self, name: str, adapter: Adapter, *, replace: bool = False) -> Found:
        """File `adapter` under `name`.

        A name that is taken needs `replace`; running requests keep what they started with.
        """
        taken = self._adapters.get(name)
        if taken is not None and taken.digest != adapter.digest and not replace:
            raise Conflict(f"an adapter called '{name}' is already here", help="pass replace=True to swap it")
        size = sum(t.nbytes for part in adapter.parts for t in part.tensors.values())
        template = adapter.provenance.chat_template
        self._adapters[name] = Found(name, adapter.digest, size, lambda: adapter, name, template=lambda: template)
        return self._adapters[name]

    def remove(self, name: str) -> Found:
        """Take `name` away; what it stood for."""
        found = self.resolve(name)
        del self._adapters[name]
        return found

    def resolve(self, name: str) -> Found:
        if name not in self._adapters:
            help = did_you_mean(name, list(self._adapters)) if self._adapters else "no adapter has been added yet"
            raise NotFound(f"no adapter is called '{name}'", help=help)
        return self._adapters[name]

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def names(self) -> list[str]:
        return list(self._adapters)


@dataclass(frozen=True, eq=False)
class Recipe:
    """What one sequence runs with: adapters and factors. `key` is its identity, "" for the bare base."""

    key: str
    parts: tuple[tuple[Found, float], ...] = ()

    @staticmethod
    def of(parts: Sequence[tuple[Found, float]]) -> Recipe:
        """One adapter at factor 1 keeps its own digest; anything else gets the digest of the list."""
        kept = tuple((found, factor) for found, factor in parts if factor != 0)
        if not kept:
            return Recipe("")
        if len(kept) == 1 and kept[0][1] == 1.0:
            return Recipe(kept[0][0].digest, kept)
        listing = "+".join(f"{found.digest}*{factor!r}" for found, factor in kept)
        return Recipe(hashlib.sha256(listing.encode()).hexdigest(), kept)

    def template(self) -> str | None:
        """The chat template of its adapters, or None where they bring none. Several different ones are refused."""
        brought = {found.name: template for found, _ in self.parts if (template := found.template()) is not None}
        if len(set(brought.values())) > 1:
            raise ConfigError(
                f"the adapters {', '.join(brought)} bring different chat templates",
                help="render the conversation yourself and send it as a text prompt",
            )
        return next(iter(brought.values()), None)

    @property
    def summed(self) -> frozenset[str]:
        """Digests of what is weighted or summed; none for one adapter as it is."""
        return frozenset(found.digest for found, _ in self.parts) - {self.key}

    @property
    def bytes(self) -> int:
        return sum(found.bytes for found, _ in self.parts)
