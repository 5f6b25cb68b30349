"""What `generate` and `chat` share: an engine over a base and its adapters, and how answers are shown."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli._options import load_adapters

if TYPE_CHECKING:
    from veneer.engine import Engine, Finished, Request
    from veneer.models.base import Base

MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from the likeliest tokens of this share.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same draws every time.")]
System = Annotated[str | None, typer.Option("--system", help="A system message before the conversation.")]


@dataclass(frozen=True)
class Voices:
    """An engine, its base, and who answers: title -> adapter name, or None for the bare base."""

    engine: Engine
    base: Base
    who: Mapping[str, str | None]


def voices(base_name: str, adapters: list[str], *, with_base: bool) -> Voices:
    """Load the base and its adapters. Without adapters, or with `with_base`, the bare base answers too."""
    from veneer.engine import Engine
    from veneer.models.load import load_base

    loaded = load_adapters(adapters)
    base = load_base(base_name)
    engine = Engine(base)
    for name, adapter in loaded.items():
        engine.add(name, adapter)
    who: dict[str, str | None] = {"base": None} if with_base or not loaded else {}
    return Voices(engine, base, {**who, **{name: name for name in loaded}})


def answers(voices: Voices, requests: Mapping[str, Request], *, live: bool) -> dict[str, Finished]:
    """Run one request per voice, all in one batch. A single voice is shown as it speaks, several when each is done."""
    from dataclasses import replace

    from veneer.engine import Delta, Failed, Finished

    titles = list(requests)
    found: dict[str, Finished] = {}
    alone = live and len(titles) == 1
    named = [replace(request, id=title) for title, request in requests.items()]
    for event in voices.engine.generate(named):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            found[event.id] = event
            if live:
                _say_end(event, alone)
        elif alone and isinstance(event, Delta):
            sys.stdout.write(event.text)
            sys.stdout.flush()
    return {title: found[title] for title in titles}


def _say_end(answer: Finished, alone: bool) -> None:
    if alone:
        sys.stdout.write("\n")
    else:
        sys.stdout.write(f"{_title(answer.id)}:\n{_indented(answer.text)}\n\n")
    sys.stdout.flush()


def _title(text: str) -> str:
    return typer.style(text, bold=True) if sys.stdout.isatty() else text


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines() or [""])


def messages(system: str | None, turns: Iterable[tuple[str, str]]) -> tuple[dict[str, str], ...]:
    """A conversation from (role, content) pairs, the system message first where there is one."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return tuple(start + [{"role": role, "content": content} for role, content in turns])
