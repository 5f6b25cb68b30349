"""What the model card of an export can say about an adapter folder that was named on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli._options import adapter_path

if TYPE_CHECKING:
    from veneer.formats.card import Story

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
    data = found.facts.get("data")
    splits = {str(k): str(v) for k, v in data.items()} if isinstance(data, dict) else {}
    if asked.scale != 1:
        facts = {"scale": f"{asked.scale:g} times what was trained; figures measured at 1 are left out"}
        return Story(asked.name, data=splits, licence=licence, base_licence=of_base, facts=facts)
    return Story(asked.name, found.metrics, splits, licence, of_base)
