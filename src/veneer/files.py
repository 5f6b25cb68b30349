"""Files and folders that appear all at once or not at all.

What is written to the private name that `replacing` gives is flushed to the disk and then takes the place of what was there, in
one step: a rename, or for a folder over a folder an exchange of the two names. A full disk or a kill leaves the previous content
as it was, and at most a sibling `.NAME.*.part`, which `sweep` deletes. Errors of the system come as they are: each caller knows
the next step.

The surprise: a rename cannot replace a folder that holds something. Linux exchanges two names at once (`renameat2`); where the
file system cannot, the old folder is moved aside first and put back when that fails.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_EXCHANGE = 2
_AT_FDCWD = -100


def cache_folder() -> Path:
    """What may be made again is kept here: $VENEER_CACHE, or veneer/ in $XDG_CACHE_HOME (an absolute path) or ~/.cache."""
    if chosen := os.environ.get("VENEER_CACHE"):
        return Path(chosen)
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "veneer"


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A private name beside `path` for a file or a folder, which takes its place when the block ends well.

    durable  wait until it is on the disk; without, a crash of the machine may lose it, but never leaves half of it to a reader
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.part"
    try:
        yield part
        if durable:
            _flush(part)
        _put(part, path)
        if durable:
            sync(path.parent)
    finally:
        remove(part)


def write(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put `data` at `path` all at once."""
    with replacing(path, durable=durable) as part:
        part.write_bytes(data)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, name: str = "*") -> None:
    """Delete what killed writers of `name` left in `folder`. Call it where no other writer can be at work."""
    for leftover in folder.glob(f".{name}.*.part"):
        remove(leftover)


def _flush(part: Path) -> None:
    inside = [part] if not part.is_dir() else [part, *(p for p in part.rglob("*") if not p.is_symlink())]
    for path in reversed(inside):
        if path.is_file() or path.is_dir():
            sync(path)


def _put(part: Path, path: Path) -> None:
    """Give `part` the name `path`; `part` has the old content afterwards, where a folder takes the place of a folder."""
    if not (part.is_dir() and path.is_dir()):
        os.replace(part, path)
    elif not _exchange(part, path):
        old = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.part"
        path.rename(old)
        try:
            part.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """renameat2 with RENAME_EXCHANGE, which has no name in Python; False where there is none."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE)
    if done != 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))
    return bool(done == 0)
