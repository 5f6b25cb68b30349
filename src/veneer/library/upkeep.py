"""Keeping a library whole: delete what nothing needs, read every byte, and make a lost catalogue again.

`gc` holds the write lock, and writers publish files under it, so nothing that is being added is ever taken for an orphan.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select, update

from veneer.errors import ConfigError, FormatError, NotFound, VeneerError
from veneer.library import queries
from veneer.library import tables as t
from veneer.library.aliases import state_of
from veneer.library.blobs import Blobs
from veneer.library.catalogue import Catalogue, place_new, sqlite_path
from veneer.library.manifest import Manifest, Measured, State, unseal
from veneer.library.place import FILE, Place, discard, new_sqlite
from veneer.library.records import Collected, Rebuilt, Verified, Version
from veneer.library.resolve import parse_reference
from veneer.library.source import is_needed

_UNKNOWN = (
    "`gc` keeps what there is of it; put its files back and rebuild, or let it go with `veneer library gc --unknown`"
)


@dataclass(frozen=True)
class Spare:
    """Files that no version needs: path -> bytes; and the versions that the catalogue doesn't know and a manifest names."""

    blobs: Mapping[str, int]
    records: Mapping[str, int]
    unknown: tuple[str, ...]


def gc(place: Place, catalogue: Catalogue, *, dry_run: bool = False, unknown: bool = False) -> Collected:
    """Delete blobs and records that no version needs and folders of killed writers; refresh state records."""
    blobs = place.blobs
    with catalogue.write() as connection:
        spare = spare_files(blobs, connection, unknown=unknown)
        leftovers = blobs.abandoned()
        if not dry_run:
            for path in (*spare.blobs, *spare.records):
                blobs.delete(path)
            for folder in leftovers:
                discard(folder)
            _refresh_states(blobs, connection)
    freed = sum(spare.blobs.values()) + sum(spare.records.values())
    return Collected(len(spare.blobs), len(spare.records), len(leftovers), freed, spare.unknown)


def spare_files(blobs: Blobs, connection: Connection, *, unknown: bool = False) -> Spare:
    """What the catalogue doesn't know.

    A version that `rebuild` left out is not spare, unless `unknown` ones are as well, and none of the blobs where its manifest is
    unreadable.
    """
    needed = set(connection.execute(select(t.files.c.blob).distinct()).scalars())
    c, n = t.versions.c, t.names.c
    following = {name: number for name, number in connection.execute(select(n.name, n.next))}
    known = {blobs.path("manifests", name, "state.json") for name in following}
    for name, version in connection.execute(select(c.name, c.version)):
        known.update(_records(blobs, name, version))
    records = blobs.files("manifests")
    kept = {} if unknown else _left_out(blobs, connection, [path for path in records if path not in known], following)
    for (name, version), manifest in kept.items():
        needed.update(file.blob for file in (manifest.files if manifest else ()))
        known.update(_records(blobs, name, version))
    stored = {} if None in kept.values() else blobs.files("blobs")  # what can't be read may need any of them
    return Spare(
        {path: size for path, size in stored.items() if os.path.basename(path) not in needed},
        {path: size for path, size in records.items() if path not in known},
        tuple(f"{name}@{version}" for name, version in kept),
    )


def _left_out(
    blobs: Blobs, connection: Connection, paths: Sequence[str], following: Mapping[str, int]
) -> dict[tuple[str, int], Manifest | None]:
    """Manifests among `paths` that a `rebuild` met, by name and number; None for one that can't be read, whatever its number.

    The catalogue has counted past their numbers. A killed writer's number is still to be given, and its manifest is whole; a
    removed one is known as such.
    """
    c = t.removed.c
    removed = {(name, version) for name, version in connection.execute(select(c.name, c.version))}
    found: dict[tuple[str, int], Manifest | None] = {}
    for path in paths:
        place = _numbered(blobs, path)
        if place is None or place in removed:
            continue
        try:
            manifest = _manifest_at(blobs, path)[0]
        except VeneerError:
            manifest = None
        if manifest is None or place[1] < following.get(place[0], 0):
            found[place] = manifest
    return found


def _records(blobs: Blobs, name: str, version: int) -> tuple[str, str]:
    """Where a version's records are: its manifest, and what was measured later."""
    return blobs.path("manifests", name, f"{version}.json"), blobs.path("manifests", name, f"{version}.metrics.json")


def _numbered(blobs: Blobs, path: str) -> tuple[str, int] | None:
    """Name and number of the version whose manifest belongs at `path`; None for any other file."""
    name, file = path.split("/")[-2:]
    try:
        number = parse_reference(f"{name}@{file.removesuffix('.json')}").version
    except ConfigError:
        return None
    return (name, number) if number is not None and path == _records(blobs, name, number)[0] else None


def _manifest_at(blobs: Blobs, path: str) -> tuple[Manifest, Version]:
    content = blobs.read(path)
    manifest = unseal(Manifest, content, path)
    version = manifest.describes(content)
    if path != _records(blobs, version.name, version.version)[0]:
        raise FormatError(f"{path} is the manifest of {version.ref}, in the wrong place")
    return manifest, version


def _refresh_states(blobs: Blobs, connection: Connection) -> None:
    """A writer killed between its state record and its commit leaves the record ahead of the catalogue.

    And removed versions are forgotten for good, once their records have gone.
    """
    present = blobs.files("manifests")
    c = t.removed.c
    for name, version in connection.execute(select(c.name, c.version)).all():
        if _records(blobs, name, version)[0] not in present:
            connection.execute(t.removed.delete().where(c.name == name, c.version == version))
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
        spare = spare_files(blobs, connection)
        problems += _dangling(connection)
        problems += _state_problems(blobs, {version.name for version in versions})
        problems += [f"{ref} is not in the catalogue: {_UNKNOWN}" for ref in spare.unknown]
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
    orphans = len(spare.blobs) + len(spare.records) + len(blobs.abandoned())
    return Verified(len(versions), len(users), total, tuple(problems), orphans)


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
    path, later = _records(blobs, version.name, version.version)
    try:
        found = _manifest_at(blobs, path)[1]
        if blobs.size(later) is not None:
            unseal(Measured, blobs.read(later), later)
    except VeneerError as error:
        return [f"{version.ref}: {error.message}"]
    return [] if found == version else [f"{version.ref}: the manifest and the catalogue differ"]


def _state_problems(blobs: Blobs, names: Iterable[str]) -> list[str]:
    problems: list[str] = []
    for path in (blobs.path("manifests", name, "state.json") for name in sorted(names)):
        try:
            if blobs.size(path) is not None:
                unseal(State, blobs.read(path), path)
        except VeneerError as error:
            problems.append(f"{error.message}; `veneer library gc` writes it again")
    return problems


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
        place_new(path, folder / FILE)
    return result


def _fill(blobs: Blobs, catalogue: Catalogue, records: Sequence[str], left_out: list[str]) -> Rebuilt:
    found = [_read_state(blobs, path, left_out) for path in records if os.path.basename(path) == "state.json"]
    states = [state for state in found if state is not None]
    removed = {(state.name, number) for state in states for number in state.removed}
    with catalogue.write() as connection:
        versions = 0
        for path in records:
            place = _numbered(blobs, path)
            if place in removed:
                left_out.append(f"{path} is still there; its version was removed and stays so")
            elif place is not None:
                versions += _restore(blobs, connection, path, left_out)
                _count_past(connection, *place)
        aliases = sum(_restore_state(connection, state, left_out) for state in states)
        # A revision that no earlier catalogue of this library can have shown, so that servers notice the change.
        connection.execute(update(t.library).values(revision=t.library.c.revision + (1 << 32)))
    return Rebuilt(versions, aliases, tuple(left_out))


def _count_past(connection: Connection, name: str, number: int) -> None:
    """The next version of `name` gets a higher number than `number`, also where that one could not come back."""
    queries.set_next_version(connection, name, max(queries.next_version(connection, name), number + 1))


def _restore(blobs: Blobs, connection: Connection, path: str, left_out: list[str]) -> int:
    """Insert the version that a manifest describes; 1, or 0 where it had to be left out."""
    try:
        manifest, version = _manifest_at(blobs, path)
    except VeneerError as error:
        left_out.append(error.message)
        return 0
    files = manifest.listed()
    lost = [file for file in files if blobs.size(blobs.blob_path(file.blob)) != file.bytes]
    if lost:
        told = f"{version.ref} has lost {', '.join(file.path for file in lost)}"
        if any(is_needed(file.path) for file in lost):
            left_out.append(f"{told} and is left out; {_UNKNOWN}")
            return 0
        left_out.append(f"{told}; the adapter itself is whole")
    measured = _measured(blobs, manifest, left_out)
    queries.insert_version(connection, version, [f for f in files if f not in lost], manifest.parents, measured)
    return 1


def _measured(blobs: Blobs, manifest: Manifest, left_out: list[str]) -> Mapping[str, float]:
    """What was measured for a version; where the later record is damaged, what it was added with."""
    path = _records(blobs, manifest.name, manifest.version)[1]
    if blobs.size(path) is None:
        return manifest.metrics
    try:
        return unseal(Measured, blobs.read(path), path).metrics
    except VeneerError as error:
        ref = f"{manifest.name}@{manifest.version}"
        left_out.append(f"{error.message}; {ref} has the metrics it was added with: record the later ones again")
        return manifest.metrics


def _read_state(blobs: Blobs, path: str, left_out: list[str]) -> State | None:
    try:
        state = unseal(State, blobs.read(path), path)
        if path != blobs.path("manifests", state.name, "state.json"):
            raise FormatError(f"{path} is the state of '{state.name}', in the wrong place")
    except VeneerError as error:
        left_out.append(error.message)
        return None
    return state


def _restore_state(connection: Connection, state: State, left_out: list[str]) -> int:
    """Bring back a name's aliases, demands and history; the count of aliases."""
    name = state.name
    _count_past(connection, name, state.next - 1)
    kept = {(move.alias, move.number) for move in state.moves}
    moves = [m if (m.alias, m.before) in kept else m.model_copy(update={"before": None}) for m in state.moves]
    here = {version.version for version in queries.listed_versions(connection, name=name)}
    aliases = [alias for alias in state.aliases if alias.version in here]
    if state.removed:
        connection.execute(t.removed.insert(), [{"name": name, "version": number} for number in set(state.removed)])
    for table, rows in ((t.demands, state.demands), (t.moves, moves), (t.aliases, aliases)):
        if rows:
            connection.execute(table.insert(), [{"name": name, **row.model_dump()} for row in rows])
    lost = [alias for alias in state.aliases if alias.version not in here]
    left_out += [f"{name}@{a.alias} pointed to version {a.version}, which is not there" for a in lost]
    return len(aliases)


def remove_records(blobs: Blobs, versions: Sequence[Version]) -> None:
    """Delete the records of versions that the catalogue has forgotten. Their blobs are for `gc`."""
    for version in versions:
        for path in _records(blobs, version.name, version.version):
            blobs.delete(path)
