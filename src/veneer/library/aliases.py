"""Moving aliases: one line of history for every move, a gate before it, and the way back.

History is a stack: a move remembers the move it replaced, a rollback goes to that one, and a second rollback one
further. Nothing is erased: a rollback is a move too.

Every function runs inside one write transaction, so a reader sees an alias before or after a move and nothing in
between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, func, select

from veneer.errors import ConfigError, Conflict, NotFound, listed
from veneer.library import queries
from veneer.library import tables as t
from veneer.library.blobs import Blobs
from veneer.library.gate import Demand, failures
from veneer.library.manifest import State, seal
from veneer.library.records import Alias, Move, Version
from veneer.library.resolve import DEFAULT, check_alias

REMEMBERED = 200
"""Moves of an alias that survive the loss of the catalogue, so that a state record stays small."""


def move(
    connection: Connection,
    version: Version,
    alias: str,
    *,
    at: str,
    weight: float | None = None,
    force: str | None = None,
    reason: str = "",
) -> Alias:
    """Point `alias` at `version`, if its demands are met. `force` is the reason for moving although they are not."""
    current = queries.alias_at(connection, version.name, check_alias(alias))
    share = _weight(connection, version.name, alias, weight, current)
    if current is not None and (current.version, current.weight) == (version.version, share):
        return current
    if current is None or current.version != version.version:
        problems = _failures(connection, version, alias, current)
        if problems and force is None:
            where = f"it stays at {current.ref}" if current else "it is not set"
            raise Conflict(
                f"{version.ref} may not become {version.name}@{alias}; {where}:\n{listed(problems)}",
                help=f"evaluate and record it (`veneer library record {version.ref} --metric NAME=VALUE`), "
                "or --force REASON",
            )
        if force is not None:
            reason = "; ".join([f"forced: {force}", *problems])
    before = _last(connection, version.name, alias)
    _log(connection, version.name, alias, version.version, share, at=at, reason=reason, before=before)
    return _set(connection, Alias(version.name, alias, version.version, share, at))


def rollback(connection: Connection, name: str, alias: str, *, at: str, reason: str = "") -> Alias:
    """Point `alias` at what it pointed to before. The gate isn't asked: that version had passed."""
    last = _last(connection, name, check_alias(alias), keep_drop=True)
    if last is None:
        raise NotFound(f"'{name}' never had an alias '{alias}'", help=f"`veneer library show {name}` lists its aliases")
    before = _before(connection, name, alias, last)
    if before is None:
        raise Conflict(
            f"{name}@{alias} has no earlier version to go back to",
            help="move it: `veneer library alias NAME@VERSION ALIAS`",
        )
    target = _move_at(connection, name, alias, before)
    assert target.version is not None
    if queries.numbered(connection, name, target.version) is None:
        raise NotFound(
            f"{name}@{alias} was at version {target.version} before, which has been removed",
            help="move it to another: `veneer library alias NAME@VERSION ALIAS`",
        )
    share = _weight(connection, name, alias, target.weight, None)
    undone = _move_at(connection, name, alias, last).version
    reason = reason or f"rollback from version {undone}"
    further = _before(connection, name, alias, before)
    _log(connection, name, alias, target.version, share, at=at, reason=reason, before=further)
    return _set(connection, Alias(name, alias, target.version, share, at))


def drop(connection: Connection, name: str, alias: str, *, at: str, reason: str = "") -> Alias:
    """Take an alias away; `rollback` brings it back."""
    current = queries.alias_at(connection, name, check_alias(alias))
    if current is None:
        raise NotFound(f"'{name}' has no alias '{alias}'", help=f"`veneer library show {name}` lists its aliases")
    _log(connection, name, alias, None, 0.0, at=at, reason=reason, before=_last(connection, name, alias))
    connection.execute(t.aliases.delete().where(t.aliases.c.name == name, t.aliases.c.alias == alias))
    return current


def set_demands(connection: Connection, name: str, alias: str, demands: Sequence[Demand]) -> None:
    """What `alias` demands from now on, in place of what it demanded."""
    check_alias(alias)
    names = [demand.metric for demand in demands]
    if len(set(names)) != len(names):
        raise ConfigError(f"a metric is demanded twice: {', '.join(names)}")
    connection.execute(t.demands.delete().where(t.demands.c.name == name, t.demands.c.alias == alias))
    for demand in demands:
        row = {"name": name, "alias": alias, "metric": demand.metric, "better": demand.better, "margin": demand.margin}
        connection.execute(t.demands.insert(), row)


def write_state(blobs: Blobs, connection: Connection, name: str) -> None:
    """Put what the manifests don't say about `name` into its state record, inside the transaction that changes it."""
    blobs.write(blobs.path("manifests", name, "state.json"), state_of(connection, name), durable=False)


def state_of(connection: Connection, name: str) -> bytes:
    """The sealed state record of a name."""
    following = connection.execute(select(t.names.c.next).where(t.names.c.name == name)).scalar()
    rows: dict[str, list[dict[str, Any]]] = {}
    for table in (t.aliases, t.demands, t.moves):
        columns = [column for column in table.c if column.name != "name"]
        query = select(*columns).where(table.c.name == name).order_by(*table.primary_key.columns)
        if table is t.moves:
            of_alias = t.moves.alias("of_alias").c
            newest = select(func.max(of_alias.number)).where(of_alias.name == name, of_alias.alias == t.moves.c.alias)
            query = query.where(t.moves.c.number > newest.scalar_subquery() - REMEMBERED)
        rows[table.name] = [dict(row._mapping) for row in connection.execute(query)]
    removed = queries.removed(connection, name)
    return seal(State.model_validate({"name": name, "next": following or 1, "removed": removed, **rows}))


def _weight(connection: Connection, name: str, alias: str, weight: float | None, current: Alias | None) -> float:
    if alias == DEFAULT:
        if weight not in (None, 1.0):
            raise ConfigError(
                f"{DEFAULT} has no weight: it takes what the other aliases leave", help="give canary a weight"
            )
        return 1.0
    share = weight if weight is not None else current.weight if current is not None else 0.0
    others = [a.weight for a in queries.aliases(connection, name) if a.alias not in (alias, DEFAULT)]
    if not (math.isfinite(share) and 0 <= share <= 1) or sum(others) + share > 1 + 1e-9:
        raise ConfigError(
            f"a weight is a share of the traffic of '{name}': got {share} for {alias}, others have {sum(others):g}",
            help=f"the others leave {max(0.0, 1 - sum(others)):g}: lower theirs, or `veneer library alias {name}@VERSION {alias} "
            "--weight 0.1` (0.1 takes a tenth of the requests for the bare name; 0 is reached only by name@alias)",
        )
    return share


def _failures(connection: Connection, version: Version, alias: str, current: Alias | None) -> Sequence[str]:
    demands = queries.demands(connection, version.name, alias)
    if not demands:
        return ()
    served = None if current is None else queries.numbered(connection, version.name, current.version)
    measured = None if served is None else queries.metrics(connection, served)
    return failures(demands, queries.metrics(connection, version), measured, "" if served is None else served.ref)


def _set(connection: Connection, alias: Alias) -> Alias:
    here = t.aliases.c.name == alias.name, t.aliases.c.alias == alias.alias
    connection.execute(t.aliases.delete().where(*here))
    row = {field: getattr(alias, field) for field in Alias.__dataclass_fields__}
    connection.execute(t.aliases.insert(), row)
    return alias


def _log(
    connection: Connection,
    name: str,
    alias: str,
    version: int | None,
    weight: float,
    *,
    at: str,
    reason: str,
    before: int | None,
) -> None:
    c = t.moves.c
    highest = connection.execute(select(func.max(c.number)).where(c.name == name, c.alias == alias)).scalar() or 0
    row = {"name": name, "alias": alias, "number": highest + 1, "version": version, "weight": weight}
    connection.execute(t.moves.insert(), {**row, "at": at, "reason": reason, "before": before})


def _last(connection: Connection, name: str, alias: str, *, keep_drop: bool = False) -> int | None:
    """The number of the newest move; where that took the alias away and `keep_drop` is off, of the one before it."""
    c = t.moves.c
    number = connection.execute(select(func.max(c.number)).where(c.name == name, c.alias == alias)).scalar()
    if number is None or keep_drop or _move_at(connection, name, alias, number).version is not None:
        return number
    return _before(connection, name, alias, number)


def _before(connection: Connection, name: str, alias: str, number: int) -> int | None:
    c = t.moves.c
    query = select(c.before).where(c.name == name, c.alias == alias, c.number == number)
    before: int | None = connection.execute(query).scalar_one()
    return before


def _move_at(connection: Connection, name: str, alias: str, number: int) -> Move:
    c = t.moves.c
    query = select(*queries.MOVE_COLUMNS).where(c.name == name, c.alias == alias, c.number == number)
    return Move(*connection.execute(query).one())
