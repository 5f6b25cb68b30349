"""Conversations to text, by a checkpoint's chat template: jinja2 in a sandbox, with the names that templates expect.

Templates come with checkpoints, so they are foreign code: the sandbox is immutable, and they see plain JSON values only. What
they may use is what transformers gives them: trimmed blocks, loop controls, `tojson` without escapes, `raise_exception`,
`strftime_now`, and the `generation` tag. The surprise: a key whose value is null is left out, as templates test for presence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from veneer.errors import DataError, FormatError

Message = Mapping[str, Any]
REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special = dict(special_tokens)
        self._template = _compiled(source)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text. What the template itself refuses is a `DataError` with its words."""
        if not messages:
            raise DataError("a conversation without messages cannot be rendered", help="give at least one message")
        try:
            return self._template.render(
                **(self._special | _plain(variables)),
                messages=[_message(message) for message in messages],
                tools=None if tools is None else [_plain(tool) for tool in tools],
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise DataError(
                f"the chat template refuses this conversation: {error}",
                help=f"give it turns that the template knows (these are {_roles(messages)}), or change chat_template.jinja",
            ) from error
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(
                f"the chat template failed on this conversation: {type(error).__name__}: {error}",
                help="does every message have a role, and a content that is text?",
            ) from error


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(str(message.get("role")) for message in messages)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise FormatError(
            f"the chat template is not valid: line {error.lineno}: {error.message}",
            help="repair chat_template.jinja, or the chat_template of tokenizer_config.json",
        ) from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant says; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` for templates, without the type behind them."""

    def __call__(self, *arguments: Any, **entries: Any) -> dict[Any, Any]:
        return dict(*arguments, **entries)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace(...)` whose attributes can't begin with an underscore: those belong to Python."""

    def __init__(self, *arguments: Any, **entries: Any) -> None:
        super().__init__(*arguments, **entries)
        for name in dict(*arguments, **entries):
            _require_public(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold '{name}': names with an underscore in front are Python's own")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _message(message: Message) -> dict[str, Any]:
    """A message as a template sees it: plain values, no nulls, reasoning under the names that templates use."""
    found = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((found[name] for name in REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Nothing but JSON types: an object of any other kind could carry methods past the sandbox."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(entry) for entry in value]
    raise DataError(f"a message holds a {type(value).__name__}; only text, numbers, lists and objects can be rendered")
