"""Options that several verbs share, so that one thing is written one way everywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.errors import ConfigError, listed

if TYPE_CHECKING:
    from veneer.adapter import Adapter

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
BaseName = Annotated[
    str, typer.Option("--base", metavar="BASE", help="A catalogue name, a folder, a .gguf file or a hub id.")
]
AdapterPaths = Annotated[
    list[str], typer.Option("--adapter", metavar="[NAME=]PATH[@SCALE]", help="An adapter folder; may be repeated.")
]


@dataclass(frozen=True)
class AdapterPath:
    """What `[NAME=]PATH[@SCALE]` says. Without NAME it is the folder's own name."""

    name: str
    path: Path
    scale: float = 1.0


def adapter_path(text: str) -> AdapterPath:
    """Read `[NAME=]PATH[@SCALE]`.

    A folder whose own name contains `=` or `@` is found first, so that every path can be written.

    >>> adapter_path("legal=runs/legal/adapter@0.5")
    AdapterPath(name='legal', path=PosixPath('runs/legal/adapter'), scale=0.5)
    """
    if text and Path(text).exists():
        return AdapterPath(_own_name(Path(text)), Path(text))
    match = re.fullmatch(r"(?:(?P<name>[^=/@]+)=)?(?P<path>.+?)(?:@(?P<scale>[^@/]+))?", text, re.DOTALL)
    if match is None:
        raise ConfigError(
            f"'{text}' is not an adapter", help="write [NAME=]PATH[@SCALE], as legal=runs/legal/adapter@0.5"
        )
    path = Path(match["path"])
    try:
        scale = float(match["scale"]) if match["scale"] else 1.0
    except ValueError:
        raise ConfigError(
            f"'{match['scale']}' in '{text}' is not a scale",
            help="write a number after the @, as runs/legal/adapter@0.5",
        ) from None
    return AdapterPath(match["name"] or _own_name(path), path, scale)


def _own_name(path: Path) -> str:
    """`runs/legal/adapter` and `runs/legal/last` are called legal: in a run folder the folder's name says nothing."""
    resolved = path.resolve()
    return resolved.parent.name if resolved.name in ("adapter", "last") else resolved.name


def load_adapters(texts: list[str]) -> dict[str, Adapter]:
    """Name -> adapter, scaled, in the order given. All that are missing or named twice are reported at once."""
    from veneer.adapter import Adapter

    found = [adapter_path(text) for text in texts]
    names = [one.name for one in found]
    problems = [f"two adapters are called '{name}'" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += [f"there is no folder '{one.path}'" for one in found if not one.path.exists()]
    if problems:
        raise ConfigError(f"--adapter:\n{listed(problems)}", help="name them: --adapter NAME=PATH")
    loaded = {one.name: Adapter.load(one.path) for one in found}
    return {one.name: loaded[one.name].scaled(one.scale) if one.scale != 1.0 else loaded[one.name] for one in found}
