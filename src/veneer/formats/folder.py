"""Replacing a folder that is ours, and nobody else's: what others put there is carried over."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from veneer import files
from veneer.errors import Conflict, ResourceError


def replace_folder(path: Path, owned: frozenset[str], write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, then put it at `path` at once. Files there that are not `owned` are carried over."""
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
        with files.replacing(path) as fresh:
            fresh.mkdir()
            write(fresh)
            _carry_over(foreign, fresh)
    except OSError as error:
        full = error.errno in files.FULL
        help = "free some space or choose another disk" if full else "choose a folder you may write to"
        reason = error.strerror or error
        raise ResourceError(f"cannot write {path}: {reason}; what was there is as it was", help=help) from error


def _carry_over(foreign: list[Path], fresh: Path) -> None:
    for entry in foreign:
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, fresh / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, fresh / entry.name, follow_symlinks=False)
