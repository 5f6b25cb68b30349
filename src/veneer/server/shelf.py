"""The library as the engine and the clients see it: names to versions, versions to adapters.

A client's name is resolved once, when its request arrives; what runs is a version, so an alias that moves meanwhile
changes nothing for it. A bare name with canary aliases is split by weight; the draw is a hash of the conversation
where there is one, so a conversation stays with one version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from veneer.engine.source import Found
from veneer.errors import NotFound
from veneer.library import Library, Version, parse_reference, route

_TEMPLATES = 4096
"""Versions whose chat template is remembered."""


class Shelf:
    """One library, or none."""

    def __init__(self, library: Library | None) -> None:
        self.library = library
        self._templates: dict[str, str | None] = {}

    def resolve(self, name: str) -> Found:
        """The engine's `AdapterSource`: `name` is a reference as `version_of` gives it."""
        return self.found(self._library(name).resolve(name))

    def version_of(self, reference: str, draw: float | None) -> Version:
        """The version that a client's reference means now, canaries by `draw` in [0, 1), if there is one."""
        library = self._library(reference)
        parsed = parse_reference(reference)
        if draw is not None and parsed.version is None and parsed.alias is None:
            chosen = route(library.aliases(parsed.name), draw)
            if chosen is not None:
                return library.resolve(chosen.ref)
        return library.resolve(reference)

    def stock(self) -> tuple[int, int]:
        """Adapters in the library and their bytes."""
        return (0, 0) if self.library is None else self.library.stock()

    def newest(self) -> Sequence[Version]:
        """One version per name: what a bare name means now."""
        if self.library is None:
            return ()
        return self.library.list(current=True)

    def found(self, version: Version) -> Found:
        library = self._library(version.ref)
        allow = "allowed when it was added to the library" if version.belongs == "allowed" else None
        return Found(
            version.name,
            version.digest,
            version.bytes,
            lambda: library.load(version),
            version.ref,
            allow,
            lambda: self._template(version),
        )

    def _template(self, version: Version) -> str | None:
        """The chat template that a version brings along. Versions never change, so it is read once."""
        if version.ref not in self._templates:
            if len(self._templates) >= _TEMPLATES:
                self._templates.clear()
            stated = self._library(version.ref).show(version.ref).provenance.get("chat_template")
            self._templates[version.ref] = stated if isinstance(stated, str) else None
        return self._templates[version.ref]

    def _library(self, name: str) -> Library:
        if self.library is None:
            raise NotFound(f"no adapter is called '{name}'", help="this server was started without --library")
        return self.library


def draw_of(text: str) -> float:
    """A number in [0, 1), always the same for the same text.

    >>> 0 <= draw_of("conversation-1") < 1
    True
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
