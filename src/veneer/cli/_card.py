"""What a model card can say about an adapter: a folder that was named on the command line, or a version of a library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli._options import adapter_path
from veneer.errors import VeneerError

if TYPE_CHECKING:
    from veneer.formats.card import Story
    from veneer.library import Record

Licence = Annotated[
    str | None,
    typer.Option("--license", metavar="ID", help="The licence to state in the model card; unknown otherwise."),
]


def story_of(text: str, licence: str | None, base: str | None = None) -> Story:
    """Metrics and data of the run behind `[NAME=]PATH[@SCALE]`, where there is one, and the licence of `base`.

    Figures of an adapter at its own scale are not those of another scale, so they are left out there.
    """
    from veneer.formats.card import Story
    from veneer.library.source import told
    from veneer.merge.store import licence_at
    from veneer.models.sources import locate

    asked = adapter_path(text)
    of_base = None if base is None else licence_at(locate(base))
    found = told(asked.path)
    splits = _splits(found.facts)
    if asked.scale != 1:
        facts = {"scale": f"{asked.scale:g} times what was trained; figures measured at 1 are left out"}
        return Story(asked.name, data=splits, licence=licence, base_licence=of_base, facts=facts)
    return Story(asked.name, found.metrics, splits, licence, of_base)


def story_of_record(record: Record, licence: str | None) -> Story:
    """What a library knows of a version: its metrics, the names of its parents, the run that it came from."""
    from veneer.formats.card import Story
    from veneer.merge.store import licence_at
    from veneer.models.sources import locate

    version = record.version
    try:
        of_base = licence_at(locate(version.base_name)) if version.base_name else None
    except VeneerError:  # the base is not on this machine
        of_base = None
    facts = {"in the library": f"{version.ref}, added {version.created}", "base check": version.belongs}
    note = str(record.provenance.get("note", ""))
    facts |= {"note": note} if note else {}
    run = record.provenance.get("run", {})
    return Story(version.ref, record.metrics, _splits(run), licence, of_base, record.parents, facts)


def _splits(run: Mapping[str, Any]) -> dict[str, str]:
    """Split -> SHA-256, of a run's provenance."""
    data = run.get("data")
    return {str(split): str(digest) for split, digest in data.items()} if isinstance(data, dict) else {}
