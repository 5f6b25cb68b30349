"""Talk with the base or with one or several adapters, each with a memory of its own.

Lines are read from standard input. `/reset` begins anew, `/exit` or the end of input stops.

    veneer chat --base smollm2-135m --adapter runs/tickets --adapter legal=runs/legal@0.5
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from veneer.cli._generation import MaxTokens, Seed, System, Temperature, TopP, answers, messages, voices
from veneer.cli._options import AdapterPaths, BaseName, Json
from veneer.cli._output import note, say_json


def command(
    base: BaseName,
    adapter: AdapterPaths = [],  # noqa: B006
    with_base: Annotated[bool, typer.Option("--with-base", help="Let the bare base answer too.")] = False,
    system: System = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    from veneer.engine import Request, Sampling
    from veneer.errors import Unsupported

    speaking = voices(base, adapter, with_base=with_base)
    if speaking.base.require_tokenizer().template is None:
        raise Unsupported(
            f"the base '{base}' has no chat template", help="use `veneer generate --raw` to continue a text"
        )
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    turns: dict[str, list[tuple[str, str]]] = {title: [] for title in speaking.who}
    note(f"{', '.join(turns)}: type a message; /reset begins anew, /exit stops")
    for line in _lines():
        if line == "/reset":
            turns = {title: [] for title in turns}
            note("begun anew")
            continue
        for said in turns.values():
            said.append(("user", line))
        requests = {
            title: Request(
                messages(system, turns[title]), adapter=speaking.who[title], max_tokens=max_tokens, sampling=sampling
            )
            for title in turns
        }
        for title, answer in answers(speaking, requests, live=not as_json).items():
            turns[title].append(("assistant", answer.text))
    if as_json:
        say_json({title: [{"role": r, "content": c} for r, c in said] for title, said in turns.items()})


def _lines() -> Iterator[str]:
    """What the user types, until /exit or the end."""
    talking = sys.stdin.isatty()
    while True:
        if talking:
            sys.stderr.write(typer.style("> ", bold=True))
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()
