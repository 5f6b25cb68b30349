"""The catalogue's database: connections, transactions, and what its errors mean.

One writer at a time: a write transaction starts by moving the library's revision, which takes SQLite's write lock
(BEGIN IMMEDIATE) or the row lock of another database. Readers never wait (WAL). The revision is also how a server
notices a change for the price of one indexed read.

A SQLite catalogue that this user may not write is read as it lies: nothing is made beside it, and every read looks at
the file anew.

The surprise: a new SQLite catalogue is built aside and linked into place, so that two processes that start at once,
or one that is killed half-way, never leave a half-made one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, make_url, select, update
from sqlalchemy.exc import ArgumentError, DatabaseError

from veneer.errors import ConfigError, Conflict, FormatError, ResourceError, VeneerError
from veneer.library import tables
from veneer.library.migrations import STEPS, migrate, schema_version

PATIENCE_SECONDS = 60
_REBUILD = "make it again from the manifests: `veneer library rebuild`"


# SQLite counts its file locks per process, and a child that inherits an open connection believes it holds its parent's. So
# connections are closed before a fork; both sides open their own when they next need one.
_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _close_before_fork() -> None:
    for engine in list(_ENGINES):
        engine.dispose()


os.register_at_fork(before=_close_before_fork)


class Catalogue:
    """An open catalogue at a SQLAlchemy URL. Its connections close with it."""

    def __init__(self, url: URL) -> None:
        path = sqlite_path(url)
        self.where = repr(url)  # without the password
        self.can_write = path is None or _may_write(path)
        self.engine = _engine(url, is_sqlite=path is not None, can_write=self.can_write)
        _ENGINES.add(self.engine)
        weakref.finalize(self, self.engine.dispose)

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view; writers go on beside it."""
        with explained(self.where), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """The one write transaction: everything in it happens, or nothing."""
        self._must_be_writable()
        with explained(self.where), self.engine.connect() as connection:
            connection = connection.execution_options(veneer_write=True)
            with connection.begin():
                moved = update(tables.library).values(revision=tables.library.c.revision + 1)
                connection.execute(moved)
                yield connection

    def upgrade(self) -> int:
        """Take the migrations that are missing and return how many they were."""
        with self.read() as connection:
            if schema_version(connection) == len(STEPS):
                return 0
        self._must_be_writable()
        with explained(self.where), self.engine.connect() as connection:
            connection = connection.execution_options(veneer_write=True)
            with connection.begin():
                return migrate(connection)

    def revision(self) -> int:
        """Grows with every change."""
        with self.read() as connection:
            return int(connection.execute(select(tables.library.c.revision)).scalar_one())

    def problems(self) -> list[str]:
        """What the database itself finds wrong with its file; empty where it can't say."""
        if self.engine.dialect.name != "sqlite":
            return []
        with self.read() as connection:
            found = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
        return [] if found == ["ok"] else [f"catalogue: {line}" for line in found]

    def close(self) -> None:
        self.engine.dispose()

    def _must_be_writable(self) -> None:
        if not self.can_write:
            raise ResourceError(
                f"the catalogue {self.where} is read-only for this user, and this would write to it",
                help="run this as its owner, or check the owner and mode of the library's folder and files",
            )


def parse_url(text: str) -> URL:
    """A database's URL, or ConfigError."""
    try:
        return make_url(text)
    except ArgumentError as error:
        raise ConfigError(
            f"'{text}' is not a database URL", help="for example postgresql+psycopg://host/veneer"
        ) from error


def sqlite_url(path: str | os.PathLike[str]) -> URL:
    """The URL of a SQLite file. Built, not written: `?` and `%` mean something in a URL's text."""
    return URL.create("sqlite", database=os.fspath(path))


def sqlite_path(url: URL) -> Path | None:
    """The file of a SQLite URL, or None for another database. A catalogue in memory is refused: nobody else would see it."""
    if url.get_backend_name() != "sqlite":
        return None
    if not url.database or url.database == ":memory:":
        raise ConfigError(f"the catalogue '{url}' has no file", help="give a path: sqlite:////folder/catalogue.sqlite")
    return Path(url.database)


def place_new(final: Path, aside: Path) -> bool:
    """Link the SQLite catalogue built at `aside` into its place; False where somebody else was first."""
    try:
        os.link(aside, final)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: the window is one check wide
        if final.exists():
            return False
        shutil.move(aside, final)
    return True


def _engine(url: URL, *, is_sqlite: bool, can_write: bool) -> Engine:
    arguments = {"timeout": PATIENCE_SECONDS} if is_sqlite else {}
    try:
        engine = create_engine(url, connect_args=arguments, poolclass=None if can_write else NullPool)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the catalogue {url!r} needs the Python package {error.name}", help=f"pip install {error.name}"
        ) from error
    if is_sqlite:
        if not can_write:
            event.listen(engine, "do_connect", _connect_to_read)
        event.listen(engine, "connect", _prepare if can_write else _prepare_to_read)
        event.listen(engine, "begin", _begin)
    return engine


def _may_write(path: Path) -> bool:
    """Whether this user may write a SQLite file: itself, its log, and the folder that the log comes and goes in."""
    files = [file for end in ("", "-wal", "-shm") if os.path.exists(file := f"{path}{end}")]
    is_effective = os.access in os.supports_effective_ids
    return all(os.access(place, os.W_OK, effective_ids=is_effective) for place in (str(path.parent), *files))


def _connect_to_read(_dialect: Any, _record: Any, arguments: list[Any], options: dict[str, Any]) -> sqlite3.Connection:
    """Without a log nobody is writing. Then the file alone is read (immutable): a lock would need a file beside it."""
    path: str = arguments[0]
    log = f"{path}-wal"
    has_log = os.path.exists(log) and os.path.getsize(log) > 0
    if has_log and not os.path.exists(f"{path}-shm"):
        raise ResourceError(
            f"{log} holds changes that are not in the catalogue yet, and its index {path}-shm is missing",
            help="run `veneer library list` once as a user who may write to it",
        )
    mode = "mode=ro" if has_log else "mode=ro&immutable=1"
    connection: sqlite3.Connection = sqlite3.connect(f"file:{quote(path)}?{mode}", uri=True, **options)
    return connection


def _prepare(connection: Any, _: Any) -> None:
    """SQLite as veneer wants it: explicit transactions, write-ahead log, every commit on the disk."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "cache_size=-16000"):
        connection.execute(f"PRAGMA {pragma}")


def _prepare_to_read(connection: Any, _: Any) -> None:
    connection.isolation_level = None


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("veneer_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn a database's errors into veneer's, with the way out."""
    try:
        yield
    except DatabaseError as error:
        raise _explained(error.orig or error, where) from error
    except sqlite3.Error as error:  # raised while connecting, before SQLAlchemy wraps errors
        raise _explained(error, where) from error


def _explained(error: BaseException, where: str) -> VeneerError:
    code = error.sqlite_errorcode & 0xFF if isinstance(error, sqlite3.Error) else 0
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return FormatError(f"the catalogue {where} is damaged: {error}", help=_REBUILD)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Conflict(
            f"another process has held the catalogue for {PATIENCE_SECONDS} s", help="wait for it and try again"
        )
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return ResourceError(
            f"the catalogue {where} cannot be written: {error}", help="free some space; nothing was changed"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return ResourceError(
            f"the catalogue {where} cannot be opened for this: {error}", help="check its owner and mode"
        )
    if "no such table" in str(error):
        return FormatError(f"the catalogue {where} has no tables", help=_REBUILD)
    return ResourceError(f"the catalogue {where} refused: {error}", help="run `veneer library verify`")
