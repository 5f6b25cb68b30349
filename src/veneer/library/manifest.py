"""Sealed records: JSON that carries the SHA-256 of itself, so that a library can be rebuilt from files alone.

A `Manifest` says what a version is; it is written once. A `State` holds a name's aliases, history and demands;
`Measured` what was found for a version later. The catalogue answers questions, but these records are enough to make
it again. They are read as if they came from a stranger: every field has a type and a range, and a path is one file
name.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from veneer.errors import FormatError, complaints
from veneer.library.blobs import DIGEST
from veneer.library.gate import METRIC
from veneer.library.records import File, Version
from veneer.library.resolve import ALIAS, NAME

FORMAT: Literal[1] = 1
LARGEST = 64 << 20
_DAMAGED = "restore it from a backup, or add the adapter again"

Content: TypeAlias = bytes
"""`bytes`, for methods of records that have a field of that name."""

Digest = Annotated[str, Field(pattern=f"^{DIGEST.pattern}$")]
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
AliasName = Annotated[str, Field(pattern=f"^{ALIAS.pattern}$")]
Metrics = dict[Annotated[str, Field(pattern=f"^{METRIC.pattern}$")], FiniteFloat]
Count = Annotated[int, Field(ge=0)]
Number = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class SealedRecord(BaseModel):
    """What every record has. Nothing unknown is accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT


class FileRecord(BaseModel):
    """One file: a name inside the adapter folder, or `run/` and a name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, Field(pattern=r"^(run/)?[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
    blob: Digest
    bytes: Count


class Manifest(SealedRecord):
    """One version: the fields of `Version`, its files, where it came from."""

    name: Name
    version: Number
    digest: Digest
    base: str | None
    base_name: str | None
    belongs: str
    method: str
    rank: Number | None
    targets: Count
    parameters: Count
    bytes: Count
    created: str
    source: str
    files: Annotated[tuple[FileRecord, ...], Field(min_length=1)]
    parents: tuple[Digest, ...]
    spec: dict[str, Any]
    provenance: dict[str, Any]
    belonging: dict[str, Any] | None
    run: dict[str, Any]
    metrics: Metrics
    note: str

    def describes(self, content: Content) -> Version:
        """The `Version` of this manifest, whose bytes are `content`."""
        fields = {key: getattr(self, key) for key in Version._fields if key != "manifest"}
        return Version(**fields, manifest=hashlib.sha256(content).hexdigest())

    def listed(self) -> tuple[File, ...]:
        return tuple(File(file.path, file.blob, file.bytes) for file in self.files)


class Measured(SealedRecord):
    """Every metric of a version, once one was recorded after it was added."""

    metrics: Metrics


class AliasRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: AliasName
    version: Number
    weight: Share
    updated: str


class DemandRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: AliasName
    metric: Annotated[str, Field(pattern=f"^{METRIC.pattern}$")]
    better: Literal["lower", "higher"]
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MoveRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: AliasName
    number: Number
    version: Number | None
    weight: Share
    at: str
    reason: str
    before: Number | None


class State(SealedRecord):
    """What changes about a name: the number its next version gets, its aliases, what they demand, how they moved.

    removed  numbers whose manifests may still be there, and are not to come back
    """

    name: Name
    next: Number
    removed: tuple[Number, ...] = ()
    aliases: tuple[AliasRecord, ...]
    demands: tuple[DemandRecord, ...]
    moves: tuple[MoveRecord, ...]


R = TypeVar("R", bound=SealedRecord)


def seal(record: SealedRecord) -> bytes:
    """The record as readable JSON with its own checksum under `sha256`."""
    fields = record.model_dump(mode="json")
    return (json.dumps({**fields, "sha256": _checksum(fields)}, indent=1, sort_keys=True) + "\n").encode()


def unseal(kind: type[R], content: bytes, where: str) -> R:
    """The record in `content`, or FormatError where it is not whole."""
    if len(content) > LARGEST:
        raise FormatError(f"{where} has {len(content)} bytes, a record has at most {LARGEST}", help=_DAMAGED)
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON: {error}", help=_DAMAGED) from error
    if not isinstance(fields, dict) or fields.pop("sha256", None) != _checksum(fields):
        raise FormatError(f"{where} is damaged: its checksum does not match", help=_DAMAGED)
    if fields.get("format") != FORMAT:
        raise FormatError(
            f"{where} has format {fields.get('format')}, this veneer reads {FORMAT}",
            help="use the veneer that wrote it",
        )
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise FormatError(f"{where} is not as expected: {complaints(error.errors())[0]}", help=_DAMAGED) from error


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
