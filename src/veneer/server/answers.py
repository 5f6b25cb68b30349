"""What the server answers, as types: the OpenAPI document is made of them, and tests hold every answer to it.

Bodies are built by `bodies` and the routes; nothing is built or checked through these classes while the server runs.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from starlette.responses import PlainTextResponse

from veneer.engine.hot import HotState
from veneer.engine.slots import State


class Answer(BaseModel):
    """Exactly these fields."""

    model_config = ConfigDict(extra="forbid")


class Error(Answer):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    error: Error


class CachedTokens(Answer):
    cached_tokens: int


class Tokens(Answer):
    """Tokens of an answer; a prompt with several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ScoredToken(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(ScoredToken):
    top_logprobs: list[ScoredToken]


class ChatScores(Answer):
    content: list[ChosenToken]
    refusal: None


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(Answer):
    index: int
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int = ""


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatScores | None


class TextScores(Answer):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Choice):
    text: str
    logprobs: TextScores | None


class Completion(Answer):
    """`system_fingerprint` holds the start of the base's identity and of the digests that answered."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Tokens


class ChatCompletion(Completion):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(Completion):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelCard(Answer):
    """`root` is the version that the name means now, `parent` the base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int = 0
    digest: str = ""
    state: State = "available"


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class AdapterFacts(Answer):
    """`uses` counts sequences; `reason` says why it failed."""

    digest: str
    state: State
    uses: int = 0
    bytes: int = 0
    pinned: bool = False
    name: str | None = None
    ref: str = ""
    method: str = ""
    rank: int | None = None
    reason: str = ""


class AdapterList(Answer):
    """Versions of the library, and what the engine holds besides."""

    adapters: list[AdapterFacts]
    others: list[AdapterFacts]


class Loading(Answer):
    ref: str
    digest: str
    state: State


class Unloaded(Loading):
    freed_bytes: int


class HotFacts(Answer):
    """The adapter that is merged beside the base."""

    state: HotState
    name: str
    digest: str
    bytes: int
    lost: float
    checksum: str
    intact: bool | None
    reason: str


class Cooled(HotFacts):
    freed_bytes: int


class Moved(Answer):
    """Where an alias points now."""

    name: str
    alias: str
    version: int
    weight: float | None


class KeyFacts(Answer):
    """What may be shown of a key."""

    name: str
    adapters: list[str]
    admin: list[str]
    requests_per_minute: int
    tokens_per_minute: int
    concurrent: int


class KeyList(Answer):
    keys: list[KeyFacts]


class Usage(Answer):
    """Totals since the start by `adapter NAME@VERSION` and `key NAME`."""

    usage: dict[str, dict[str, int]]


class Health(Answer):
    status: str


class Readiness(Answer):
    status: Literal["ready", "stopping"]
    base: str
    identity: str | None


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "Refused, as OpenAI writes it; 429 comes with Retry-After"},
    "5XX": {"model": ErrorBody, "description": "Too late (504), or a defect"},
}


def told(model: type[Answer], *, stream: bool = False, unready: type[Answer] | None = None) -> dict[str, Any]:
    """Arguments of a route that answers with `model`: streamed where `stream`, with `unready` at 503."""
    found: dict[int | str, dict[str, Any]] = {200: {"model": model}}
    if stream:
        found[200]["content"] = {"text/event-stream": {}}
    if unready is not None:
        found[503] = {"model": unready, "description": "Not ready; the body says what it is instead"}
    return {"response_model": None, "responses": found}


def told_text(kind: str) -> dict[str, Any]:
    """The same for a route that answers with text."""
    text = {200: {"content": {kind: {"schema": {"type": "string"}}}}}
    return {"response_model": None, "response_class": PlainTextResponse, "responses": text}
