"""What is asked of the engine, and what it answers: requests in, events out.

A `Request` is a frozen value, checked when it is made: every problem is named in one error. Events are frozen too, and
each says which request and which of its `n` choices it belongs to. The last event of a choice is `Finished` or
`Failed`, exactly one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from veneer.errors import ConfigError, VeneerError, listed

Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Use:
    """An adapter by name, and the factor on its effective scale."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True)
class Constraint:
    """What the answer must look like.

    `value` is a JSON schema, a regular expression or a Lark grammar; `json` takes any object.
    """

    kind: Literal["json", "json_schema", "regex", "grammar"]
    value: str | Mapping[str, Any] = ""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; the other defaults change nothing.

    The order: logit bias, penalties, minimum length and constraint, temperature, top-k, top-p, min-p. Log-
    probabilities are of the model's own distribution, before all of that.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def problems(self) -> Iterator[str]:
        """Everything that is out of range."""
        yield from _range("temperature", self.temperature, 0.0, 100.0)
        yield from _range("min_p", self.min_p, 0.0, 1.0)
        yield from _range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        yield from _range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not 0.0 < self.top_p <= 1.0:
            yield f"top_p must be above 0 and at most 1, got {self.top_p}"
        if self.top_k < -1:
            yield f"top_k must be 0 or -1 (off) or a positive count, got {self.top_k}"
        yield from _range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        for token, bias in self.logit_bias.items():
            yield from _range(f"logit_bias of token {token}", bias, -100.0, 100.0)


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it.

    prompt          text, token ids, or chat messages (rendered with the adapter's template, else the base's)
    adapter         a name, a `Use`, several of either (their updates add), or None for the bare base
    max_tokens      most tokens to generate, refused where there is no room for them; None goes to the end of the context
    up_to           most tokens where max_tokens is None, cut to the room there is; beside the engine's own `Limits.answer`
    stop            strings that end the answer; they are not part of it unless `include_stop`
    stop_tokens     token ids that end the answer, beside the tokenizer's own end tokens
    logprobs        None: none. k: the chosen token's and those of the k likeliest
    n               how many answers
    timeout         seconds from submission after which the answer is cut off
    id              the caller's own name for it, unique among requests in flight; made up where None
    """

    prompt: str | Sequence[int] | Sequence[Message]
    adapter: str | Use | Sequence[str | Use] | None = None
    max_tokens: int | None = 256
    up_to: int | None = None
    min_tokens: int = 0
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    constraint: Constraint | None = None
    n: int = 1
    timeout: float | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        problems = [*self.sampling.problems(), *self._problems()]
        if problems:
            raise ConfigError(f"this request can't be run:\n{listed(problems)}")

    def _problems(self) -> Iterator[str]:
        most = self.up_to if self.max_tokens is None else self.max_tokens
        if most is not None and most < 1:
            yield f"max_tokens must be at least 1, got {most}"
        if self.min_tokens < 0 or (most is not None and self.min_tokens > most):
            limit = "max_tokens" if self.max_tokens is not None else f"max_tokens, {most} where none is given"
            yield f"min_tokens must lie between 0 and {limit}, got {self.min_tokens}"
        if not 1 <= self.n <= 128:
            yield f"n must lie between 1 and 128, got {self.n}"
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            yield f"logprobs must lie between 0 and 20, got {self.logprobs}"
        if "" in self.stop:  # so is it in any string, which would stop at each of its letters
            yield f"stop takes several strings, none of them empty, got {self.stop!r}"
        if self.timeout is not None and not self.timeout > 0:
            yield f"timeout must be above 0 seconds, got {self.timeout}"
        for use in self.uses:
            if not math.isfinite(use.scale):
                yield f"the scale of adapter '{use.name}' must be finite, got {use.scale}"

    @property
    def uses(self) -> tuple[Use, ...]:
        """The adapters asked for; none is the bare base."""
        if self.adapter is None:
            return ()
        asked = (self.adapter,) if isinstance(self.adapter, str | Use) else self.adapter
        return tuple(Use(use) if isinstance(use, str) else use for use in asked)


def _range(name: str, value: float, low: float, high: float) -> Iterator[str]:
    if not low <= value <= high:
        yield f"{name} must lie between {low:g} and {high:g}, got {value}"


@dataclass(frozen=True)
class TokenLogprob:
    """A token, what it stands for in UTF-8 (maybe a part of a character), and its log-probability.

    top  the likeliest alternatives, the best first
    at   characters of the answer before it; a part of a character is where the character begins
    """

    token: int
    spelled: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()
    at: int = 0


@dataclass(frozen=True)
class Usage:
    """Tokens of one choice. `cached` of the `prompt` tokens were taken from the prefix cache."""

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True)
class Timing:
    """Seconds: waiting for a place, from submission to the first token, and in all."""

    queue: float
    first_token: float
    total: float


FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "timeout"]


@dataclass(frozen=True)
class Delta:
    """New text of one choice. Text may lag behind tokens: half a character or a possible stop string is held back."""

    id: str
    choice: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of one choice, with the whole answer. `stop` is the string or token that ended it.

    `adapter` is the content digest of what answered ("" for the base): what logs and response headers name.
    """

    id: str
    choice: int
    reason: FinishReason
    stop: str | int | None
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    usage: Usage
    timing: Timing
    adapter: str


@dataclass(frozen=True)
class Failed:
    """The end of one choice that could not be finished. Others are not touched."""

    id: str
    choice: int
    error: VeneerError


Event: TypeAlias = Delta | Finished | Failed
