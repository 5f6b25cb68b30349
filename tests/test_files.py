"""Files and folders appear all at once or not at all, whatever stops a writer."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from veneer import files


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(part: Path, kind: str, text: str) -> None:
    if kind == "file":
        part.write_text(text)
    else:
        (part / "inner").mkdir(parents=True)
        (part / "inner/a").write_text(text)
        (part / "b").write_text(text)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("durable", [True, False])
def test_what_was_written_takes_the_place_of_what_was_there(tmp_path: Path, kind: str, durable: bool) -> None:
    place = tmp_path / "deep/er/x"
    for text in ("one", "two"):
        with files.replacing(place, durable=durable) as part:
            fill(part, kind, text)
            assert not place.exists() or b"one" in set(tree(place.parent).values())
    assert set(tree(tmp_path).values()) == {b"two"}
    assert [p.name for p in place.parent.iterdir()] == ["x"]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("where", ["block", "fsync", "_put"])
def test_a_writer_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    place = tmp_path / "x"
    with files.replacing(place) as part:
        fill(part, kind, "old")
    before = tree(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where != "block":
            patch.setattr(os if where == "fsync" else files, where, full)
        with pytest.raises(OSError, match="No space left"), files.replacing(place) as part:
            fill(part, kind, "new")
            if where == "block":
                full()
    assert tree(tmp_path) == before


def test_every_file_and_name_is_flushed_before_the_place_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, put, seen = os.fsync, files._put, []

    def watch(handle: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        flush(handle)

    monkeypatch.setattr(os, "fsync", watch)
    monkeypatch.setattr(files, "_put", lambda part, path: (seen.append("put"), put(part, path)))
    with files.replacing(tmp_path / "x") as part:
        fill(part, "folder", "text")
    at = seen.index("put")
    assert sorted(seen[:at]) == sorted(["a", "b", "inner", part.name]) and seen[at + 1 :] == [tmp_path.name]


def test_where_names_cannot_be_exchanged_the_old_folder_comes_back_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "x"
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for text in ("one", "two"):
        with files.replacing(place) as part:
            fill(part, "folder", text)
    assert set(tree(tmp_path).values()) == {b"two"} and [p.name for p in tmp_path.iterdir()] == ["x"]
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path == part:
            raise OSError(errno.EIO, "I/O error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="I/O error"), files.replacing(place) as part:
        fill(part, "folder", "three")
    assert set(tree(tmp_path).values()) == {b"two"} and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_readers_of_a_folder_that_is_replaced_see_whole_ones(tmp_path: Path) -> None:
    place, ended, seen = tmp_path / "x", threading.Event(), set()
    files.write(place / "f", b"0" * 4096)

    def read() -> None:
        while not ended.is_set():
            seen.add((place / "f").read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=write_many, args=(place, digit)) for digit in b"12"]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    reader.join()
    assert {len(set(content)) for content in seen} == {1} and {len(content) for content in seen} == {4096}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def write_many(place: Path, digit: int) -> None:
    for _ in range(20):
        with files.replacing(place, durable=False) as part:
            part.mkdir()
            (part / "f").write_bytes(bytes([digit]) * 4096)


def test_sweeping_takes_what_killed_writers_left_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("x", ".x", ".x.txt", "x.part", ".y.0.part")]
    for path in [*kept, tmp_path / ".x.0.part"]:
        path.write_text("")
    fill(tmp_path / ".x.1.part", "folder", "")
    files.sweep(tmp_path, "x")
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    files.sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept[:-1])
