"""Keeping a library whole: delete what nothing needs, read every byte, and make a lost catalogue again.

`gc` holds the write lock, and writers publish files under it, so nothing that is being added is ever taken for an orphan.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select, update

from veneer.errors import FormatError, NotFound, VeneerError
from veneer.library import queries
from veneer.library import tables as t
from veneer.library.aliases import state_of
from veneer.library.blobs import DIGEST, Blobs
from veneer.library.catalogue import Catalogue, place_new, sqlite_path
from veneer.library.gate import Demand, check_metrics
from veneer.library.manifest import files_of, read_manifest, unseal
from veneer.library.place import FILE, Place, discard, new_sqlite
from veneer.library.records import Collected, Rebuilt, Verified, Version
from veneer.library.resolve import check_alias, check_name


def gc(place: Place, catalogue: Catalogue, *, dry_run: bool = False) -> Collected:
    """Delete blobs and records that no version needs and folders of killed writers; refresh state records."""
    blobs = place.blobs
    with catalogue.write() as connection:
        spare_blobs, spare_records = orphans(blobs, connection)
        leftovers = blobs.abandoned()
        if not dry_run:
            for path in (*spare_blobs, *spare_records):
                blobs.delete(path)
            for folder in leftovers:
                discard(folder)
            _refresh_states(blobs, connection)
    freed = sum(spare_blobs.values()) + sum(spare_records.values())
    return Collected(len(spare_blobs), len(spare_records), len(leftovers), freed)


def orphans(blobs: Blobs, connection: Connection) -> tuple[dict[str, int], dict[str, int]]:
    """Blobs and records that the catalogue doesn't know: path -> bytes."""
    needed = set(connection.execute(select(t.files.c.blob).distinct()).scalars())
    spare = {path: size for path, size in blobs.files("blobs").items() if os.path.basename(path) not in needed}
    c = t.versions.c
    known: set[str] = set()
    for name, version in connection.execute(select(c.name, c.version)):
        known.update(
            (blobs.path("manifests", name, f"{version}.json"), blobs.path("manifests", name, f"{version}.metrics.json"))
        )
    known.update(
        blobs.path("manifests", name, "state.json") for name in connection.execute(select(t.names.c.name)).scalars()
    )
    return spare, {path: size for path, size in blobs.files("manifests").items() if path not in known}


def _refresh_states(blobs: Blobs, connection: Connection) -> None:
    """A writer killed between its state record and its commit leaves the record ahead of the catalogue."""
    present = blobs.files("manifests")
    for name in connection.execute(select(t.names.c.name)).scalars().all():
        path = blobs.path("manifests", name, "state.json")
        if path in present:
            content = state_of(connection, name)
            if blobs.read(path) != content:
                blobs.write(path, content)


def verify(place: Place, catalogue: Catalogue) -> Verified:
    """Read every byte of every version and check it. A damaged library is reported, not raised."""
    blobs, problems = place.blobs, catalogue.problems()
    with catalogue.read() as connection:
        versions = queries.listed_versions(connection)
        rows = connection.execute(select(t.files.c.blob, t.files.c.name, t.files.c.version, t.files.c.bytes)).all()
        spare_blobs, spare_records = orphans(blobs, connection)
        for alias in queries.aliases(connection):
            if queries.numbered(connection, alias.name, alias.version) is None:
                problems.append(f"{alias.name}@{alias.alias} points to version {alias.version}, which is not there")
    problems += [problem for version in versions for problem in _manifest_problems(blobs, version)]
    users: dict[str, list[str]] = {}
    for row in rows:
        users.setdefault(row.blob, []).append(f"{row.name}@{row.version}")
    total = 0
    for blob, refs in sorted(users.items()):
        try:
            total += blobs.check(blob)
        except VeneerError as error:
            problems.append(f"{', '.join(refs[:3])}: {error.message}")
    leftovers = len(blobs.abandoned())
    return Verified(
        len(versions), len(users), total, tuple(problems), len(spare_blobs) + len(spare_records) + leftovers
    )


def _manifest_problems(blobs: Blobs, version: Version) -> list[str]:
    path = blobs.path("manifests", version.name, f"{version.version}.json")
    try:
        found, _ = read_manifest(blobs.read(path), path)
    except VeneerError as error:
        return [f"{version.ref}: {error.message}"]
    return [] if found == version else [f"{version.ref}: the manifest and the catalogue differ"]


def rebuild(place: Place) -> Rebuilt:
    """A new catalogue from the records beside the blobs. A damaged one is set aside; a sound one is refused."""
    blobs = place.blobs
    records = blobs.files("manifests")
    if not records:
        raise NotFound(f"there is nothing to rebuild from at {blobs.root}", help="no manifest is there; check the path")
    left_out = [f"the damaged catalogue was kept as {name}" for name in place.set_aside_damaged()]
    path = sqlite_path(place.database)
    if path is None:
        catalogue = Catalogue(place.database)
        catalogue.upgrade()
        result = _fill(blobs, catalogue, sorted(records), left_out)
        catalogue.close()
        return result
    with blobs.staging() as folder:
        aside = new_sqlite(folder)
        result = _fill(blobs, aside, sorted(records), left_out)
        aside.close()
        place_new(place.database, folder / FILE)
    return result


def _fill(blobs: Blobs, catalogue: Catalogue, records: Sequence[str], left_out: list[str]) -> Rebuilt:
    with catalogue.write() as connection:
        states = [path for path in records if os.path.basename(path) == "state.json"]
        versions = 0
        for path in records:
            if os.path.basename(path).removesuffix(".json").isdecimal():
                versions += _restore(blobs, connection, path, left_out)
        aliases = sum(_restore_state(blobs, connection, path, left_out) for path in states)
        # A revision that no earlier catalogue of this library can have shown, so that servers notice the change.
        connection.execute(update(t.library).values(revision=t.library.c.revision + (1 << 32)))
    return Rebuilt(versions, aliases, tuple(left_out))


def _restore(blobs: Blobs, connection: Connection, path: str, left_out: list[str]) -> int:
    """Insert the version that a manifest describes; 1, or 0 where it had to be left out."""
    try:
        version, manifest = read_manifest(blobs.read(path), path)
        if path != blobs.path("manifests", version.name, f"{version.version}.json"):
            raise FormatError(f"{path} is the manifest of {version.ref}, in the wrong place")
        files = files_of(manifest)
        missing = [f.path for f in files if blobs.size(blobs.blob_path(f.blob)) != f.bytes]
        if missing:
            raise FormatError(f"{version.ref} has lost {', '.join(missing)}")
        parents = [parent for parent in manifest["parents"] if DIGEST.fullmatch(parent)]
        metrics = check_metrics(_metrics(blobs, path, manifest))
    except (KeyError, TypeError, VeneerError) as error:
        left_out.append(error.message if isinstance(error, VeneerError) else f"{path} is not a manifest: {error}")
        return 0
    number = queries.next_version(connection, version.name)
    queries.insert_version(connection, version, files, parents, metrics)
    queries.set_next_version(connection, version.name, max(number, version.version + 1))
    return 1


def _metrics(blobs: Blobs, path: str, manifest: dict[str, Any]) -> dict[str, float]:
    """What was recorded later, else what the manifest says."""
    later = path.removesuffix(".json") + ".metrics.json"
    if blobs.size(later) is None:
        found: dict[str, float] = manifest["metrics"]
        return found
    recorded: dict[str, float] = unseal(blobs.read(later), later)["metrics"]
    return recorded


def _restore_state(blobs: Blobs, connection: Connection, path: str, left_out: list[str]) -> int:
    """Bring back a name's aliases, demands and history; the count of aliases."""
    try:
        state = unseal(blobs.read(path), path)
        name = check_name(state["name"])
        number = queries.next_version(connection, name)
        queries.set_next_version(connection, name, max(number, int(state["next"])))
        for row in state["demands"]:
            Demand(row["metric"], row["better"], row["margin"])
            connection.execute(t.demands.insert(), {**row, "name": name, "alias": check_alias(row["alias"])})
        kept = {(row["alias"], row["number"]) for row in state["moves"]}
        for row in state["moves"]:
            before = row["before"] if (row["alias"], row["before"]) in kept else None
            connection.execute(t.moves.insert(), {**row, "name": name, "before": before})
        return sum(_restore_alias(connection, name, row, left_out) for row in state["aliases"])
    except (KeyError, TypeError, ValueError) as error:  # VeneerErrors about content are ValueErrors
        left_out.append(error.message if isinstance(error, VeneerError) else f"{path} is not a state record: {error}")
        return 0


def _restore_alias(connection: Connection, name: str, row: dict[str, Any], left_out: list[str]) -> int:
    alias = check_alias(row["alias"])
    if queries.numbered(connection, name, row["version"]) is None:
        left_out.append(f"{name}@{alias} pointed to version {row['version']}, which is not there")
        return 0
    connection.execute(t.aliases.insert(), {**row, "name": name, "alias": alias})
    return 1


def remove_records(blobs: Blobs, versions: Sequence[Version]) -> None:
    """Delete the records of versions that the catalogue has forgotten. Their blobs are for `gc`."""
    for version in versions:
        for ending in ("json", "metrics.json"):
            blobs.delete(blobs.path("manifests", version.name, f"{version.version}.{ending}"))
