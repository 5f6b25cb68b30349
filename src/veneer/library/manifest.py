"""Sealed records: JSON that carries the SHA-256 of itself, so that a library can be rebuilt from files alone.

A manifest says what a version is; it is written once. A state record holds a name's aliases, history and demands; a
metrics record what was measured for a version. The catalogue answers questions, but these records are enough to make
it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from veneer.errors import FormatError, VeneerError
from veneer.library.blobs import DIGEST
from veneer.library.records import File, Version
from veneer.library.resolve import check_name

FORMAT = 1
LARGEST = 64 << 20


def seal(record: Mapping[str, Any]) -> bytes:
    """The record as readable JSON with its own checksum under `sha256`."""
    return (json.dumps({**record, "sha256": _checksum(record)}, indent=1, sort_keys=True) + "\n").encode()


def unseal(content: bytes, where: str) -> dict[str, Any]:
    """The record in `content`, or FormatError where it is not whole."""
    if len(content) > LARGEST:
        raise FormatError(f"{where} has {len(content)} bytes, a record has at most {LARGEST}")
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.pop("sha256", None) != _checksum(record):
        raise FormatError(f"{where} is damaged: its checksum does not match")
    if record.get("format") != FORMAT:
        raise FormatError(
            f"{where} has format {record.get('format')}, this veneer reads {FORMAT}",
            help="use a newer veneer for this library",
        )
    return record


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_FACTS = (
    "name", "version", "digest", "base", "base_name", "belongs", "method", "rank", "targets", "parameters", "bytes",
    "created", "source",
)  # fmt: skip


def describe(facts: Mapping[str, Any], files: tuple[File, ...], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a version: `facts` are the fields of `Version` but the manifest's own digest."""
    listed = [{"path": f.path, "blob": f.blob, "bytes": f.bytes} for f in files]
    return {"format": FORMAT, **{key: facts[key] for key in _FACTS}, "files": listed, **extra}


def version_of(manifest: Mapping[str, Any], content: bytes) -> Version:
    """The `Version` that a manifest describes; `content` is its bytes."""
    return Version(**{key: manifest[key] for key in _FACTS}, manifest=hashlib.sha256(content).hexdigest())


def files_of(manifest: Mapping[str, Any]) -> tuple[File, ...]:
    return tuple(File(f["path"], f["blob"], f["bytes"]) for f in manifest["files"])


def read_manifest(content: bytes, where: str) -> tuple[Version, dict[str, Any]]:
    """A manifest from an untrusted file: unsealed, and every field that becomes a path checked."""
    manifest = unseal(content, where)
    try:
        version = version_of(manifest, content)
        check_name(version.name)
        for file in files_of(manifest):
            check_path(file.path)
            if DIGEST.fullmatch(file.blob) is None:
                raise FormatError(f"{file.blob[:80]!r} is not a SHA-256")
    except (KeyError, TypeError, VeneerError) as error:
        raise FormatError(f"{where} is not a manifest: {error}") from error
    return version, manifest


def check_path(path: str) -> str:
    """A file's path inside an adapter folder: one name, or `run/` and one name."""
    name = path.removeprefix("run/")
    if not name or name.startswith(".") or not set(name) <= _SAFE:
        raise FormatError(f"{path[:80]!r} is not a file name of an adapter folder")
    return path


_SAFE = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
