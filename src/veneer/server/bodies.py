"""What goes over the network: OpenAI's response bodies, chunks and errors, from the engine's events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.engine.request import Finished, TokenLogprob
from veneer.errors import (
    BaseMismatch,
    Busy,
    ConfigError,
    Conflict,
    DataError,
    Denied,
    FormatError,
    NotFound,
    ResourceError,
    Stopping,
    TargetError,
    Unsupported,
    VeneerError,
)

_REASONS = {"stop": "stop", "length": "length", "cancelled": "stop", "timeout": "length"}


@dataclass(frozen=True)
class Heading:
    """What all bodies of one answer begin with."""

    id: str
    created: int
    model: str
    fingerprint: str
    chat: bool

    def body(self, kind: str, **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.fingerprint, **more}


def completion(heading: Heading, finished: Sequence[Finished], echoes: Sequence[str], n: int) -> dict[str, Any]:
    """A whole answer. `finished` is in order of prompt and choice; `echoes` has the prompts to repeat, or ""."""
    choices: list[dict[str, Any]] = []
    for index, answer in enumerate(finished):
        choice: dict[str, Any] = {"index": index, "finish_reason": _REASONS[answer.reason]}
        if heading.chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
            choice["logprobs"] = chat_logprobs(answer.logprobs) if answer.logprobs else None
        else:
            choice["text"] = echoes[index // n] + answer.text
            choice["logprobs"] = text_logprobs(answer.logprobs, len(echoes[index // n])) if answer.logprobs else None
        if isinstance(answer.stop, str | int):
            choice["stop_reason"] = answer.stop
        choices.append(choice)
    kind = "chat.completion" if heading.chat else "text_completion"
    return heading.body(kind, choices=choices, usage=usage(finished))


def usage(finished: Sequence[Finished]) -> dict[str, Any]:
    """Tokens of an answer; a prompt with several choices counts once."""
    prompts = {answer.id: answer.usage for answer in reversed(finished) if answer.choice == 0}
    prompt = sum(u.prompt for u in prompts.values())
    answered = sum(answer.usage.completion for answer in finished)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answered,
        "total_tokens": prompt + answered,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached for u in prompts.values())},
    }


def chunk(heading: Heading, index: int, text: str, logprobs: Sequence[TokenLogprob], at: int) -> dict[str, Any]:
    """A piece of one choice, whose whole text is `at` characters into what is sent."""
    choice: dict[str, Any] = {"index": index, "finish_reason": None}
    if heading.chat:
        choice["delta"] = {"content": text}
        choice["logprobs"] = chat_logprobs(logprobs) if logprobs else None
    else:
        choice["text"] = text
        choice["logprobs"] = text_logprobs(logprobs, at) if logprobs else None
    return heading.body(_chunk_kind(heading), choices=[choice])


def first_chunk(heading: Heading, index: int, echo: str) -> dict[str, Any]:
    """The piece that opens a choice: the role, or the echoed prompt."""
    choice: dict[str, Any] = {"index": index, "finish_reason": None, "logprobs": None}
    opening: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}} if heading.chat else {"text": echo}
    choice |= opening
    return heading.body(_chunk_kind(heading), choices=[choice])


def last_chunk(heading: Heading, index: int, answer: Finished) -> dict[str, Any]:
    """The piece that ends a choice."""
    choice: dict[str, Any] = {"index": index, "finish_reason": _REASONS[answer.reason], "logprobs": None}
    ending: dict[str, Any] = {"delta": {}} if heading.chat else {"text": ""}
    choice |= ending
    if isinstance(answer.stop, str | int):
        choice["stop_reason"] = answer.stop
    return heading.body(_chunk_kind(heading), choices=[choice])


def usage_chunk(heading: Heading, finished: Sequence[Finished]) -> dict[str, Any]:
    """The piece that a stream with `include_usage` ends with."""
    return heading.body(_chunk_kind(heading), choices=[], usage=usage(finished))


def _chunk_kind(heading: Heading) -> str:
    return "chat.completion.chunk" if heading.chat else "text_completion"


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            {
                **_token(one.spelled, one.logprob),
                "top_logprobs": [_token(spelled, value) for _, spelled, value in one.top],
            }
            for one in logprobs
        ],
        "refusal": None,
    }


def _token(spelled: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _shown(spelled), "logprob": logprob, "bytes": list(spelled)}


def _shown(spelled: bytes) -> str:
    """A token as text, which parts of a character are not."""
    return spelled.decode("utf-8", "replace")


def text_logprobs(logprobs: Sequence[TokenLogprob], at: int) -> dict[str, Any]:
    """Scores of a text completion that is `at` characters into what is sent."""
    return {
        "tokens": [_shown(one.spelled) for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [{_shown(spelled): value for _, spelled, value in one.top} or None for one in logprobs],
        "text_offset": [at + one.at for one in logprobs],
    }


_STATUS: tuple[tuple[type[VeneerError], int, str], ...] = (
    (Stopping, 503, "unavailable_error"),
    (Busy, 429, "rate_limit_error"),
    (NotFound, 404, "not_found_error"),
    (ConfigError, 400, "invalid_request_error"),
    (DataError, 400, "invalid_request_error"),
    (TargetError, 400, "invalid_request_error"),
    (Unsupported, 400, "invalid_request_error"),
    (ResourceError, 400, "invalid_request_error"),
    (Conflict, 409, "conflict_error"),
    (FormatError, 422, "adapter_error"),
    (BaseMismatch, 422, "adapter_error"),
)


def status_of(error: VeneerError) -> tuple[int, str]:
    """HTTP status and OpenAI type of an error."""
    if isinstance(error, Denied):
        return (403, "permission_error") if error.known else (401, "authentication_error")
    return next(((status, kind) for cls, status, kind in _STATUS if isinstance(error, cls)), (500, "server_error"))


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: VeneerError) -> dict[str, Any]:
    """The error object of one of our errors; the way out is part of the message."""
    text = error.message if error.help is None else f"{error.message} ({error.help})"
    codes: dict[type[VeneerError], str] = {NotFound: "model_not_found", Busy: "rate_limit_exceeded"}
    return error_body(text, status_of(error)[1], code=codes.get(type(error)))
