"""OpenAI's routes: chat completions, completions, models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from veneer.engine import Delta, Event, Failed, Finished
from veneer.engine.intake import Ticket
from veneer.errors import ConfigError, VeneerError
from veneer.server import answers, bodies, logs
from veneer.server.answers import told
from veneer.server.keys import Key
from veneer.server.loop import Stream
from veneer.server.service import Asked, Service
from veneer.server.shelf import draw_of
from veneer.server.streaming import EventStream, merged, unless_gone, whole
from veneer.server.wire import ChatRequest, CompletionRequest, Generation

router = APIRouter(prefix="/v1", tags=["OpenAI"])
DEFAULT_COMPLETION = 16
"""Tokens of a completion that names no limit: OpenAI's own default."""


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def key_of(request: Request) -> Key:
    key: Key = request.state.key
    return key


@dataclass(eq=False)
class Answer:
    """One HTTP answer in the making: one stream per prompt, as far as they have been submitted."""

    service: Service
    key: Key
    asked: Asked
    heading: bodies.Heading
    echoes: Sequence[str]
    started: float
    streams: list[Stream] = field(default_factory=list)
    outcome: str = ""

    def headers(self) -> dict[str, str]:
        return {
            "x-veneer-adapter": self.asked.versions.encode("ascii", "replace").decode(),
            "x-veneer-digest": "+".join(self.asked.digests) or "base",
        }

    @property
    def finished(self) -> list[Finished]:
        """Answers that have come to an end."""
        return [answer for stream in self.streams for answer in stream.finished]

    def end(self, outcome: str) -> None:
        """Give back what the request held; then count it and log it, once. What was cut off counts with the tokens it had."""
        if self.outcome:
            return
        self.outcome = outcome
        for stream in self.streams:
            stream.on_end = self._count
            stream.cancel()
        self._count()

    def _count(self) -> None:
        if any(stream.unended for stream in self.streams):
            return
        outcome, finished = self.outcome, self.finished
        tokens = sum(answer.usage.completion for answer in finished)
        self.service.keyring.end(self.key, tokens)
        self.service.count(self.asked, self.key.name, outcome, finished)
        self.service.metrics.ended(self.asked.title, outcome, finished)
        first = finished[0] if finished else None
        logs.answered(
            id=self.heading.id,
            key=self.key.name,
            model=self.heading.model,
            adapter=self.asked.versions,
            digest="+".join(self.asked.digests) or None,
            base=self.service.base.identity,
            outcome=outcome,
            finish=[answer.reason for answer in finished],
            prompt_tokens=sum(len(stream.ticket.tokens) for stream in self.streams),
            cached_tokens=sum(a.usage.cached for a in finished if a.choice == 0),
            completion_tokens=tokens,
            queue_ms=None if first is None else round(first.timing.queue * 1e3, 1),
            first_token_ms=None if first is None else round(first.timing.first_token * 1e3, 1),
            total_ms=round((time.monotonic() - self.started) * 1e3, 1),
        )


@router.post("/chat/completions", **told(answers.ChatCompletion, stream=True))
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    body.refuse_tools()
    up_to = service_of(request).settings.max_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    most = body.max_completion_tokens or body.max_tokens
    return await _answer(request, body, [[m.plain() for m in body.messages]], most, up_to, top, chat=True)


@router.post("/completions", **told(answers.TextCompletion, stream=True))
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one text or several."""
    body.refuse_unsupported()
    up_to = min(DEFAULT_COMPLETION, service_of(request).settings.max_tokens)
    prompts = body.prompts()
    return await _answer(request, body, prompts, body.max_tokens, up_to, body.logprobs, chat=False, echo=body.echo)


@router.get("/models", **told(answers.ModelList))
async def models(request: Request) -> dict[str, Any]:
    """The base and every adapter of the library that this key may use."""
    service, key = service_of(request), key_of(request)
    cards = await asyncio.to_thread(_cards, service, key)
    states = await service.loop.call(service.engine.residency.slots.states)
    for card in cards:
        if "digest" in card:
            card["state"] = states.get(card["digest"], "available")
    return {"object": "list", "data": cards}


@router.get("/models/{model:path}", **told(answers.ModelCard))
async def model(model: str, request: Request) -> dict[str, Any]:
    """One of them."""
    service, key = service_of(request), key_of(request)
    if service.adapter_of(model) is None:
        return _base_card(service)
    asked = await asyncio.to_thread(service.asked, model, [], None, key)
    states = await service.loop.call(service.engine.residency.slots.states)
    card = _card(service, model, asked.uses[0].name, asked.digests[0])
    return {**card, "state": states.get(asked.digests[0], "available")}


async def _answer(
    request: Request,
    body: Generation,
    prompts: Sequence[Any],
    max_tokens: int | None,
    up_to: int,
    logprobs: int | None,
    *,
    chat: bool,
    echo: bool = False,
) -> Response:
    service, key, started = service_of(request), key_of(request), time.monotonic()
    if max_tokens is not None and max_tokens > service.settings.max_tokens:
        raise ConfigError(
            f"max_tokens is {max_tokens:,}; this server answers with at most {service.settings.max_tokens:,}"
        )
    id = f"{'chatcmpl' if chat else 'cmpl'}-{request.state.id}"
    draw = draw_of(body.prompt_cache_key or body.user or id)
    asked = await asyncio.to_thread(service.asked, body.model, body.adapters(), draw, key)

    def read() -> list[Ticket]:
        return [
            service.engine.read(
                body.request(
                    prompt,
                    asked.uses,
                    max_tokens=max_tokens,
                    up_to=up_to,
                    logprobs=logprobs,
                    timeout=service.settings.timeout,
                )
            )
            for prompt in prompts
        ]

    most = service.engine.limits.waiting
    if len(prompts) * body.n > most:
        raise ConfigError(f"{len(prompts) * body.n:,} answers are asked for at once; this server takes {most:,}")
    service.keyring.begin(key)  # before the work of reading the prompts and schemas of a client that has no right to it
    try:
        tickets = await asyncio.to_thread(read)
        echoes = [_text(service, prompt) if echo else "" for prompt in prompts]
        service.keyring.spend(key, sum(len(ticket.tokens) for ticket in tickets))
    except BaseException:
        service.keyring.end(key, 0)
        raise
    identity = (service.base.identity or "unknown")[:12]
    mark = f"{identity}-{'+'.join(d[:12] for d in asked.digests)}" if asked.digests else identity
    heading = bodies.Heading(id, int(time.time()), body.model or service.base.name, mark, chat)
    answer = Answer(service, key, asked, heading, echoes, started)
    try:
        for ticket in tickets:
            answer.streams.append(await service.loop.submit(ticket))
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return await _streamed(request, answer, usage=usage)
        return await _whole(request, answer)
    except BaseException as error:
        answer.end(_outcome(error))
        raise


async def _whole(request: Request, answer: Answer) -> Response:
    finished = await unless_gone(request, whole(answer.streams))
    n = answer.streams[0].ticket.request.n
    body = bodies.completion(answer.heading, finished, answer.echoes, n)
    late = any(found.reason == "timeout" for found in finished)
    answer.end("timeout" if late else "ok")
    if late:
        text = f"the answer took longer than {answer.service.settings.timeout:g} seconds"
        return JSONResponse(bodies.error_body(text, "timeout_error", code="timeout"), 504, answer.headers())
    return JSONResponse(body, headers=answer.headers())


async def _streamed(request: Request, answer: Answer, *, usage: bool) -> Response:
    events = merged(answer.streams)
    first = await unless_gone(request, anext(events))
    if isinstance(first[1], Failed):
        raise first[1].error
    outcome = ["cancelled"]

    async def lines() -> AsyncIterator[Mapping[str, Any]]:
        n = answer.streams[0].ticket.request.n
        pieces = Pieces(answer.heading, answer.echoes, n)
        for line in pieces.of(*first):
            yield line
        async for place, event in events:
            for line in pieces.of(place, event):
                yield line
        if usage:
            yield bodies.usage_chunk(answer.heading, answer.finished)
        outcome[0] = "error" if pieces.failed else "ok"

    def ended(stayed: bool) -> None:
        answer.end(outcome[0] if stayed else "cancelled")

    return EventStream(lines(), ended, answer.headers())


class Pieces:
    """Chunks of an answer, from its events."""

    def __init__(self, heading: bodies.Heading, echoes: Sequence[str], n: int) -> None:
        self._heading, self._echoes, self._n = heading, echoes, n
        self._begun: set[int] = set()
        self.failed = False

    def of(self, place: int, event: Event) -> list[dict[str, Any]]:
        """The chunks for one event of the prompt at `place`."""
        index = place * self._n + event.choice
        found: list[dict[str, Any]] = []
        if isinstance(event, Failed):
            self.failed = True
            return [bodies.body_of(event.error)]
        echo = self._echoes[place]
        if index not in self._begun:
            self._begun.add(index)
            if self._heading.chat or echo:
                found.append(bodies.first_chunk(self._heading, index, echo))
        if isinstance(event, Delta) and (event.text or event.logprobs):
            found.append(bodies.chunk(self._heading, index, event.text, event.logprobs, len(echo)))
        if isinstance(event, Finished):
            found.append(bodies.last_chunk(self._heading, index, event))
        return found


def _outcome(error: BaseException) -> str:
    if isinstance(error, VeneerError):
        return "refused" if bodies.status_of(error)[0] < 500 else "error"
    return "cancelled"


def _text(service: Service, prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else service.base.require_tokenizer().decode(prompt)


def _cards(service: Service, key: Key) -> list[dict[str, Any]]:
    local = service.engine.residency.local
    cards = [_base_card(service)] if key.may_use(None) else []
    cards += [_card(service, n, n, local.resolve(n).digest) for n in local.names() if key.may_use(n)]
    cards += [_card(service, v.name, v.ref, v.digest) for v in service.shelf.newest() if key.may_use(v.name)]
    return cards


def _base_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.base.name,
        "object": "model",
        "created": 0,
        "owned_by": "veneer",
        "root": service.base.name,
        "parent": None,
        "max_model_len": service.base.config.max_positions,
    }


def _card(service: Service, id: str, root: str, digest: str) -> dict[str, Any]:
    head = {"id": id, "object": "model", "created": 0, "owned_by": "veneer"}
    return {**head, "root": root, "parent": service.base.name, "digest": digest}
