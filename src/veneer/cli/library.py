"""Keep adapters: versions that never change, aliases that move and roll back, a gate before they move.

    veneer library add runs/tickets --name tickets --base smollm2-135m
    veneer library alias tickets@1 production
    veneer library list

An adapter is called NAME, NAME@VERSION or NAME@ALIAS; a bare NAME is its production alias, or its newest version without one.
Every verb takes --library: a folder (default: library, or $VENEER_LIBRARY), or URL#DATABASE for a shared store.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli._card import Licence, story_of_record
from veneer.cli._library_text import alias_text, base_text, fields, say_difference, say_record, share_text
from veneer.cli._options import Json
from veneer.cli._output import bytes_text, count_text, note, say, say_json, say_table
from veneer.errors import ConfigError, NotFound, VeneerError

if TYPE_CHECKING:
    from veneer.library import Alias, Library, Loralib

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Place = Annotated[
    str, typer.Option("--library", metavar="DIR-or-URL", envvar="VENEER_LIBRARY", help="Where the library is.")
]
Ref = Annotated[str, typer.Argument(metavar="REF", help="NAME, NAME@VERSION or NAME@ALIAS.")]
Metrics = Annotated[list[str] | None, typer.Option("--metric", metavar="NAME=VALUE", help="What was measured.")]
MetricsFile = Annotated[Path | None, typer.Option("--metrics", help="What `veneer eval --json` printed.")]
DEFAULT = "library"


@app.command(epilog="Example: veneer library add runs/tickets --name tickets --base smollm2-135m")
def add(
    path: Annotated[Path, typer.Argument(help="A run directory, an adapter folder, or a loralib .safetensors file.")],
    name: Annotated[str, typer.Option("--name", help="What the adapter is called in the library.")],
    base: Annotated[str | None, typer.Option("--base", metavar="BASE", help="The base it must belong to.")] = None,
    library: Place = DEFAULT,
    alias: Annotated[str | None, typer.Option("--alias", help="Point this alias at it.")] = None,
    metric: Metrics = None,
    metrics: MetricsFile = None,
    parent: Annotated[list[str] | None, typer.Option("--parent", metavar="REF", help="Made from this one.")] = None,
    note_text: Annotated[str, typer.Option("--note", help="A remark that stays with the version.")] = "",
    allow_base_mismatch: Annotated[
        str | None, typer.Option(metavar="REASON", help="Take an adapter of another base; the reason is recorded.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The rank that a loralib file must have.")] = None,
    alpha: Annotated[float | None, typer.Option(help="The alpha of a loralib file.")] = None,
    as_json: Json = False,
) -> None:
    """Add an adapter as the next version of a name. The same adapter again is the same version; its metrics are recorded."""
    shelf = _library(library)
    if alias is not None:
        from veneer.library.resolve import check_alias

        check_alias(alias)
    measured = _metrics(metric, metrics, name)
    known = None
    if base is not None:
        from veneer.models.load import load_base

        known = load_base(base)
    added = shelf.add(
        path,
        name,
        base=known,
        allow_base_mismatch=allow_base_mismatch,
        metrics=measured,
        parents=tuple(parent or ()),
        loralib=_loralib(rank, alpha),
        note=note_text,
    )
    moved = _moved(shelf, added.version.ref, alias) if alias is not None else None
    if as_json:
        say_json({**fields(added.version), "new": added.new, "notes": added.notes, "alias": moved and asdict(moved)})
        return
    for line in added.notes:
        note(line)
    if added.new:
        version = added.version
        say(f"added {version.ref}: {version.method}, {bytes_text(version.bytes)}, base {base_text(version)}")
    if moved is not None:
        say(f"{moved.name}@{moved.alias} is {moved.ref}")


def _moved(shelf: Library, ref: str, alias: str) -> Alias:
    try:
        return shelf.alias(ref, alias)
    except VeneerError as error:
        raise type(error)(f"{ref} is in the library, but not '{alias}': {error.message}", help=error.help) from error


@app.command("list", epilog="Example: veneer library list 'tickets*' --newest")
def list_versions(
    name: Annotated[str | None, typer.Argument(help="A name; * stands for anything.")] = None,
    library: Place = DEFAULT,
    base: Annotated[str | None, typer.Option("--base", help="A base's name, or the start of its identity.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="A method's kind.")] = None,
    alias: Annotated[str | None, typer.Option("--alias", help="Only what this alias points to.")] = None,
    newest: Annotated[bool, typer.Option("--newest", help="Only the newest version of each name.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many.")] = None,
    as_json: Json = False,
) -> None:
    """List versions, with the aliases that point to them."""
    shelf = _library(library)
    versions = shelf.list(name, base=base, method=method, alias=alias, newest=newest, limit=limit)
    pointing: dict[str, list[Alias]] = {}
    for one in shelf.aliases():
        pointing.setdefault(one.ref, []).append(one)
    if as_json:
        say_json([{**fields(v), "aliases": [a.alias for a in pointing.get(v.ref, [])]} for v in versions])
        return
    rows = [
        (
            v.ref,
            ", ".join(alias_text(a) for a in pointing.get(v.ref, [])),
            v.method,
            str(v.rank or ""),
            count_text(v.parameters),
            bytes_text(v.bytes),
            base_text(v),
            v.created[:10],
            v.digest[:12],
        )
        for v in versions
    ]
    say_table(("version", "aliases", "method", "rank", "parameters", "size", "base", "added", "digest"), rows)
    say(f"{len(versions)} versions")


@app.command(epilog="Example: veneer library show tickets@production")
def show(ref: Ref, library: Place = DEFAULT, as_json: Json = False) -> None:
    """Show one version: files, configuration, lineage, metrics, history of its name."""
    shelf = _library(library)
    record = shelf.show(ref)
    moves = shelf.history(record.version.name)
    if as_json:
        say_json({**fields(record.version), **{k: v for k, v in asdict(record).items() if k != "version"},
                  "history": [asdict(move) for move in moves]})  # fmt: skip
        return
    say_record(record)
    if moves:
        rows = [(m.alias, str(m.version or "-"), f"{m.weight:g}", m.at[:19], m.reason) for m in moves[-20:]]
        say_table(("alias", "version", "weight", "moved", "why"), rows, title="history")


@app.command(epilog="Example: veneer library diff tickets@1 tickets@2")
def diff(
    one: Ref,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="What to compare it with.")],
    library: Place = DEFAULT,
    as_json: Json = False,
) -> None:
    """Compare two versions: configuration, and the spectrum of each target's update."""
    found = _library(library).diff(one, other)
    if as_json:
        say_json(asdict(found))
        return
    say_difference(found, one, other)


@app.command(epilog="Example: veneer library alias tickets@2 production --demand general_loss=0.02")
def alias(
    ref: Ref,
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="production, canary, ...")],
    library: Place = DEFAULT,
    weight: Annotated[
        float | None, typer.Option(help="Share of the bare name's requests, for aliases besides production.")
    ] = None,
    demand: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC[:lower|higher][=MARGIN]", help="What the alias demands from now on; repeat it."),
    ] = None,
    no_demands: Annotated[bool, typer.Option("--no-demands", help="Demand nothing from now on.")] = False,
    force: Annotated[str | None, typer.Option(metavar="REASON", help="Move against a failed demand; recorded.")] = None,
    reason: Annotated[str, typer.Option(help="A remark for the history.")] = "",
    drop: Annotated[bool, typer.Option("--drop", help="Take the alias away from NAME instead.")] = False,
    as_json: Json = False,
) -> None:
    """Point an alias at a version, if what it demands is met."""
    from veneer.library import Demand, parse_reference

    shelf = _library(library)
    if drop:
        moved = shelf.unalias(parse_reference(ref).name, name, reason=reason)
    else:
        demands = [Demand.parse(text) for text in demand or ()] if demand or no_demands else None
        moved = shelf.alias(ref, name, weight=weight, demands=demands, force=force, reason=reason)
    if as_json:
        say_json({**asdict(moved), "dropped": drop})
        return
    say(
        f"{moved.name}@{moved.alias} is gone"
        if drop
        else f"{moved.name}@{moved.alias} is {moved.ref}{share_text(moved)}"
    )


@app.command(epilog="Example: veneer library rollback tickets")
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME[@ALIAS]", help="Whose alias to move back.")],
    alias: Annotated[str | None, typer.Argument(metavar="ALIAS", help="production, if not given.")] = None,
    library: Place = DEFAULT,
    reason: Annotated[str, typer.Option(help="A remark for the history.")] = "",
    as_json: Json = False,
) -> None:
    """Point an alias at what it pointed to before; again, one move further back."""
    from veneer.library import parse_reference

    reference = parse_reference(name)
    moved = _library(library).rollback(reference.name, alias or reference.alias or "production", reason=reason)
    if as_json:
        say_json(asdict(moved))
        return
    say(f"{moved.name}@{moved.alias} is {moved.ref}{share_text(moved)}")


@app.command(epilog="Example: veneer library record tickets@2 --metric general_loss=2.31")
def record(
    ref: Ref, library: Place = DEFAULT, metric: Metrics = None, metrics: MetricsFile = None, as_json: Json = False
) -> None:
    """Record what was measured for a version, for the demands of aliases to look at."""
    from veneer.library import parse_reference

    values = _metrics(metric, metrics, parse_reference(ref).name)
    if not values:
        raise ConfigError("nothing to record", help="--metric general_loss=2.31, or --metrics eval.json")
    every = _library(library).record(ref, values)
    if as_json:
        say_json(every)
        return
    say_table(("metric", "value"), [(key, f"{value:.6g}") for key, value in every.items()])


@app.command(epilog="Example: veneer library get tickets@2 --out adapters/tickets")
def get(
    ref: Ref,
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    library: Place = DEFAULT,
    as_json: Json = False,
) -> None:
    """Write a version's adapter folder, byte for byte as it was added."""
    shelf = _library(library)
    version = shelf.resolve(ref)
    shelf.checkout(version, out)
    if as_json:
        say_json({**fields(version), "out": str(out)})
        return
    say(f"{version.ref} is in {out}")


@app.command(epilog="Example: veneer library card tickets@production --license apache-2.0 > README.md")
def card(ref: Ref, library: Place = DEFAULT, licence: Licence = None) -> None:
    """Print a version's model card: base, method, data, recorded metrics, lineage and licence, as far as they are known."""
    from veneer.formats.card import card as text_of

    shelf = _library(library)
    record = shelf.show(ref)
    say(text_of(shelf.load(record.version), story_of_record(record, licence)).rstrip("\n"))


@app.command(epilog="Example: veneer library remove tickets@1")
def remove(
    ref: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="A version, or all of a name.")],
    library: Place = DEFAULT,
    force: Annotated[bool, typer.Option("--force", help="Although an alias or a descendant needs it.")] = False,
    as_json: Json = False,
) -> None:
    """Forget a version. Refused while an alias or a descendant needs it. `gc` frees the bytes."""
    removed = _library(library).remove(ref, force=force)
    if as_json:
        say_json(asdict(removed))
        return
    say(f"removed {', '.join(removed.versions)}")
    if removed.aliases:
        say(f"with it: {', '.join(removed.aliases)}")


@app.command(epilog="Example: veneer library gc --dry-run")
def gc(
    library: Place = DEFAULT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
    unknown: Annotated[bool, typer.Option("--unknown", help="Also versions that `rebuild` had to leave out.")] = False,
    as_json: Json = False,
) -> None:
    """Delete files that no version needs. What is left of versions that `rebuild` had to leave out is kept."""
    found = _library(library).gc(dry_run=dry_run, unknown=unknown)
    if as_json:
        say_json({**asdict(found), "dry_run": dry_run})
        return
    verb = "would free" if dry_run else "freed"
    say(
        f"{verb} {bytes_text(found.bytes)}: {found.blobs} blobs, {found.manifests} records, {found.leftovers} leftovers"
    )
    if found.kept:
        say(f"kept, though not in the catalogue: {', '.join(found.kept)} (--unknown deletes them)")


@app.command(epilog="Example: veneer library verify")
def verify(library: Place = DEFAULT, as_json: Json = False) -> None:
    """Read and check every byte. Exit code 1 where something is wrong."""
    found = _library(library).verify()
    if as_json:
        say_json({**asdict(found), "clean": found.is_clean})
    else:
        for problem in found.problems:
            say(f"problem: {problem}")
        state = "clean" if found.is_clean else f"{len(found.problems)} problems"
        say(f"{state}: {found.versions} versions, {found.blobs} blobs, {bytes_text(found.bytes)} read")
        if found.orphans:
            say(f"{found.orphans} files are not needed: `veneer library gc`")
    if not found.is_clean:
        raise typer.Exit(1)


@app.command(epilog="Example: veneer library rebuild")
def rebuild(library: Place = DEFAULT, as_json: Json = False) -> None:
    """Make a lost or damaged catalogue again from the manifests beside the blobs."""
    found = _library(library).rebuild()
    if as_json:
        say_json(asdict(found))
        return
    for line in found.left_out:
        note(line)
    say(f"rebuilt: {found.versions} versions, {found.aliases} aliases, {len(found.left_out)} remarks")


def _library(place: str) -> Library:
    try:
        from veneer.library import Library
    except ModuleNotFoundError as error:
        raise NotFound(f"the library needs {error.name}", help="pip install 'veneer[library]'") from error
    return Library(place)


def _loralib(rank: int | None, alpha: float | None) -> Loralib | None:
    from veneer.library import Loralib

    if alpha is None and rank is not None:
        raise ConfigError("--rank is for a loralib file, which needs --alpha too", help="--rank 4 --alpha 32")
    return None if alpha is None else Loralib(alpha, rank)


def _metrics(pairs: Sequence[str] | None, path: Path | None, name: str) -> dict[str, float]:
    found = _evaluated(path, name) if path is not None else {}
    for pair in pairs or ():
        metric, _, value = pair.partition("=")
        try:
            found[metric] = float(value)
        except ValueError:
            raise ConfigError(f"--metric {pair}: '{value}' is not a number", help="--metric loss=1.93") from None
    return found


def _evaluated(path: Path, name: str) -> dict[str, float]:
    """The numbers of one adapter in the output of `veneer eval --json`, or of a flat JSON object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{path} is not there") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", help="veneer eval ... --json > eval.json") from error
    if isinstance(value, dict) and isinstance(value.get("adapters"), dict):
        adapters = value["adapters"]
        if name not in adapters and len(adapters) != 1:
            raise ConfigError(
                f"{path} has {', '.join(adapters)}, but no '{name}'", help="veneer eval --adapter NAME=PATH"
            )
        value = adapters.get(name, next(iter(adapters.values())))
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no metrics", help="veneer eval ... --json > eval.json")
    return {key: float(v) for key, v in value.items() if isinstance(v, int | float) and not isinstance(v, bool)}
