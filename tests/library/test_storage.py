"""What happens to a library when its disk is full, its bytes rot, its catalogue is lost, or it lives elsewhere."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from sqlalchemy import Connection, create_engine, event, inspect, text

from tests.library.shelf import files_under, folder, library_on, make, refs, sqlite_at
from tests.unprivileged import obeying_permissions
from veneer.errors import ConfigError, Conflict, FormatError, NotFound, ResourceError, Unsupported
from veneer.library import Demand, Library, migrations, tables, upkeep
from veneer.library.aliases import REMEMBERED
from veneer.library.catalogue import Catalogue, sqlite_url
from veneer.library.manifest import State, unseal
from veneer.library.migrations import STEPS, migrate, schema_version


class FullDisk(LocalFileSystem):
    """A local disk with room for `room` more bytes."""

    cachable = False
    room = 0

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        opened = super().open(path, mode, **kwargs)
        return _Filling(opened, self) if "w" in mode else opened


class _Filling:
    def __init__(self, file: Any, disk: FullDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: bytes) -> int:
        self._disk.room -= len(data)
        if self._disk.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))

    def __enter__(self) -> _Filling:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 1.02])  # the last: room for the adapter, not for its manifest
def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path, share: float) -> None:
    root = tmp_path / "library"
    room = int(share * Library(root).add(make(0), "tickets").version.bytes)
    before = Library(root).list()
    disk = FullDisk()
    library = library_on(disk, str(root), sqlite_at(root))
    disk.room = room
    with pytest.raises(ResourceError) as full:
        library.add(folder(tmp_path / "new", 1), "tickets")
    assert "space" in full.value.message and "gc" in (full.value.help or "")
    assert library.list() == before
    assert library.verify().is_clean
    disk.room = 1 << 20
    library.gc()
    assert library.verify().orphans == 0
    assert library.add(folder(tmp_path / "new", 1), "tickets").version.ref == "tickets@2"


def test_a_full_disk_stops_an_alias_before_it_moves(tmp_path: Path) -> None:
    root = tmp_path / "library"
    first = Library(root)
    first.add(make(0), "tickets")
    first.add(make(1), "tickets")
    first.alias("tickets@1", "production")
    library = library_on(FullDisk(), str(root), sqlite_at(root))
    with pytest.raises(ResourceError):
        library.alias("tickets@2", "production")
    assert (library.resolve("tickets").version, len(library.history("tickets"))) == (1, 1)


def test_a_full_catalogue_refuses_and_loses_nothing(tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    library.add(make(0), "tickets")
    catalogue = library._catalogue()
    catalogue.close()

    def limit(connection: Any, _: Any) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")

    event.listen(catalogue.engine, "connect", limit)
    with pytest.raises(ResourceError, match="catalogue"):
        for seed in range(1, 60):
            library.record("tickets", {f"metric_{seed}_{i}": 1.0 for i in range(50)})
    event.remove(catalogue.engine, "connect", limit)
    library.close()
    assert refs(library.list()) == ["tickets@1"]
    assert library.verify().is_clean


def _blob_of(root: Path, library: Library, name: str) -> Path:
    files = {file.path: file.blob for file in library.show("tickets@1").files}
    return root / "blobs" / files[name][:2] / files[name]


def _flip(path: Path) -> None:
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_flip, Path.unlink, lambda path: (path.chmod(0o644), path.write_bytes(b""))])
def test_damage_is_found_on_reading_and_healed_by_adding_again(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    root, source = tmp_path / "library", folder(tmp_path / "a")
    library = Library(root)
    library.add(source, "tickets")
    damage(_blob_of(root, library, "adapter_model.safetensors"))
    with pytest.raises((FormatError, NotFound)) as found:
        library.load("tickets")
    assert found.value.help
    with pytest.raises((FormatError, NotFound)):
        library.checkout("tickets", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = library.verify()
    assert not report.is_clean and "tickets@1" in report.problems[0]
    assert library.add(source, "tickets").new is False
    assert library.verify().is_clean
    assert library.load("tickets").digest == make().digest


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    """One bit in any file of the library, the catalogue's own aside, makes verify speak."""
    root = tmp_path / "library"
    library = Library(root)
    library.add(make(), "tickets")
    library.record("tickets@1", {"loss": 1.0})
    library.alias("tickets@1", "production")
    for name in sorted(files_under(root)):
        kept = (root / name).read_bytes()
        _flip(root / name)
        assert not library.verify().is_clean, name
        (root / name).write_bytes(kept)
    assert library.verify().is_clean


def _rich(root: Path) -> Library:
    library = Library(root)
    for seed in range(3):
        library.add(make(seed), "tickets", metrics={"loss": 2.0 - seed / 10})
    library.add(make(7, parents=(make(0).digest,)), "letters")
    library.record("letters@1", {"f1": 0.5})
    library.alias("tickets@1", "production", demands=[Demand("loss", "lower", 0.5)])
    library.alias("tickets@3", "production")
    library.alias("tickets@3", "canary", weight=0.5)
    library.remove("tickets@2")
    return library


def _everything(library: Library) -> tuple[Any, ...]:
    return (
        library.list(),
        library.aliases(),
        [library.history(name) for name in ("tickets", "letters")],
        library.demands("tickets", "production"),
        [library.show(version.ref) for version in library.list()],
    )


def _lose(root: Path) -> None:
    for file in root.glob("catalogue.sqlite*"):
        file.unlink()


def _lose_but_the_log(root: Path) -> None:
    (root / "catalogue.sqlite").unlink()
    (root / "catalogue.sqlite-wal").write_bytes(b"left over")


def _scramble(root: Path) -> None:
    _lose(root)
    (root / "catalogue.sqlite").write_bytes(os.urandom(5000))


def _truncate(root: Path) -> None:
    with sqlite3.connect(root / "catalogue.sqlite") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    file = root / "catalogue.sqlite"
    file.write_bytes(file.read_bytes()[:6000])


def _empty(root: Path) -> None:
    _lose(root)
    (root / "catalogue.sqlite").touch()


@pytest.mark.parametrize("loss", [_lose, _lose_but_the_log, _scramble, _truncate, _empty], ids=lambda f: f.__name__)
def test_a_lost_catalogue_comes_back_whole(tmp_path: Path, loss: Callable[[Path], None]) -> None:
    root = tmp_path / "library"
    library = _rich(root)
    before, revision = _everything(library), library.revision()
    library.close()
    loss(root)
    lost = Library(root)
    with pytest.raises((NotFound, FormatError)) as told:
        lost.list()
    assert "rebuild" in (told.value.help or "")
    with pytest.raises((NotFound, FormatError)):
        lost.add(make(9), "tickets")
    rebuilt = lost.rebuild()
    assert (rebuilt.versions, rebuilt.aliases) == (3, 2)
    assert _everything(lost) == before
    assert lost.revision() > revision
    assert lost.verify().is_clean
    assert lost.rollback("tickets").version == 1
    assert lost.add(make(9), "tickets").version.ref == "tickets@4"


def test_rebuild_leaves_out_what_is_damaged_and_says_so(tmp_path: Path) -> None:
    root = tmp_path / "library"
    library = _rich(root)
    blob = library.show("tickets@3").files[1].blob
    of_letters = [file.blob for file in library.show("letters").files]
    library.close()
    _lose(root)
    (root / "blobs" / blob[:2] / blob).unlink()
    _flip(root / "manifests" / "letters" / "1.json")
    rebuilt = Library(root).rebuild()
    assert rebuilt.versions == 1
    assert any("letters" in line for line in rebuilt.left_out)
    assert any("tickets@3 has lost" in line for line in rebuilt.left_out)
    assert any("tickets@production pointed to version 3" in line for line in rebuilt.left_out)
    assert refs(Library(root).list()) == ["tickets@1"]
    tensors = root / "manifests" / "tickets" / "3.json"
    manifest = root / "manifests" / "letters" / "1.json"
    before = files_under(root / "blobs")
    assert Library(root).gc().kept == ("letters@1", "tickets@3") and tensors.exists() and manifest.exists()
    assert files_under(root / "blobs") == before  # what an unreadable manifest needs can't be told
    assert Library(root).add(make(9), "letters").version.ref == "letters@2"  # the damaged manifest of letters@1 stays
    Library(root).gc(unknown=True)
    left = {path.name for path in (root / "blobs").rglob("*") if path.is_file()}
    assert not manifest.exists() and not left.issuperset(of_letters)


def test_a_manifest_that_an_older_catalogue_cannot_know_is_kept_where_it_cannot_be_read(tmp_path: Path) -> None:
    root = tmp_path / "library"
    library = Library(root)
    library.add(make(0), "tickets")
    library.close()
    older = {path.name: path.read_bytes() for path in root.glob("catalogue*")}
    library = Library(root)
    library.add(make(1), "tickets")
    library.add(make(2), "letters")
    library.close()
    for path in root.glob("catalogue*"):
        path.unlink()
    for name, content in older.items():
        (root / name).write_bytes(content)
    for place in ("tickets/2", "letters/1"):
        _flip(root / "manifests" / f"{place}.json")
    before = files_under(root / "blobs")
    assert Library(root).gc().kept == ("letters@1", "tickets@2")
    assert files_under(root / "blobs") == before


def test_a_damaged_measurement_takes_no_weights_along(tmp_path: Path) -> None:
    root = tmp_path / "library"
    library = Library(root)
    for seed in range(3):
        library.add(make(seed), "tickets", metrics={"loss": 2.0})
    library.record("tickets@1", {"loss": 1.0})
    library.close()
    later = root / "manifests" / "tickets" / "1.metrics.json"
    later.write_bytes(later.read_bytes()[:-20])
    _lose(root)
    rebuilt = library.rebuild()
    assert rebuilt.versions == 3
    assert (
        "1.metrics.json" in rebuilt.left_out[0] and "tickets@1 has the metrics it was added with" in rebuilt.left_out[0]
    )
    assert library.gc().blobs == 0
    assert library.load("tickets@1").digest == make(0).digest
    assert library.show("tickets@1").metrics == {"loss": 2.0}


def test_a_lost_readme_takes_no_weights_along(tmp_path: Path) -> None:
    root, source = tmp_path / "library", folder(tmp_path / "a")
    (source / "README.md").write_text("a card")
    library = Library(root)
    library.add(source, "tickets")
    readme = _blob_of(root, library, "README.md")
    library.close()
    readme.unlink()
    _lose(root)
    rebuilt = library.rebuild()
    assert (rebuilt.versions, library.gc().blobs) == (1, 0)
    assert "tickets@1 has lost README.md; the adapter itself is whole" in rebuilt.left_out
    assert library.load("tickets").digest == make().digest
    assert (library.checkout("tickets", tmp_path / "out") / "adapter_model.safetensors").exists()
    assert library.verify().is_clean


def test_gc_keeps_what_a_manifest_names_and_the_catalogue_does_not_know(tmp_path: Path) -> None:
    root = tmp_path / "library"
    library = _rich(root)
    library.gc()  # what was removed on purpose
    config = _blob_of(root, library, "adapter_config.json")
    library.close()
    kept = config.read_bytes()
    config.unlink()  # all of them share it
    _lose(root)
    assert library.rebuild().versions == 0
    before = files_under(root)
    found = library.gc()
    assert found.kept == ("letters@1", "tickets@1", "tickets@3")
    assert files_under(root) == before
    library.close()
    config.write_bytes(kept)
    _lose(root)
    assert library.rebuild().versions == 3
    assert library.load("tickets@1").digest == make(0).digest
    assert library.verify().is_clean


def test_a_busy_alias_takes_no_others_history(tmp_path: Path) -> None:
    root = tmp_path / "library"
    library = Library(root)
    library.add(make(0), "tickets")
    library.add(make(1), "tickets")
    for version in (1, 2):
        library.alias(f"tickets@{version}", "production")
    library._place.blobs.write = lambda *_, **__: None  # type: ignore[method-assign]  # the last state record is enough
    for step in range(REMEMBERED + 10):
        library.alias(f"tickets@{1 + step % 2}", "canary")
    del library._place.blobs.write  # type: ignore[method-assign]
    library.alias("tickets@1", "zeta")
    history = library.history("tickets", "production")
    library.close()
    _lose(root)
    library.rebuild()
    assert library.history("tickets", "production") == history
    assert len(library.history("tickets", "canary")) == REMEMBERED
    assert library.rollback("tickets").version == 1


def test_a_removed_version_stays_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remove that is killed right after its commit leaves the records; a rebuild must not bring the version back."""
    root = tmp_path / "library"
    library = Library(root)
    for seed in range(3):
        library.add(make(seed), "tickets")
    monkeypatch.setattr(upkeep, "remove_records", lambda *_: None)
    library.remove("tickets@2")
    library.close()
    _lose(root)
    rebuilt = library.rebuild()
    assert (rebuilt.versions, refs(library.list())) == (2, ["tickets@1", "tickets@3"])
    assert "2.json is still there" in rebuilt.left_out[0]
    assert library.verify().is_clean
    found = library.gc()
    assert (found.manifests, found.blobs, found.kept) == (1, 2, ())
    assert unseal(State, (root / "manifests" / "tickets" / "state.json").read_bytes(), "here").removed == ()
    assert library.add(make(1), "tickets").version.ref == "tickets@4"


def test_a_sound_catalogue_is_not_replaced(tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    library.add(make(), "tickets")
    with pytest.raises(Conflict, match="sound"):
        library.rebuild()
    assert refs(library.list()) == ["tickets@1"]


def test_gc_frees_what_a_writer_left_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "library"
    library = Library(root)
    library.add(make(), "tickets")
    whole = files_under(root)
    (root / "blobs" / "00").mkdir(exist_ok=True)
    (root / "blobs" / "00" / ("00" + "f" * 62)).write_bytes(b"x" * 10)
    (root / "manifests" / "tickets" / "2.json.part").write_bytes(b"{")
    (root / "tmp" / "dead").mkdir()
    (root / "tmp" / "dead" / "half").write_bytes(b"x")
    with library._place.blobs.staging() as at_work:
        planned = library.gc(dry_run=True)
        assert files_under(root) > whole
        assert library.gc() == planned
        assert (planned.blobs, planned.manifests, planned.leftovers) == (1, 1, 1)
        assert at_work.exists()
    assert files_under(root) == whole


def test_a_state_record_ahead_of_the_catalogue_is_put_right(tmp_path: Path) -> None:
    root = tmp_path / "library"
    library = Library(root)
    library.add(make(0), "tickets")
    library.add(make(1), "tickets")
    library.alias("tickets@1", "production")
    path = root / "manifests" / "tickets" / "state.json"
    earlier = path.read_bytes()
    library.alias("tickets@2", "production")
    path.write_bytes(earlier)
    library.gc()
    assert unseal(State, path.read_bytes(), "here").aliases[0].version == 2


# A store that is not a local folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Library]:
    root = f"/library-{uuid.uuid4().hex}"
    yield Library(f"memory://{root}#sqlite:///{tmp_path / 'shared.sqlite'}")
    MemoryFileSystem.store.clear()


def test_blobs_elsewhere_and_a_database_of_its_own(elsewhere: Library, tmp_path: Path) -> None:
    elsewhere.add(make(0), "tickets")
    elsewhere.add(make(1), "tickets")
    elsewhere.alias("tickets@1", "production")
    assert elsewhere.load("tickets").digest == make(0).digest
    assert elsewhere.checkout("tickets@2", tmp_path / "out").exists()
    elsewhere.remove("tickets@2")
    assert elsewhere.gc().blobs > 0
    assert elsewhere.verify().is_clean and elsewhere.verify().orphans == 0
    elsewhere.close()
    (tmp_path / "shared.sqlite").unlink()
    (tmp_path / "shared.sqlite-wal").write_bytes(b"left over")
    with pytest.raises(NotFound, match="is gone"):
        elsewhere.list()
    assert elsewhere.rebuild().versions == 1
    assert (tmp_path / "shared.sqlite-wal.damaged-1").read_bytes() == b"left over"
    assert elsewhere.resolve("tickets").version == 1


def test_damage_elsewhere_is_found(elsewhere: Library) -> None:
    elsewhere.add(make(), "tickets")
    blob = next(path for path in MemoryFileSystem.store if "/blobs/" in path)
    content = bytearray(MemoryFileSystem.store[blob].getvalue())
    content[0] ^= 1
    MemoryFileSystem().pipe_file(blob, bytes(content))
    assert not elsewhere.verify().is_clean
    with pytest.raises(FormatError):
        elsewhere.load("tickets")


@pytest.mark.parametrize("name", ["a?b", "a%41b", "a%2Fb?mode=ro", "a&b=c", "a b"])
def test_a_catalogue_is_in_its_folder_whatever_that_is_called(tmp_path: Path, name: str) -> None:
    library = Library(tmp_path / name)
    library.add(make(), "tickets")
    assert (tmp_path / name / "catalogue.sqlite").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    library.close()
    _lose(tmp_path / name)
    assert library.rebuild().versions == 1
    _read_only(tmp_path / name)
    with obeying_permissions():
        assert refs(Library(tmp_path / name).list()) == ["tickets@1"]
    _writable(tmp_path / name)


@pytest.mark.parametrize(
    "url", ["memory://x", "", "nosuchprotocol://x#sqlite:////tmp/x", "folder#sqlite://", "folder#not a url"]
)
def test_bad_places(url: str) -> None:
    with pytest.raises(ConfigError) as bad:
        Library(url).list()
    assert bad.value.message


# The catalogue's schema


def test_queries_and_migrations_agree(tmp_path: Path) -> None:
    catalogue = Catalogue(sqlite_url(tmp_path / "c.sqlite"))
    assert catalogue.upgrade() == len(STEPS)
    assert catalogue.upgrade() == 0
    found = inspect(catalogue.engine)
    assert set(found.get_table_names()) == set(tables.METADATA.tables)
    for name, table in tables.METADATA.tables.items():
        assert [c["name"] for c in found.get_columns(name)] == [c.name for c in table.columns], name
        assert set(found.get_pk_constraint(name)["constrained_columns"]) == {c.name for c in table.primary_key}, name


def _step_2(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE versions ADD COLUMN colour TEXT"))
    connection.execute(text("UPDATE versions SET colour = 'grey'"))


@pytest.mark.parametrize("earlier", range(len(STEPS) + 1))
def test_every_earlier_schema_is_brought_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: int) -> None:
    """From nothing and from each released version to a later one, with what was in it."""
    path = tmp_path / "library" / "catalogue.sqlite"
    if earlier == len(STEPS):
        Library(tmp_path / "library").add(make(), "tickets")
    else:
        path.parent.mkdir()
        engine = create_engine(f"sqlite:///{path}")
        with engine.begin() as connection:
            migrate(connection, STEPS[:earlier])
        engine.dispose()
    monkeypatch.setattr("veneer.library.catalogue.STEPS", (*STEPS, _step_2))
    monkeypatch.setattr(migrations, "STEPS", (*STEPS, _step_2))
    monkeypatch.setattr(migrate, "__defaults__", ((*STEPS, _step_2),))
    library = Library(tmp_path / "library")
    if earlier < len(STEPS):
        library.add(make(), "tickets")
    assert refs(library.list()) == ["tickets@1"]
    with library._catalogue().read() as connection:
        assert schema_version(connection) == len(STEPS) + 1
        colours = connection.execute(text("SELECT colour FROM versions")).scalars().all()
    assert colours == (["grey"] if earlier == len(STEPS) else [None])


def test_a_failed_migration_changes_nothing(tmp_path: Path) -> None:
    def broken(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE versions ADD COLUMN colour TEXT"))
        raise RuntimeError("half-way")

    library = Library(tmp_path / "library")
    library.add(make(), "tickets")
    catalogue = library._catalogue()
    with (
        pytest.raises(RuntimeError),
        catalogue.engine.connect().execution_options(veneer_write=True) as connection,
        connection.begin(),
    ):
        migrate(connection, (*STEPS, broken))
    assert "colour" not in [c["name"] for c in inspect(catalogue.engine).get_columns("versions")]
    assert refs(library.list()) == ["tickets@1"]


def test_a_newer_catalogue_is_left_alone(tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    library.add(make(), "tickets")
    library.close()
    with sqlite3.connect(tmp_path / "library" / "catalogue.sqlite") as connection:
        connection.execute("UPDATE library SET schema_version = 99")
    connection.close()
    with pytest.raises(Unsupported, match="schema 99"):
        library.list()


def test_a_library_that_cannot_be_written(tmp_path: Path) -> None:
    root = tmp_path / "library"
    Library(root).add(make(), "tickets")
    for path in (root / "tmp", root):
        path.chmod(0o555)
    with obeying_permissions(), pytest.raises(ResourceError):
        Library(root).add(make(1), "tickets")
    root.chmod(0o755)
    shutil.rmtree(root)


def _read_only(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def _writable(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "open elsewhere"])
@pytest.mark.parametrize("may_link", [True, False], ids=["link", "copy"])
def test_a_library_that_can_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_open: bool, may_link: bool
) -> None:
    root = tmp_path / "library"
    owner = _rich(root)
    expected = _everything(owner)
    if not is_open:
        owner.close()
    _read_only(root)
    before = files_under(root)
    reader = Library(root)
    with obeying_permissions():
        if not may_link:
            monkeypatch.setattr(os, "link", _no_link)
        assert _everything(reader) == expected
        assert reader.load("tickets").digest == make(2).digest
        assert reader.checkout("tickets", tmp_path / "out").is_dir()
        assert reader.verify().is_clean and reader.revision() > 0
        changes = (
            lambda: reader.add(make(9), "tickets"),
            lambda: reader.alias("tickets@1", "production"),
            lambda: reader.record("tickets@1", {"loss": 1.0}),
            lambda: reader.remove("letters@1"),
            reader.gc,
        )
        for change in changes:
            with pytest.raises(ResourceError) as refused:
                change()
            assert "read-only" in refused.value.message or "cannot be written" in refused.value.message
            assert "owner" in (refused.value.help or "")
    assert files_under(root) == before
    _writable(root)


def _no_link(*_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_reader_without_write_permission_sees_what_the_owner_changes(tmp_path: Path) -> None:
    root = tmp_path / "library"
    owner = Library(root)
    owner.add(make(0), "tickets")
    owner.close()
    _read_only(root)
    reader = Library(root)
    with obeying_permissions():
        seen = [reader.revision()]
    _writable(root)
    for seed in (1, 2):
        owner.add(make(seed), "tickets")
        if seed == 2:
            owner.close()
        with obeying_permissions():
            seen.append(reader.revision())
    assert seen == sorted(set(seen))
    assert refs(reader.list()) == ["tickets@1", "tickets@2", "tickets@3"]


@pytest.mark.parametrize("has_index", [True, False])
def test_a_read_only_copy_of_a_library_in_use(tmp_path: Path, has_index: bool) -> None:
    """Its log holds what the catalogue doesn't yet: read as well, or refused, and never passed over."""
    owner, root = Library(tmp_path / "library"), tmp_path / "copy"
    owner.add(make(), "tickets")
    shutil.copytree(tmp_path / "library", root)
    if not has_index:
        (root / "catalogue.sqlite-shm").unlink()
    _read_only(root)
    with obeying_permissions():
        if has_index:
            assert refs(Library(root).list()) == ["tickets@1"]
        else:
            with pytest.raises(ResourceError, match="not in the catalogue yet") as refused:
                Library(root).list()
            assert "veneer library list" in (refused.value.help or "")
    _writable(root)
    assert refs(Library(root).list()) == ["tickets@1"]


def test_an_earlier_schema_that_cannot_be_brought_up_says_so(tmp_path: Path) -> None:
    root = tmp_path / "library"
    root.mkdir()
    engine = create_engine(f"sqlite:///{root / 'catalogue.sqlite'}")
    with engine.begin() as connection:
        migrate(connection, STEPS[:1])
    engine.dispose()
    _read_only(root)
    with obeying_permissions(), pytest.raises(ResourceError, match="read-only"):
        Library(root).list()
    _writable(root)
    assert Library(root).list() == ()
