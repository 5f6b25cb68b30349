"""What comes over the network: OpenAI's request bodies with vLLM's extra fields, checked strictly.

A field that is not known is refused, as OpenAI does: an option that is silently ignored gives an answer that nobody asked for.
Fields that change nothing here (`user`, `metadata`, `store`, `service_tier`, ...) are taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator

from veneer.engine import Constraint, Request, Sampling, Use
from veneer.errors import ConfigError, Unsupported
from veneer.registry import Declared


class Wire(Declared):
    """A body, or a part of one."""


class AdapterUse(Wire):
    """An adapter and the factor on its effective scale."""

    name: str = Field(min_length=1, max_length=128)
    scale: float = 1.0


Adapters: TypeAlias = str | AdapterUse | list[str | AdapterUse]


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Wire):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs a json_schema")
        return self


class TextPart(Wire):
    type: Literal["text"]
    text: str


class Message(Wire):
    """One turn. Content may be text or a list of text parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    # of an answer that is given back whole
    refusal: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} needs content")
        return self

    def plain(self) -> dict[str, str]:
        """As the chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return (
            {"role": role, "content": text} if self.name is None else {"role": role, "content": text, "name": self.name}
        )


TokenId = Annotated[int, Field(ge=0, strict=True)]


class Generation(Wire):
    """What both kinds of completion take. A field that is null is one that was not given: OpenAI's clients send None so."""

    model: str = Field("", max_length=256, description="The base's name, or an adapter: name, name@version, name@alias")
    adapter: Adapters | None = Field(None, description="An adapter with a scale, or several whose updates add")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    # taken, and of no effect here
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text holds {error.object[error.start]!a}, half of a character") from error
        return {name: value for name, value in body.items() if value is not None or name not in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core))
        for name, field in schema["properties"].items():
            if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                told = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **told}
        return schema

    @model_validator(mode="after")
    def _streamed(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 16:
            raise ValueError("at most 16 stop strings")
        if value == "" or (isinstance(value, list) and "" in value):
            raise ValueError("a stop string must not be empty")
        return value

    def constraint(self) -> Constraint | None:
        """The one constraint on the answer, or None."""
        found: list[Constraint] = []
        if self.response_format is not None and self.response_format.type == "json_object":
            found.append(Constraint("json"))
        if self.response_format is not None and self.response_format.json_schema is not None:
            found.append(Constraint("json_schema", self.response_format.json_schema.schema_))
        if self.guided_json is not None:
            found.append(Constraint("json_schema", self.guided_json))
        if self.guided_regex is not None:
            found.append(Constraint("regex", self.guided_regex))
        if self.guided_grammar is not None:
            found.append(Constraint("grammar", self.guided_grammar))
        if self.guided_choice is not None:
            found.append(_one_of(self.guided_choice))
        if len(found) > 1:
            raise ConfigError("an answer can follow one constraint, not several", help="leave out all but one of them")
        return found[0] if found else None

    def request(
        self,
        prompt: str | Sequence[int] | Sequence[dict[str, str]],
        uses: Sequence[Use],
        *,
        max_tokens: int | None,
        up_to: int,
        logprobs: int | None,
        timeout: float,
    ) -> Request:
        """The engine's request."""
        return Request(
            prompt=prompt,
            adapter=tuple(uses) or None,
            max_tokens=max_tokens,
            up_to=up_to,
            min_tokens=self.min_tokens,
            sampling=Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                logit_bias=self.logit_bias or {},
                seed=self.seed,
            ),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_tokens=tuple(self.stop_token_ids or ()),
            include_stop=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            constraint=self.constraint(),
            n=self.n,
            timeout=timeout,
        )

    def adapters(self) -> list[Use]:
        """The `adapter` field."""
        if self.adapter is None:
            return []
        asked = self.adapter if isinstance(self.adapter, list) else [self.adapter]
        return [Use(one) if isinstance(one, str) else Use(one.name, one.scale) for one in asked]


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def refuse_tools(self) -> None:
        """Refuse what asks for a tool call."""
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ConfigError("tool_choice asks for a tool and there are no tools", help="leave it out")
        if self.tools and self.tool_choice != "none":
            raise Unsupported(
                "tool calls are not supported", help="describe the tools in a message, or constrain the answer"
            )


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or several prompts."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise ConfigError("the prompt is empty")
        if isinstance(prompt[0], int):
            return [[t for t in prompt if isinstance(t, int)]]
        return [p for p in prompt if isinstance(p, str | list)]

    def refuse_unsupported(self) -> None:
        if self.best_of is not None and self.best_of != self.n:
            raise Unsupported("best_of other than n is not supported")
        if self.suffix:
            raise Unsupported("suffix is not supported")
        if self.echo and self.logprobs is not None:
            raise Unsupported(
                "the log-probabilities of a prompt are not kept, and echo with logprobs asks for them",
                help="`veneer eval` scores texts; leave out one of the two",
            )


def _one_of(choices: Sequence[str]) -> Constraint:
    """As one expression: a grammar with a rule for each is given up on where there are thousands."""
    return Constraint("regex", "|".join(re.escape(choice) for choice in choices))
