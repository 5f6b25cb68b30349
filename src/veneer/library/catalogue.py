"""The catalogue's database: connections, transactions, and what its errors mean.

One writer at a time: a write transaction starts by moving the library's revision, which takes SQLite's write lock
(BEGIN IMMEDIATE) or the row lock of another database. Readers never wait (WAL). The revision is also how a server
notices a change for the price of one indexed read.

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

from sqlalchemy import Connection, Engine, create_engine, event, make_url, select, update
from sqlalchemy.exc import DatabaseError

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

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _engine(url)
        _ENGINES.add(self.engine)
        weakref.finalize(self, self.engine.dispose)

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view; writers go on beside it."""
        with explained(self.url), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """The one write transaction: everything in it happens, or nothing."""
        with explained(self.url), self.engine.connect() as connection:
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
        with explained(self.url), self.engine.connect() as connection:
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


def sqlite_path(url: str) -> Path | None:
    """The file of a SQLite URL, or None for another database. A catalogue in memory is refused: nobody else would see it."""
    parsed = _parsed(url)
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError(f"the catalogue '{url}' has no file", help="give a path: sqlite:////folder/catalogue.sqlite")
    return Path(parsed.database)


def place_new(url: str, aside: Path) -> bool:
    """Link the SQLite catalogue built at `aside` into its place; False where somebody else was first."""
    final = sqlite_path(url)
    assert final is not None
    try:
        os.link(aside, final)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: the window is one check wide
        if final.exists():
            return False
        shutil.move(aside, final)
    return True


def _parsed(url: str) -> Any:
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url)
    except ArgumentError as error:
        raise ConfigError(
            f"'{url}' is not a database URL", help="for example postgresql+psycopg://host/veneer"
        ) from error


def _engine(url: str) -> Engine:
    sqlite = _parsed(url).get_backend_name() == "sqlite"
    try:
        engine = create_engine(url, connect_args={"timeout": PATIENCE_SECONDS} if sqlite else {})
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the catalogue '{url}' needs the Python package {error.name}", help=f"pip install {error.name}"
        ) from error
    if sqlite:
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", _begin)
    return engine


def _prepare(connection: Any, _: Any) -> None:
    """SQLite as veneer wants it: explicit transactions, write-ahead log, every commit on the disk."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "cache_size=-16000"):
        connection.execute(f"PRAGMA {pragma}")


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
