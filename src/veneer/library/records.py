"""What the library's verbs return: plain frozen facts, in the words of the catalogue.

A `Version` never changes once it is added. What does change (aliases, metrics) is kept beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class File:
    """One file of a version: its path inside the adapter folder, the SHA-256 of its bytes, and their count."""

    path: str
    blob: str
    bytes: int


class Version(NamedTuple):
    """One immutable adapter in the library. (A tuple, so that listing ten thousand takes milliseconds.)

    digest      `Adapter.digest`: weights, normalised config and base identity
    base        identity of the base it was accepted for (the one it names itself where it was added without a base), or None
    belongs     how it was matched with that base: equal, other precision, unverified, allowed (`base.identity.compare`), or
                unchecked where it was added without a base
    rank        the largest rank, or None for methods without one
    manifest    SHA-256 of the manifest's bytes
    """

    name: str
    version: int
    digest: str
    base: str | None
    base_name: str | None
    belongs: str
    method: str
    rank: int | None
    targets: int
    parameters: int
    bytes: int
    created: str
    source: str
    manifest: str

    @property
    def ref(self) -> str:
        """`name@version`, the reference that always means this version."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Alias:
    """A name for a version that can be moved. `weight` is the share of a name's traffic that a canary takes."""

    name: str
    alias: str
    version: int
    weight: float
    updated: str

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Move:
    """One line of an alias's history. `version` is None where the alias was taken away."""

    name: str
    alias: str
    number: int
    version: int | None
    weight: float
    at: str
    reason: str


@dataclass(frozen=True)
class Record:
    """Everything known about one version.

    spec        the method's configuration
    provenance  base samples left out; data hash, chat template, run facts, the reason of an allowed mismatch
    parents     digest -> reference in this library, or None for a parent that is not here
    children    references of the versions made from this one
    """

    version: Version
    files: tuple[File, ...]
    spec: Mapping[str, Any]
    provenance: Mapping[str, Any]
    parents: Mapping[str, str | None]
    children: tuple[str, ...]
    aliases: tuple[Alias, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Added:
    """What `add` did: the version, whether it is new, and what the user should know."""

    version: Version
    new: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Removed:
    """What `remove` took away: the versions, and the aliases that went with them."""

    versions: tuple[str, ...]
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Collected:
    """What `gc` deleted (or would delete): files no version needs, and what killed writers left.

    kept    versions that a manifest names and the catalogue does not know: not deleted unless asked for
    """

    blobs: int
    manifests: int
    leftovers: int
    bytes: int
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` read. `problems` is empty when every byte is as it was added; `orphans` are harmless and for `gc`."""

    versions: int
    blobs: int
    bytes: int
    problems: tuple[str, ...]
    orphans: int

    @property
    def is_clean(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What `rebuild` brought back from the manifests; `left_out` is what could not come back, or not whole, and why."""

    versions: int
    aliases: int
    left_out: tuple[str, ...]
