"""Files that lie, break or lead elsewhere: a clear error, and the library is as it was."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.library.shelf import files_under, folder, make, refs
from veneer.errors import ConfigError, FormatError, NotFound, VeneerError
from veneer.library import Library
from veneer.library.manifest import Manifest, Measured, seal, unseal

TENSORS = "adapter_model.safetensors"


def _truncate(path: Path) -> None:
    file = path / TENSORS
    file.write_bytes(file.read_bytes()[:-100])


def _garbage(path: Path) -> None:
    (path / TENSORS).write_bytes(b"\x93NUMPY" + os.urandom(200))


def _huge_header(path: Path) -> None:
    (path / TENSORS).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def _deep_config(path: Path) -> None:
    (path / "adapter_config.json").write_text("[" * 100_000)


def _flipped_bit(path: Path) -> None:
    file = path / TENSORS
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)


def _pickle_only(path: Path) -> None:
    (path / TENSORS).unlink()
    (path / "adapter_model.bin").write_bytes(pickle.dumps({"x": 1}))


def _symlink(path: Path) -> None:
    shutil.move(path / TENSORS, path.parent / "elsewhere.safetensors")
    (path / TENSORS).symlink_to(path.parent / "elsewhere.safetensors")


def _secret_config(path: Path) -> None:
    (path / "adapter_config.json").unlink()
    (path / "adapter_config.json").symlink_to("/etc/hostname")


def _dangling(path: Path) -> None:
    (path / TENSORS).unlink()
    (path / TENSORS).symlink_to(path / "gone")


def _pipe(path: Path) -> None:
    (path / TENSORS).unlink()
    os.mkfifo(path / TENSORS)


def _folder_for_file(path: Path) -> None:
    (path / TENSORS).unlink()
    (path / TENSORS).mkdir()


def _not_finite(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / TENSORS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path / TENSORS)
    (path / "veneer.json").unlink()


def _nothing(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


DAMAGE = [
    _truncate, _garbage, _huge_header, _deep_config, _flipped_bit, _pickle_only, _symlink, _secret_config, _dangling, _pipe,
    _folder_for_file, _not_finite, _nothing,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__.strip("_"))
def test_a_damaged_folder_is_refused_and_leaves_no_trace(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    library = Library(tmp_path / "library")
    library.add(make(9), "good")
    before = files_under(tmp_path / "library")
    source = folder(tmp_path / "a")
    damage(source)
    with pytest.raises(FormatError) as refused:
        library.add(source, "bad")
    assert refused.value.help
    assert files_under(tmp_path / "library") == before
    assert refs(library.list()) == ["good@1"]
    assert library.verify().is_clean


def test_files_of_the_hubs_cache_are_links_and_welcome(tmp_path: Path) -> None:
    saved = folder(tmp_path / "saved")
    repo = tmp_path / "models--me--tickets"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in saved.iterdir():
        shutil.move(file, repo / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert Library(tmp_path / "library").add(snapshot, "tickets").new


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "/abs", "con\\x", "UPPER", "", ".", "..", "a" * 65, "x@1", "ünïcode", "a b"]
)
def test_names_are_not_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Library(tmp_path / "library").add(make(), name)
    assert refused.value.help
    assert not (tmp_path / "library").exists()


def test_loose_files(tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    (tmp_path / "w.pt").write_bytes(pickle.dumps({}))
    (tmp_path / "w.txt").write_text("x")
    (tmp_path / "w.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match="pickle"):
        library.add(tmp_path / "w.pt", "a")
    with pytest.raises(FormatError, match="expected an adapter folder"):
        library.add(tmp_path / "w.txt", "a")
    with pytest.raises(FormatError, match="alpha"):
        library.add(tmp_path / "w.safetensors", "a")
    with pytest.raises(NotFound):
        library.add(tmp_path / "gone", "a")


def test_other_files_of_a_folder_are_left_out_and_named(tmp_path: Path) -> None:
    source = folder(tmp_path / "a")
    (source / "optimizer.pt").write_bytes(b"x")
    (source / "notes.txt").write_text("x")
    added = Library(tmp_path / "library").add(source, "tickets")
    assert "notes.txt, optimizer.pt" in added.notes[0]


def test_what_is_stored_is_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that changes while it is added: the private copy is what was read, hashed and kept."""
    from veneer.library import source as adding

    path = folder(tmp_path / "a")
    real = adding._load

    def swap(copy: Path) -> object:
        _flipped_bit(path)
        return real(copy)

    monkeypatch.setattr(adding, "_load", swap)
    library = Library(tmp_path / "library")
    assert library.add(path, "tickets").version.digest == make().digest
    assert library.load("tickets").digest == make().digest


def test_blobs_cannot_be_written_through(tmp_path: Path) -> None:
    """A loaded adapter's files are links to blobs; blobs are read-only, and a checkout is a copy."""
    library = Library(tmp_path / "library")
    library.add(make(), "tickets")
    out = library.checkout("tickets", tmp_path / "out")
    (out / TENSORS).write_bytes(b"mine")
    assert library.verify().is_clean
    blobs = [p for p in (tmp_path / "library" / "blobs").rglob("*") if p.is_file()]
    assert blobs and all(p.stat().st_mode & 0o222 == 0 for p in blobs)


RECORD = Measured(metrics={"loss": 1.0})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"[" * 100_000, seal(RECORD).replace(b"1.0", b"2.0"), b"\xff\xfe"],
)
def test_records_are_sealed(content: bytes) -> None:
    assert unseal(Measured, seal(RECORD), "here") == RECORD
    with pytest.raises(FormatError, match="here"):
        unseal(Measured, content, "here")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x"}, {"files": [{"path": "../../x", "blob": "a" * 64, "bytes": 1}]},
        {"files": [{"path": "run/../x", "blob": "a" * 64, "bytes": 1}]}, {"files": [{"path": "x", "blob": "../x", "bytes": 1}]},
        {"files": [{"path": ".hidden", "blob": "a" * 64, "bytes": 1}]}, {"files": [1]}, {"files": None}, {"digest": None},
        {"digest": "zz"}, {"version": "one"}, {"version": 0}, {"bytes": -1},
    ],
)  # fmt: skip
def test_a_forged_manifest_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    library = Library(tmp_path / "library")
    library.add(make(), "tickets")
    path = tmp_path / "library" / "manifests" / "tickets" / "1.json"
    forged = unseal(Manifest, path.read_bytes(), str(path)).model_copy(update=change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic says that the forged fields have the wrong type
        content = seal(forged)
    with pytest.raises(FormatError, match="not as expected"):
        unseal(Manifest, content, "here")


def test_every_refusal_is_ours(tmp_path: Path) -> None:
    """Random bytes in place of each file of an adapter never raise anything but veneer's errors."""
    import random

    generator = random.Random(0)
    library = Library(tmp_path / "library")
    for trial in range(12):
        source = folder(tmp_path / f"a{trial}")
        victim = source / generator.choice(["adapter_config.json", TENSORS, "veneer.json"])
        content = bytearray(victim.read_bytes())
        for _ in range(generator.randint(1, 30)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        victim.write_bytes(content)
        try:
            library.add(source, "fuzz")
        except VeneerError:
            continue
    if (tmp_path / "library").exists():
        assert all(library.load(version).parts for version in (library.list() if _any(library) else ()))


def _any(library: Library) -> bool:
    try:
        return bool(library.list())
    except NotFound:
        return False
