"""Answer one prompt, with the base or with one or several adapters side by side.

With several adapters all answers come out of one batch. A base with a chat template gets the prompt as a user's message; `--raw`
gives it the text as it is.

    veneer generate "Where is my parcel?" --base smollm2-135m --adapter runs/tickets --with-base
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from veneer.cli._generation import MaxTokens, Seed, System, Temperature, TopP, answers, messages, voices
from veneer.cli._options import AdapterPaths, BaseName, Json
from veneer.cli._output import say_json


def command(
    base: BaseName,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")] = "-",
    adapter: AdapterPaths = [],  # noqa: B006
    with_base: Annotated[bool, typer.Option("--with-base", help="Show the bare base's answer too.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Annotated[list[str], typer.Option("--stop", help="End the answer here; may be repeated.")] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    from veneer.engine import Request, Sampling

    text = sys.stdin.read() if prompt == "-" else prompt
    speaking = voices(base, adapter, with_base=with_base)
    templated = not raw and speaking.base.require_tokenizer().template is not None
    requests = {
        title: Request(
            messages(system, [("user", text)]) if templated else text,
            adapter=name,
            max_tokens=max_tokens,
            stop=tuple(stop),
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
        )
        for title, name in speaking.who.items()
    }
    found = answers(speaking, requests, live=not as_json)
    if as_json:
        say_json(
            {
                title: {
                    "text": answer.text,
                    "finish_reason": answer.reason,
                    "prompt_tokens": answer.usage.prompt,
                    "completion_tokens": answer.usage.completion,
                    "adapter": answer.adapter or None,
                }
                for title, answer in found.items()
            }
        )
