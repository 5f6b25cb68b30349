"""The folder of converted bases: where it is, who may write to it, and how nothing half-written is ever seen.

    $VENEER_CACHE, or $XDG_CACHE_HOME/veneer, or ~/.cache/veneer
        bases/<digest of the source>/   base.json config.json tokenizer files, weights.<dtype>.safetensors (+ .json)
        sources/<key>.json              (paths, sizes, times) of source files -> their digest, so that files are hashed once
        locks/                          one file per base; the kernel drops a lock when its process dies
        downloads/                      models put together from several packages

Files and folders appear all at once (`files.py`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer import files
from veneer.errors import FormatError, ResourceError
from veneer.files import cache_folder
from veneer.models.mapped import digest_of

_log = logging.getLogger(__name__)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Only one process at a time in here, per `name`; others wait."""
    with refusals(cache_folder()):
        folder = cache_folder() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / f"{name}.lock").open("w")
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def refusals(where: Path) -> Iterator[None]:
    """A full disk or a read-only folder, said so that the reader knows what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in files.UNWRITABLE:
            raise ResourceError(
                f"cannot write to the cache folder {cache_folder()}: {error.strerror}",
                help="set VENEER_CACHE to a folder that you can write to",
            ) from error
        if error.errno in files.FULL:
            free = shutil.disk_usage(existing(where)).free
            raise ResourceError(
                f"the disk of the cache folder {cache_folder()} is full ({free / 1e6:.0f} MB free)",
                help="make room, or set VENEER_CACHE to a folder on another disk; nothing half-written was left",
            ) from error
        raise


def existing(path: Path) -> Path:
    """The nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """`files.replacing` in the cache, refused in its words."""
    with refusals(path), files.replacing(path, durable=durable) as part:
        yield part


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    with refusals(path):
        files.write(path, json.dumps(value, indent=1, ensure_ascii=False).encode(), durable=durable)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a `FormatError` that names the file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise FormatError(f"{path} is not readable JSON: {error}", help="copy or download it again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def remember(path: Path, value: Any) -> None:
    """Write down what was worked out, to be quicker next time. A cache that is only read from is no error here."""
    try:
        write_json(path, value, durable=False)
    except ResourceError as error:
        _log.info("not remembered: %s", error.message)


def digest_of_files(paths: Sequence[Path]) -> dict[str, str]:
    """File name -> SHA-256, hashed once as long as paths, sizes and times stay the same."""
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    seen = json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    memo = cache_folder() / "sources" / f"{hashlib.sha256(seen.encode()).hexdigest()[:32]}.json"
    if memo.exists():
        return read_json(memo)
    found = {path.name: digest_of(path) for path in paths}
    remember(memo, found)
    return found
