"""The library of adapters: every verb on one class, each one transaction.

Versions are numbered per name and never change; the same adapter added twice is the same version. Aliases move. The
catalogue is an index: blobs, manifests and state records on the file system are enough to make it again.

The order that makes a kill harmless: bytes are staged and flushed, then under the one write lock blobs are renamed
into place, the manifest is written, and the catalogue commits. A writer that dies anywhere leaves orphans for `gc`
and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from veneer.adapter import Adapter
from veneer.errors import ConfigError, Conflict, NotFound, VeneerError, listed
from veneer.files import replacing
from veneer.library import aliases as alias_moves
from veneer.library import queries, upkeep
from veneer.library import tables as t
from veneer.library.admission import belonging, check_parents, facts_of, story_of, unchanged
from veneer.library.blobs import writing
from veneer.library.catalogue import Catalogue
from veneer.library.difference import Difference, difference
from veneer.library.gate import Demand, check_metrics
from veneer.library.manifest import FileRecord, Manifest, Measured, seal, unseal
from veneer.library.place import find_place
from veneer.library.records import Added, Alias, Collected, File, Move, Rebuilt, Record, Removed, Verified, Version
from veneer.library.resolve import Reference, check_name, check_new_name, parse_reference
from veneer.library.source import Loralib, Staged, recognise, stage, written

if TYPE_CHECKING:
    from veneer.base.identity import KnownBase


def _now() -> datetime:
    return datetime.now(UTC)


class Library:
    """A library at a folder, or at `URL#DATABASE`. Opening it touches nothing; `add` makes it. It may be shared by threads."""

    def __init__(self, url: str | os.PathLike[str], *, clock: Callable[[], datetime] = _now) -> None:
        self.url = os.fspath(url)
        self._place = find_place(url)
        self._clock = clock
        self._open: Catalogue | None = None

    # Adding

    def add(
        self,
        source: str | os.PathLike[str] | Adapter,
        name: str,
        *,
        base: KnownBase | None = None,
        allow_base_mismatch: str | None = None,
        metrics: Mapping[str, float] | None = None,
        parents: Sequence[str] = (),
        loralib: Loralib | None = None,
        note: str = "",
    ) -> Added:
        """Add an adapter folder, run directory, loralib file or adapter as the next version of `name`.

        `base` is what it must belong to (BaseMismatch otherwise, unless `allow_base_mismatch` gives a reason). `parents` are
        references in this library, besides those the adapter names itself. An adapter that is there already keeps its version:
        the metrics are recorded for it, and `notes` says what else was given and isn't kept. With another chat template it is
        another version.
        """
        check_new_name(name)
        measured = check_metrics(metrics or {})
        ancestors = [parse_reference(parent) for parent in parents]
        with self._place.blobs.staging() as folder:
            found = written(source, folder) if isinstance(source, Adapter) else recognise(Path(source), folder, loralib)
            staged = stage(found, self._place.blobs, folder)
            verdict = belonging(staged.adapter, base, allow_base_mismatch)
            facts = {"name": name, **facts_of(staged, base, verdict), "created": self._at(), "source": found.kind}
            facts |= story_of(staged.adapter, verdict)
            facts |= {"run": found.facts, "metrics": {**found.metrics, **measured}, "note": note}
            return self._commit(staged, facts, ancestors, measured, found.notes)

    def _commit(
        self,
        staged: Staged,
        facts: dict[str, Any],
        ancestors: Sequence[Reference],
        measured: Mapping[str, float],
        notes: tuple[str, ...],
    ) -> Added:
        blobs, catalogue = self._place.blobs, self._catalogue(create=True)
        if not blobs.is_local:
            _published(self, staged)  # a slow upload, before the lock
        with catalogue.write() as connection:
            lineage = [queries.find(connection, reference).digest for reference in ancestors]
            lineage = list(dict.fromkeys([*check_parents(staged.adapter), *lineage]))
            same = self._same(connection, facts)
            if same is not None:
                self._heal(connection, same[0], staged)
                told = self._again(connection, *same, staged, facts, lineage, measured)
                return Added(same[0], False, (*told, *notes))
            number = queries.next_version(connection, facts["name"])
            listed = tuple(FileRecord(path=f.path, blob=f.blob, bytes=f.bytes) for f in staged.files)
            manifest = Manifest(**facts, version=number, files=listed, parents=tuple(lineage))
            content = seal(manifest)
            version = manifest.describes(content)
            published = _published(self, staged)  # after a slow upload gc may have come, so this looks again
            record = blobs.path("manifests", version.name, f"{number}.json")
            blobs.write(record, content, durable=False)
            blobs.settle([record, *published])
            queries.insert_version(connection, version, staged.files, lineage, manifest.metrics)
            queries.set_next_version(connection, version.name, number + 1)
        return Added(version, True, notes)

    def _same(self, connection: Connection, facts: Mapping[str, Any]) -> tuple[Version, Manifest | None] | None:
        """The version that has the digest, and the chat template, which the digest doesn't cover.

        A damaged manifest can't say its template: that version is taken for the same if no other is.
        """
        damaged = None
        for version in queries.with_digest(connection, facts["name"], facts["digest"]):
            try:
                manifest = self._manifest(version)
            except VeneerError:
                damaged = version, None
                continue
            if manifest.provenance.get("chat_template") == facts["provenance"].get("chat_template"):
                return version, manifest
        return damaged

    def _again(
        self,
        connection: Connection,
        there: Version,
        manifest: Manifest | None,
        staged: Staged,
        facts: Mapping[str, Any],
        lineage: Sequence[str],
        measured: Mapping[str, float],
    ) -> tuple[str, ...]:
        """Keep what may change about a version that was added again: metrics. The notes name them, and what isn't kept.

        What a run measured for itself fills gaps only: a later measurement is not taken back.
        """
        before = queries.metrics(connection, there)
        after = {**facts["metrics"], **before, **measured}
        fresh = [metric for metric in after if after[metric] != before.get(metric)]
        if fresh:
            self._measure(connection, there, after)
        kept = {(file.path, file.blob) for file in queries.files(connection, there)}
        known = queries.parents(connection, there)
        dropped = [f"the parent {parent[:12]}" for parent in lineage if parent not in known]
        if facts["note"] and (manifest is None or manifest.note != facts["note"]):
            dropped.append("the note")
        dropped += [file.path for file in staged.files if (file.path, file.blob) not in kept]
        told = unchanged(there, facts, dropped)
        return (*told, f"recorded for it: {', '.join(fresh)}") if fresh else told

    def _heal(self, connection: Connection, version: Version, staged: Staged) -> None:
        """Put back blobs of a version that have gone or rotted, where the same bytes were just given again."""
        blobs = self._place.blobs
        known = {file.blob for file in queries.files(connection, version)}
        for file in staged.files:
            if file.blob in known and not blobs.is_intact(file.blob):
                blobs.delete(blobs.blob_path(file.blob))
                healed = blobs.publish(staged.paths[file.path], file.blob)
                blobs.settle([healed] if healed else [])

    def record(self, ref: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Record what was measured for a version, for gates to look at. A metric measured again takes the new value."""
        values = check_metrics(metrics)
        with self._catalogue().write() as connection:
            return self._measure(connection, queries.find(connection, parse_reference(ref)), values)

    def _measure(self, connection: Connection, version: Version, values: Mapping[str, float]) -> dict[str, float]:
        queries.put_metrics(connection, version, values)
        every = queries.metrics(connection, version)
        path = self._place.blobs.path("manifests", version.name, f"{version.version}.metrics.json")
        self._place.blobs.write(path, seal(Measured(metrics=every)))
        return every

    # Asking

    def revision(self) -> int:
        """A number that grows with every change: cheap to poll. NotFound where there is no library."""
        return self._catalogue().revision()

    def stock(self) -> tuple[int, int]:
        """Adapters kept here, each content counted once, and their bytes."""
        with self._catalogue().read() as connection:
            return queries.stock(connection)

    def resolve(self, ref: str) -> Version:
        """The version that `name`, `name@version` or `name@alias` means now; NotFound says what there is instead.

        A bare name means its production alias; without one, its newest version.
        """
        reference = parse_reference(ref)
        with self._catalogue().read() as connection:
            return queries.find(connection, reference)

    def list(
        self,
        name: str | None = None,
        *,
        base: str | None = None,
        method: str | None = None,
        alias: str | None = None,
        newest: bool = False,
        current: bool = False,
        limit: int | None = None,
    ) -> tuple[Version, ...]:
        """Versions by name and number. `name` may hold `*`; `base` is a name or the start of an identity.

        `newest` keeps the last version of each name, `current` what each bare name means (one query for all names).
        """
        with self._catalogue().read() as connection:
            return queries.listed_versions(
                connection,
                name=name,
                base=base,
                method=method,
                alias=alias,
                newest_only=newest,
                current=current,
                limit=limit,
            )

    def show(self, ref: str) -> Record:
        """Everything about one version."""
        with self._catalogue().read() as connection:
            version = queries.find(connection, parse_reference(ref))
            files = queries.files(connection, version)
            parents = queries.parents(connection, version)
            children = tuple(queries.children(connection, [version.digest]))
            pointing = tuple(a for a in queries.aliases(connection, version.name) if a.version == version.version)
            metrics = queries.metrics(connection, version)
        manifest = self._manifest(version)
        told = {"belonging": manifest.belonging, "run": manifest.run, "note": manifest.note}
        provenance = {**manifest.provenance, **{key: value for key, value in told.items() if value}}
        return Record(version, files, manifest.spec, provenance, parents, children, pointing, metrics)

    def _manifest(self, version: Version) -> Manifest:
        path = self._place.blobs.path("manifests", version.name, f"{version.version}.json")
        return unseal(Manifest, self._place.blobs.read(path), path)

    def aliases(self, name: str | None = None) -> tuple[Alias, ...]:
        """The aliases of one name, or of all."""
        with self._catalogue().read() as connection:
            return queries.aliases(connection, name if name is None else check_name(name))

    def history(self, name: str, alias: str | None = None) -> tuple[Move, ...]:
        """Every move of a name's aliases, oldest first."""
        with self._catalogue().read() as connection:
            return queries.moves(connection, check_name(name), alias)

    def demands(self, name: str, alias: str) -> tuple[Demand, ...]:
        """What an alias demands of a version that takes it."""
        with self._catalogue().read() as connection:
            return queries.demands(connection, check_name(name), alias)

    def diff(self, one: str, other: str) -> Difference:
        """Two versions side by side: configuration, and the spectrum of each target's update."""
        return difference(self.load(self.resolve(one)), self.load(self.resolve(other)))

    # Reading

    def load(self, version: Version | str) -> Adapter:
        """The adapter itself, every byte checked.

        A local library's blobs never change, so the tensors are mapped and not copied. A remote one's are downloaded. What hashes
        to its name was looked through when it was added, digest and all, so that is not done again.
        """
        from veneer.formats import load

        found = self._version(version)
        files, blobs = self._adapter_files(found), self._place.blobs
        place = blobs.link if blobs.is_local else blobs.copy_out
        with blobs.scratch() as folder:
            for path, blob in files:
                place(blob, folder / path)
            return load(folder, mapped=True, digest=found.digest)

    def checkout(self, version: Version | str, out: str | os.PathLike[str]) -> Path:
        """Write the version's adapter folder at `out`, byte for byte as it was added. `out` must not exist."""
        out = Path(out)
        if out.exists():
            raise Conflict(f"{out} exists", help="choose a new folder")
        files = self._adapter_files(self._version(version))
        with writing(str(out)), replacing(out) as beside:
            beside.mkdir()
            for path, blob in files:
                self._place.blobs.copy_out(blob, beside / path)
        return out

    def _version(self, version: Version | str) -> Version:
        return version if isinstance(version, Version) else self.resolve(version)

    def _adapter_files(self, found: Version) -> tuple[tuple[str, str], ...]:
        with self._catalogue().read() as connection:
            files: tuple[File, ...] = queries.files(connection, found)
        if not files:
            raise NotFound(f"{found.ref} is not in the library any more", help="`veneer library list` shows what is")
        return tuple((file.path, file.blob) for file in files if "/" not in file.path)

    # Moving aliases

    def alias(
        self,
        ref: str,
        alias: str,
        *,
        weight: float | None = None,
        demands: Sequence[Demand] | None = None,
        force: str | None = None,
        reason: str = "",
    ) -> Alias:
        """Point `alias` at the version `ref` names, at once or not at all.

        `weight` is the share of the bare name's traffic that an alias besides production takes. `demands` replaces what the
        alias demands, beginning with this move; a failed demand is a Conflict and changes nothing. `force` is a reason to move
        all the same, and is recorded.
        """
        reference = parse_reference(ref)
        if reference.version is None and reference.alias is None:
            raise ConfigError(f"which version of '{ref}' should become {alias}?", help=f"name it: {ref}@VERSION")
        with self._catalogue().write() as connection:
            version = queries.find(connection, reference)
            if demands is not None:
                alias_moves.set_demands(connection, version.name, alias, demands)
            moved = alias_moves.move(
                connection, version, alias, at=self._at(), weight=weight, force=force, reason=reason
            )
            alias_moves.write_state(self._place.blobs, connection, version.name)
        return moved

    def rollback(self, name: str, alias: str = "production", *, reason: str = "") -> Alias:
        """Point an alias at what it pointed to before its last move; again, one move further."""
        with self._catalogue().write() as connection:
            moved = alias_moves.rollback(connection, check_name(name), alias, at=self._at(), reason=reason)
            alias_moves.write_state(self._place.blobs, connection, name)
        return moved

    def unalias(self, name: str, alias: str, *, reason: str = "") -> Alias:
        """Take an alias away. Its history and demands stay; `rollback` brings it back."""
        with self._catalogue().write() as connection:
            dropped = alias_moves.drop(connection, check_name(name), alias, at=self._at(), reason=reason)
            alias_moves.write_state(self._place.blobs, connection, name)
        return dropped

    # Removing and keeping whole

    def remove(self, ref: str, *, force: bool = False) -> Removed:
        """Forget a version, or with a bare name all of them. Conflict while an alias or a descendant needs one, unless forced.

        The bytes stay until `gc`. A number is never used again.
        """
        reference = parse_reference(ref)
        if reference.alias is not None:
            raise ConfigError(
                f"'{ref}' is an alias", help=f"name the version to remove, or drop the alias of '{reference.name}'"
            )
        with self._catalogue().write() as connection:
            first = queries.find(connection, reference)
            gone = (first,) if reference.version else queries.listed_versions(connection, name=reference.name)
            pointing = [a for a in queries.aliases(connection, first.name) if a.version in {v.version for v in gone}]
            reasons = [f"the alias {a.name}@{a.alias} points to {a.ref}" for a in pointing] + _descendants(
                connection, gone
            )
            if reasons and not force:
                raise Conflict(
                    f"'{ref}' is needed:\n{listed(reasons)}",
                    help="move the aliases first, or --force (aliases go with it)",
                )
            for alias in pointing:
                alias_moves.drop(connection, alias.name, alias.alias, at=self._at(), reason=f"removed {alias.ref}")
            for version in gone:
                queries.delete_version(connection, version)
            alias_moves.write_state(self._place.blobs, connection, first.name)
        upkeep.remove_records(self._place.blobs, gone)
        return Removed(tuple(v.ref for v in gone), tuple(f"{a.name}@{a.alias}" for a in pointing))

    def gc(self, *, dry_run: bool = False, unknown: bool = False) -> Collected:
        """Delete what no version needs. `unknown` versions, which `rebuild` had to leave out, are kept unless asked for."""
        return upkeep.gc(self._place, self._catalogue(), dry_run=dry_run, unknown=unknown)

    def verify(self) -> Verified:
        """Read and check every byte."""
        return upkeep.verify(self._place, self._catalogue())

    def rebuild(self) -> Rebuilt:
        """Make a lost or damaged catalogue again from the manifests. What was damaged is kept beside it."""
        self.close()
        return upkeep.rebuild(self._place)

    def close(self) -> None:
        """Let go of the catalogue; the next verb opens it again."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _catalogue(self, *, create: bool = False) -> Catalogue:
        if self._open is None:
            self._open = self._place.open(create=create)
        return self._open

    def _at(self) -> str:
        return self._clock().isoformat(timespec="milliseconds")


def _published(library: Library, staged: Staged) -> list[str]:
    """Make blobs of what was staged; the paths that are to be flushed."""
    paths = (library._place.blobs.publish(staged.paths[file.path], file.blob) for file in staged.files)
    return [path for path in paths if path is not None]


def _descendants(connection: Connection, gone: Sequence[Version]) -> list[str]:
    """Why versions made from `gone` need it; a copy of the parent under another name is as good."""
    refs = {version.ref for version in gone}
    copies = {
        version.digest
        for version in gone
        for other in connection.execute(t.versions.select().where(t.versions.c.digest == version.digest)).all()
        if f"{other.name}@{other.version}" not in refs
    }
    found = queries.children(connection, [version.digest for version in gone])
    return [
        f"{child} was made from it" for child, digest in found.items() if child not in refs and digest not in copies
    ]
