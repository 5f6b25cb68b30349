"""The catalogue's schema, as numbered steps that never change once released.

Step n brings a catalogue from version n-1 to n, inside one transaction. The statements are plain SQL that every database
understands: no generated keys, no stored functions. `tables.py` says the same for queries, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from sqlalchemy import Connection, inspect, text

from veneer.errors import Unsupported

Step: TypeAlias = Callable[[Connection], None]


def step_1(connection: Connection) -> None:
    """Names, versions, their files and parents; aliases with demands and history; metrics."""
    for statement in _STEP_1:
        connection.execute(text(statement))


_STEP_1 = (
    "CREATE TABLE library (id INTEGER PRIMARY KEY, schema_version INTEGER NOT NULL, revision BIGINT NOT NULL)",
    "INSERT INTO library (id, schema_version, revision) VALUES (1, 0, 0)",
    "CREATE TABLE names (name VARCHAR(64) PRIMARY KEY, next INTEGER NOT NULL)",
    """CREATE TABLE versions (name VARCHAR(64) NOT NULL, version INTEGER NOT NULL, digest CHAR(64) NOT NULL,
       base VARCHAR(64), base_name TEXT, belongs TEXT NOT NULL, method VARCHAR(64) NOT NULL, rank INTEGER,
       targets INTEGER NOT NULL, parameters BIGINT NOT NULL, bytes BIGINT NOT NULL, created VARCHAR(32) NOT NULL,
       source TEXT NOT NULL, manifest CHAR(64) NOT NULL, PRIMARY KEY (name, version))""",
    "CREATE UNIQUE INDEX versions_name_digest ON versions (name, digest)",
    "CREATE INDEX versions_digest ON versions (digest)",
    """CREATE TABLE files (name VARCHAR(64) NOT NULL, version INTEGER NOT NULL, path TEXT NOT NULL, blob CHAR(64) NOT NULL,
       bytes BIGINT NOT NULL, PRIMARY KEY (name, version, path))""",
    "CREATE INDEX files_blob ON files (blob)",
    """CREATE TABLE parents (name VARCHAR(64) NOT NULL, version INTEGER NOT NULL, parent CHAR(64) NOT NULL,
       PRIMARY KEY (name, version, parent))""",
    "CREATE INDEX parents_parent ON parents (parent)",
    """CREATE TABLE metrics (name VARCHAR(64) NOT NULL, version INTEGER NOT NULL, metric VARCHAR(64) NOT NULL,
       value DOUBLE PRECISION NOT NULL, PRIMARY KEY (name, version, metric))""",
    """CREATE TABLE aliases (name VARCHAR(64) NOT NULL, alias VARCHAR(32) NOT NULL, version INTEGER NOT NULL,
       weight DOUBLE PRECISION NOT NULL, updated VARCHAR(32) NOT NULL, PRIMARY KEY (name, alias))""",
    """CREATE TABLE demands (name VARCHAR(64) NOT NULL, alias VARCHAR(32) NOT NULL, metric VARCHAR(64) NOT NULL,
       better VARCHAR(6) NOT NULL, margin DOUBLE PRECISION NOT NULL, PRIMARY KEY (name, alias, metric))""",
    """CREATE TABLE moves (name VARCHAR(64) NOT NULL, alias VARCHAR(32) NOT NULL, number INTEGER NOT NULL, version INTEGER,
       weight DOUBLE PRECISION NOT NULL, at VARCHAR(32) NOT NULL, reason TEXT NOT NULL, before INTEGER,
       PRIMARY KEY (name, alias, number))""",
)


def step_2(connection: Connection) -> None:
    """A name may have the same numbers twice, with another chat template; what was removed is remembered until `gc`."""
    for statement in _STEP_2:
        connection.execute(text(statement))


_STEP_2 = (
    "DROP INDEX versions_name_digest",
    "CREATE INDEX versions_name_digest ON versions (name, digest)",
    "CREATE TABLE removed (name VARCHAR(64) NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (name, version))",
)

STEPS: Sequence[Step] = (step_1, step_2)


def schema_version(connection: Connection) -> int:
    """The version of the catalogue behind `connection`; 0 where there is none yet."""
    if not inspect(connection).has_table("library"):
        return 0
    return int(connection.execute(text("SELECT schema_version FROM library WHERE id = 1")).scalar_one())


def migrate(connection: Connection, steps: Sequence[Step] = STEPS) -> int:
    """Bring the catalogue up to the last step and return how many were taken. The caller holds the write lock."""
    found = schema_version(connection)
    if found > len(steps):
        raise Unsupported(
            f"the library's catalogue has schema {found}, this veneer knows up to {len(steps)}",
            help="use the newer veneer that wrote it",
        )
    for number in range(found, len(steps)):
        steps[number](connection)
        connection.execute(text("UPDATE library SET schema_version = :n WHERE id = 1"), {"n": number + 1})
    return len(steps) - found
