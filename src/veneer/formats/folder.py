"""A folder that appears all at once or not at all.

Files are written to a sibling, flushed to the disk, checked by the caller, and then swapped with what was there. A full disk or a
kill leaves the previous content as it was, and at most a sibling called `.NAME.new-...`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from veneer.errors import Conflict, ResourceError

_EXCHANGE = 2
_AT_FDCWD = -100


def replace_folder(path: Path, owned: frozenset[str], write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, then put it at `path`. Files there that are not `owned` are carried over."""
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise Conflict(f"{path} is a file, expected a folder")
    foreign = [entry for entry in path.iterdir() if entry.name not in owned] if path.is_dir() else []
    if foreign and len(foreign) == len(list(path.iterdir())):
        raise Conflict(
            f"{path} holds other files ({', '.join(sorted(e.name for e in foreign)[:3])}) and no adapter",
            help="choose a new folder",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=path.parent))
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        _fill(fresh, foreign, write)
        _swap(fresh, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _fill(fresh: Path, foreign: list[Path], write: Callable[[Path], None]) -> None:
    write(fresh)
    for entry in foreign:
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, fresh / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, fresh / entry.name, follow_symlinks=False)
    mask = os.umask(0)
    os.umask(mask)
    fresh.chmod(0o777 & ~mask)
    for entry in fresh.iterdir():
        if entry.is_file() and not entry.is_symlink():
            _flush(entry)
    _flush(fresh)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(fresh: Path, path: Path) -> None:
    """Exchange the two names in one step where the system can; `fresh` holds the old content afterwards."""
    if not path.exists():
        fresh.rename(path)
    elif not _exchange(fresh, path):
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
        path.rename(old)
        try:
            fresh.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _flush(path.parent)


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


def _cannot_write(path: Path, error: OSError) -> ResourceError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    help = "free some space or choose another disk" if full else "choose a folder you may write to"
    return ResourceError(f"cannot write {path}: {error.strerror or error}; what was there is as it was", help=help)
