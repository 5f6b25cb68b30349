"""The folder of converted bases: where it is, who may write to it, and how nothing half-written is ever seen.

    $VENEER_CACHE, or $XDG_CACHE_HOME/veneer, or ~/.cache/veneer
        bases/<digest of the source>/   base.json config.json tokenizer files, weights.<dtype>.safetensors (+ .json)
        sources/<key>.json              (paths, sizes, times) of source files -> their digest, so that files are hashed once
        locks/                          one file per base; the kernel drops a lock when its process dies
        downloads/                      models put together from several packages

Files and folders are written under a name that begins with a dot and are renamed when they are complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer.errors import FormatError, ResourceError
from veneer.models.mapped import digest_of

_log = logging.getLogger(__name__)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def cache_folder() -> Path:
    """Where converted bases are kept."""
    chosen = os.environ.get("VENEER_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer"


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
        if error.errno in UNWRITABLE:
            raise ResourceError(
                f"cannot write to the cache folder {cache_folder()}: {error.strerror}",
                help="set VENEER_CACHE to a folder that you can write to",
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
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
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or a folder, which takes its place when the block ends well."""
    part = path.parent / f".{path.name}.{os.getpid()}"
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            remove(part)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, name: str) -> None:
    """Delete what a killed process left of `name` in `folder`. Call it with the lock of `name` held."""
    for leftover in folder.glob(f".{name}*") if folder.is_dir() else ():
        remove(leftover)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8")


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
        write_json(path, value)
    except ResourceError as error:
        _log.info("not remembered: %s", error.message)


def digest_of_files(files: Sequence[Path]) -> dict[str, str]:
    """File name -> SHA-256, hashed once as long as paths, sizes and times stay the same."""
    stats = [(str(path.resolve()), path.stat()) for path in files]
    seen = json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    memo = cache_folder() / "sources" / f"{hashlib.sha256(seen.encode()).hexdigest()[:32]}.json"
    if memo.exists():
        return read_json(memo)
    found = {path.name: digest_of(path) for path in files}
    remember(memo, found)
    return found
