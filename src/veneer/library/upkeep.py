"""Keeping a library whole: delete what nothing needs, read every byte, and make a lost catalogue again.

`gc` holds the write lock, and writers publish files under it, so nothing that is being added is ever taken for an orphan.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from sqlalchemy import Connection, select, update

from veneer.errors import FormatError, NotFound, VeneerError
from veneer.library import queries
from veneer.library import tables as t
from veneer.library.aliases import state_of
from veneer.library.blobs import Blobs
from veneer.library.catalogue import Catalogue, place_new, sqlite_path
from veneer.library.manifest import Manifest, Measured, State, unseal
from veneer.library.place import FILE, Place, discard, new_sqlite
from veneer.library.records import Collected, Rebuilt, Verified, Version


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
        spare_blobs, spare_records = orphans(blobs, connection)
        problems += _dangling(connection)
        users = _users(connection)
    found = [(version, problem) for version in versions for problem in _manifest_problems(blobs, version)]
    total = 0
    for blob, refs in sorted(users.items()):
        try:
            total += blobs.check(blob)
        except VeneerError as error:
            found += [(version, f"{version.ref}: {error.message}") for version in versions if version.ref in refs]
    with catalogue.read() as connection:  # what was removed while this was reading has no problems
        problems += [text for version, text in found if queries.numbered(connection, version.name, version.version)]
    spare = len(spare_blobs) + len(spare_records) + len(blobs.abandoned())
    return Verified(len(versions), len(users), total, tuple(problems), spare)


def _users(connection: Connection) -> dict[str, set[str]]:
    """Blob -> the versions that need it."""
    users: dict[str, set[str]] = {}
    for row in connection.execute(select(t.files.c.blob, t.files.c.name, t.files.c.version)):
        users.setdefault(row.blob, set()).add(f"{row.name}@{row.version}")
    return users


def _dangling(connection: Connection) -> list[str]:
    return [
        f"{alias.name}@{alias.alias} points to version {alias.version}, which is not there"
        for alias in queries.aliases(connection)
        if queries.numbered(connection, alias.name, alias.version) is None
    ]


def _manifest_problems(blobs: Blobs, version: Version) -> list[str]:
    path = blobs.path("manifests", version.name, f"{version.version}.json")
    try:
        content = blobs.read(path)
        found = unseal(Manifest, content, path).describes(content)
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
        content = blobs.read(path)
        manifest = unseal(Manifest, content, path)
        version, files = manifest.describes(content), manifest.listed()
        if path != blobs.path("manifests", version.name, f"{version.version}.json"):
            raise FormatError(f"{path} is the manifest of {version.ref}, in the wrong place")
        missing = [f.path for f in files if blobs.size(blobs.blob_path(f.blob)) != f.bytes]
        if missing:
            raise FormatError(f"{version.ref} has lost {', '.join(missing)}")
        later = path.removesuffix(".json") + ".metrics.json"
        measured = manifest if blobs.size(later) is None else unseal(Measured, blobs.read(later), later)
    except VeneerError as error:
        left_out.append(error.message)
        return 0
    number = queries.next_version(connection, version.name)
    queries.insert_version(connection, version, files, manifest.parents, measured.metrics)
    queries.set_next_version(connection, version.name, max(number, version.version + 1))
    return 1


def _restore_state(blobs: Blobs, connection: Connection, path: str, left_out: list[str]) -> int:
    """Bring back a name's aliases, demands and history; the count of aliases."""
    try:
        state = unseal(State, blobs.read(path), path)
        if path != blobs.path("manifests", state.name, "state.json"):
            raise FormatError(f"{path} is the state of '{state.name}', in the wrong place")
    except VeneerError as error:
        left_out.append(error.message)
        return 0
    name = state.name
    number = queries.next_version(connection, name)
    queries.set_next_version(connection, name, max(number, state.next))
    kept = {(move.alias, move.number) for move in state.moves}
    moves = [m if (m.alias, m.before) in kept else m.model_copy(update={"before": None}) for m in state.moves]
    here = {version.version for version in queries.listed_versions(connection, name=name)}
    aliases = [alias for alias in state.aliases if alias.version in here]
    for table, rows in ((t.demands, state.demands), (t.moves, moves), (t.aliases, aliases)):
        if rows:
            connection.execute(table.insert(), [{"name": name, **row.model_dump()} for row in rows])
    lost = [alias for alias in state.aliases if alias.version not in here]
    left_out += [f"{name}@{a.alias} pointed to version {a.version}, which is not there" for a in lost]
    return len(aliases)


def remove_records(blobs: Blobs, versions: Sequence[Version]) -> None:
    """Delete the records of versions that the catalogue has forgotten. Their blobs are for `gc`."""
    for version in versions:
        for ending in ("json", "metrics.json"):
            blobs.delete(blobs.path("manifests", version.name, f"{version.version}.{ending}"))
