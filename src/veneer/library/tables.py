"""The catalogue's tables as queries see them. The schema itself is made by `migrations.py`."""

from __future__ import annotations

from sqlalchemy import CHAR, BigInteger, Column, Float, Integer, MetaData, String, Table, Text

METADATA = MetaData()


def _version_key() -> tuple[Column[str], Column[int]]:
    return Column("name", String(64), primary_key=True), Column("version", Integer, primary_key=True)


def _alias_key() -> tuple[Column[str], Column[str]]:
    return Column("name", String(64), primary_key=True), Column("alias", String(32), primary_key=True)


library = Table(
    "library",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("schema_version", Integer),
    Column("revision", BigInteger),
)
names = Table("names", METADATA, Column("name", String(64), primary_key=True), Column("next", Integer))
removed = Table("removed", METADATA, *_version_key())
versions = Table(
    "versions",
    METADATA,
    *_version_key(),
    Column("digest", CHAR(64)),
    Column("base", String(64)),
    Column("base_name", Text),
    Column("belongs", Text),
    Column("method", String(64)),
    Column("rank", Integer),
    Column("targets", Integer),
    Column("parameters", BigInteger),
    Column("bytes", BigInteger),
    Column("created", String(32)),
    Column("source", Text),
    Column("manifest", CHAR(64)),
)
files = Table(
    "files",
    METADATA,
    *_version_key(),
    Column("path", Text, primary_key=True),
    Column("blob", CHAR(64)),
    Column("bytes", BigInteger),
)
parents = Table("parents", METADATA, *_version_key(), Column("parent", CHAR(64), primary_key=True))
metrics = Table(
    "metrics", METADATA, *_version_key(), Column("metric", String(64), primary_key=True), Column("value", Float(53))
)
aliases = Table(
    "aliases",
    METADATA,
    *_alias_key(),
    Column("version", Integer),
    Column("weight", Float(53)),
    Column("updated", String(32)),
)
demands = Table(
    "demands",
    METADATA,
    *_alias_key(),
    Column("metric", String(64), primary_key=True),
    Column("better", String(6)),
    Column("margin", Float(53)),
)
moves = Table(
    "moves",
    METADATA,
    *_alias_key(),
    Column("number", Integer, primary_key=True),
    Column("version", Integer),
    Column("weight", Float(53)),
    Column("at", String(32)),
    Column("reason", Text),
    Column("before", Integer),
)
