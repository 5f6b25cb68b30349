"""What the catalogue can be asked. Every function takes the connection of a transaction that the caller holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Select, and_, func, select

from veneer.errors import ConfigError, NotFound
from veneer.library import tables as t
from veneer.library.gate import Demand
from veneer.library.records import Alias, File, Move, Version
from veneer.library.resolve import DEFAULT, Reference, check_alias
from veneer.registry import did_you_mean

VERSION_COLUMNS = tuple(t.versions.c[field] for field in Version._fields)
ALIAS_COLUMNS = tuple(t.aliases.c[field] for field in Alias.__dataclass_fields__)
MOVE_COLUMNS = tuple(t.moves.c[field] for field in Move.__dataclass_fields__)


def numbered(connection: Connection, name: str, version: int) -> Version | None:
    return _one_version(
        connection, select(*VERSION_COLUMNS).where(t.versions.c.name == name, t.versions.c.version == version)
    )


def with_digest(connection: Connection, name: str, digest: str) -> tuple[Version, ...]:
    """Versions of a name with the same numbers: one, or one for each chat template. The newest is first."""
    c = t.versions.c
    query = select(*VERSION_COLUMNS).where(c.name == name, c.digest == digest).order_by(c.version.desc())
    return tuple(Version(*row) for row in connection.execute(query))


def newest(connection: Connection, name: str) -> Version | None:
    query = select(*VERSION_COLUMNS).where(t.versions.c.name == name).order_by(t.versions.c.version.desc()).limit(1)
    return _one_version(connection, query)


def stock(connection: Connection) -> tuple[int, int]:
    """Distinct contents and their bytes."""
    contents = select(t.versions.c.digest, func.max(t.versions.c.bytes).label("bytes")).group_by(t.versions.c.digest)
    each = contents.subquery()
    count, size = connection.execute(
        select(func.count(), func.coalesce(func.sum(each.c.bytes), 0)).select_from(each)
    ).one()
    return int(count), int(size)


def _one_version(connection: Connection, query: Select[Any]) -> Version | None:
    row = connection.execute(query).first()
    return None if row is None else Version(*row)


def alias_at(connection: Connection, name: str, alias: str) -> Alias | None:
    query = select(*ALIAS_COLUMNS).where(t.aliases.c.name == name, t.aliases.c.alias == alias)
    row = connection.execute(query).first()
    return None if row is None else Alias(*row)


def find(connection: Connection, reference: Reference) -> Version:
    """The version a reference means, or NotFound with what there is instead.

    A bare name means its production alias; without one, the newest version.
    """
    name, found = reference.name, None
    if reference.version is not None:
        found = numbered(connection, name, reference.version)
    else:
        alias = alias_at(connection, name, reference.alias or DEFAULT)
        if alias is not None:
            found = numbered(connection, name, alias.version)
        elif reference.alias is None:
            found = newest(connection, name)
    if found is None:
        raise _not_found(connection, reference)
    return found


def _not_found(connection: Connection, reference: Reference) -> NotFound:
    name = reference.name
    highest = newest(connection, name)
    if highest is None:
        known = connection.execute(select(t.names.c.name)).scalars().all()
        close = did_you_mean(name, list(known)) if known else "it is empty; add one with `veneer library add`"
        return NotFound(f"no adapter in the library is called '{name}'", help=close[:400])
    if reference.version is not None:
        return NotFound(f"'{name}' has no version {reference.version}", help=f"its newest is {highest.ref}")
    known_aliases = [alias.alias for alias in aliases(connection, name)]
    return NotFound(
        f"'{name}' has no alias '{reference.alias}'",
        help=did_you_mean(reference.alias or "", known_aliases)
        if known_aliases
        else f"its newest version is {highest.ref}",
    )


def listed_versions(
    connection: Connection,
    *,
    name: str | None = None,
    base: str | None = None,
    method: str | None = None,
    alias: str | None = None,
    newest_only: bool = False,
    current: bool = False,
    limit: int | None = None,
) -> tuple[Version, ...]:
    """Versions by name and number. `name` may hold `*`; `base` is a name or the start of an identity.

    `current` keeps what each bare name means: production, or the newest version without one.
    """
    c = t.versions.c
    query = select(*VERSION_COLUMNS).order_by(c.name, c.version)
    if name is not None:
        query = query.where(c.name.like(_like(name), escape="!"))
    if base is not None:
        query = query.where((c.base_name == base) | c.base.like(_like(f"{base}*"), escape="!"))
    if method is not None:
        query = query.where(c.method == method)
    if alias is not None:
        a = t.aliases.c
        here = and_(a.name == c.name, a.version == c.version, a.alias == check_alias(alias))
        query = query.join(t.aliases, here)
    if newest_only or current:
        tops = select(c.name, func.max(c.version).label("version")).group_by(c.name).subquery()
        query = query.join(tops, tops.c.name == c.name)
    if newest_only:
        query = query.where(c.version == tops.c.version)
    if current:
        served = t.aliases.alias("served")
        query = query.outerjoin(served, and_(served.c.name == c.name, served.c.alias == DEFAULT))
        query = query.where(c.version == func.coalesce(served.c.version, tops.c.version))
    if limit is not None:
        if limit < 1:
            raise ConfigError(f"a limit is 1 or more, got {limit}")
        query = query.limit(limit)
    with contextlib.closing(connection.execute(query)) as result:
        # Straight from the driver: the columns are texts and whole numbers, and wrapping ten thousand rows costs as much again.
        assert result.cursor is not None
        return tuple(map(Version._make, result.cursor.fetchall()))


def _like(pattern: str) -> str:
    for special in "!%_":
        pattern = pattern.replace(special, f"!{special}")
    return pattern.replace("*", "%")


def aliases(connection: Connection, name: str | None = None) -> tuple[Alias, ...]:
    query = select(*ALIAS_COLUMNS).order_by(t.aliases.c.name, t.aliases.c.alias)
    if name is not None:
        query = query.where(t.aliases.c.name == name)
    return tuple(Alias(*row) for row in connection.execute(query))


def demands(connection: Connection, name: str, alias: str) -> tuple[Demand, ...]:
    c = t.demands.c
    query = select(c.metric, c.better, c.margin).where(c.name == name, c.alias == alias).order_by(c.metric)
    return tuple(Demand(*row) for row in connection.execute(query))


def moves(connection: Connection, name: str, alias: str | None = None) -> tuple[Move, ...]:
    """The history of a name's aliases, oldest first."""
    c = t.moves.c
    query = select(*MOVE_COLUMNS).where(c.name == name).order_by(c.alias, c.number)
    if alias is not None:
        query = query.where(c.alias == alias)
    return tuple(Move(*row) for row in connection.execute(query))


def metrics(connection: Connection, version: Version) -> dict[str, float]:
    c = t.metrics.c
    query = select(c.metric, c.value).where(c.name == version.name, c.version == version.version).order_by(c.metric)
    return {row.metric: row.value for row in connection.execute(query)}


def files(connection: Connection, version: Version) -> tuple[File, ...]:
    c = t.files.c
    query = select(c.path, c.blob, c.bytes).where(c.name == version.name, c.version == version.version).order_by(c.path)
    return tuple(File(*row) for row in connection.execute(query))


def parents(connection: Connection, version: Version) -> dict[str, str | None]:
    """Digest of each parent -> a reference to it, or None where it is not in this library."""
    p, v = t.parents.c, t.versions.c
    query = (
        select(p.parent, v.name, v.version)
        .select_from(t.parents.outerjoin(t.versions, v.digest == p.parent))
        .where(p.name == version.name, p.version == version.version)
        .order_by(p.parent, v.name.desc(), v.version.desc())
    )
    return {row.parent: None if row.name is None else f"{row.name}@{row.version}" for row in connection.execute(query)}


def children(connection: Connection, digests: Iterable[str]) -> dict[str, str]:
    """Reference of each version made from one of `digests` -> the digest it was made from."""
    c = t.parents.c
    query = select(c.name, c.version, c.parent).where(c.parent.in_(list(digests))).order_by(c.name, c.version)
    return {f"{row.name}@{row.version}": row.parent for row in connection.execute(query)}


def insert_version(
    connection: Connection,
    version: Version,
    files_: Sequence[File],
    parents_: Sequence[str],
    metrics_: Mapping[str, float],
) -> None:
    key = {"name": version.name, "version": version.version}
    connection.execute(t.versions.insert(), version._asdict())
    connection.execute(t.files.insert(), [{**key, "path": f.path, "blob": f.blob, "bytes": f.bytes} for f in files_])
    if parents_:
        connection.execute(t.parents.insert(), [{**key, "parent": parent} for parent in dict.fromkeys(parents_)])
    put_metrics(connection, version, metrics_)


def put_metrics(connection: Connection, version: Version, values: Mapping[str, float]) -> None:
    """Record metrics; a metric that is there already gets the new value."""
    c = t.metrics.c
    for metric, value in values.items():
        here = and_(c.name == version.name, c.version == version.version, c.metric == metric)
        connection.execute(t.metrics.delete().where(here))
        connection.execute(
            t.metrics.insert(), {"name": version.name, "version": version.version, "metric": metric, "value": value}
        )


def delete_version(connection: Connection, version: Version) -> None:
    """Forget a version, and remember that it was meant: its records may outlive it until `gc`."""
    for table in (t.versions, t.files, t.parents, t.metrics):
        connection.execute(table.delete().where(table.c.name == version.name, table.c.version == version.version))
    connection.execute(t.removed.insert(), {"name": version.name, "version": version.version})


def removed(connection: Connection, name: str) -> list[int]:
    """Numbers of versions that were removed and whose records may still be there."""
    c = t.removed.c
    return list(connection.execute(select(c.version).where(c.name == name).order_by(c.version)).scalars())


def next_version(connection: Connection, name: str) -> int:
    """The number that the next version of `name` gets. Numbers are never used twice."""
    found = connection.execute(select(t.names.c.next).where(t.names.c.name == name)).scalar()
    if found is None:
        connection.execute(t.names.insert(), {"name": name, "next": 1})
        return 1
    return int(found)


def set_next_version(connection: Connection, name: str, number: int) -> None:
    connection.execute(t.names.update().where(t.names.c.name == name).values(next=number))
