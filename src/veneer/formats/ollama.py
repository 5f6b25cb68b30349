"""A Modelfile for Ollama: the .gguf files, the chat template in Go's template language, and the stop words.

Ollama doesn't run a checkpoint's jinja template; it wants a Go one. Most chat templates put a fixed text before and after each
message, by role, an opening for the answer, and perhaps a default system message. These texts are found by rendering, and the
template made of them is then checked against the checkpoint's own on conversations of several shapes. What doesn't agree is
refused and never approximated. The surprise: a template that is almost right is worse than none, since nothing ever fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.errors import DataError, Unsupported
from veneer.models.tokenizer import Tokenizer

MARK = "\ue000veneer\ue001"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turns:
    """A template as texts around messages.

    opening    before everything
    around     role -> (before, after) a message's content
    default    what stands at the front where there is no system message
    answer     what begins the assistant's turn
    """

    opening: str
    around: Mapping[str, tuple[str, str]]
    default: str
    answer: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What Ollama makes of `messages`: the same walk as `go` describes."""
        text = self.opening
        if messages[0]["role"] != "system":
            text += self.default
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.answer

    def go(self) -> str:
        """The template in Go's language."""
        text = _quoted(self.opening)
        if self.default:
            text += (
                '{{- $first := index .Messages 0 }}{{- if ne $first.Role "system" }}'
                + _quoted(self.default)
                + "{{- end }}"
            )
        text += "{{- range .Messages }}"
        for keyword, role in zip(("if", "else if", "else if"), self.around, strict=False):
            before, after = self.around[role]
            content = _quoted(before) + "{{ .Content }}" + _quoted(after)
            text += "{{- " + keyword + f' eq .Role "{role}" }}}}' + content
        return text + "{{- end }}{{- end }}" + _quoted(self.answer)


def _quoted(text: str) -> str:
    """A literal: Go trims white space around actions marked with a dash, so texts are written as strings."""
    if not text:
        return ""
    escaped = (
        text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    )
    return '{{ "' + escaped + '" }}'


def turns(tokenizer: Tokenizer) -> Turns:
    """The texts around messages of this tokenizer's template, proved on conversations, or `Unsupported`."""
    if tokenizer.template is None:
        raise Unsupported(
            "this base has no chat template, so there is nothing to give Ollama", help="use --format gguf"
        )
    try:
        found = _measured(tokenizer)
        wrong = next(
            (c for c in _conversations(found) if found.render(c) != tokenizer.render(c, add_generation_prompt=True)),
            None,
        )
    except (DataError, ValueError) as error:
        raise _too_clever(str(error)) from error
    if wrong is not None:
        raise _too_clever(f"a conversation of {', '.join(m['role'] for m in wrong)} comes out differently")
    return found


def _too_clever(why: str) -> Unsupported:
    return Unsupported(
        f"this chat template is more than texts around messages: {why}",
        help="use --format gguf, which carries the template itself, with llama.cpp's server (--jinja)",
    )


def _measured(tokenizer: Tokenizer) -> Turns:
    def render(*roles: str, answer: bool = False) -> str:
        messages = [{"role": role, "content": f"{MARK}{i}"} for i, role in enumerate(roles)]
        return tokenizer.render(messages, add_generation_prompt=answer)

    asked = render("user")
    answer = render("user", answer=True).removeprefix(asked)
    user_after = _cut(asked, 1)[1]
    pieces = _cut(render("user", "assistant", "user"), 3)
    assistant_before = pieces[1].removeprefix(user_after)
    assistant_after = _cut(render("user", "assistant"), 2)[2]
    user_before = pieces[2].removeprefix(assistant_after)
    front = pieces[0].removesuffix(user_before)
    around = {"user": (user_before, user_after), "assistant": (assistant_before, assistant_after)}
    try:
        with_system = _cut(render("system", "user"), 2)
    except DataError:
        return Turns(front, around, "", answer)
    system_after = with_system[1].removesuffix(user_before)
    opening = front if with_system[0].startswith(front) else ""
    default = front.removeprefix(opening)
    system = (with_system[0].removeprefix(opening), system_after)
    return Turns(opening, {"system": system, **around}, default, answer)


def _cut(text: str, count: int) -> list[str]:
    """The texts between the marks of `count` messages."""
    pieces, rest = [], text
    for i in range(count):
        before, found, rest = rest.partition(f"{MARK}{i}")
        if not found:
            raise ValueError("a message is missing from the text")
        pieces.append(before)
    return [*pieces, rest]


def _conversations(found: Turns) -> list[list[dict[str, str]]]:
    """Shapes that a chat takes: one turn, many, with and without a system message, odd contents."""
    talk = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello!"), ("user", "1 + 1?"))]
    odd = [{"role": "user", "content": 'a "quoted"\n\nline \\ {{ .Content }} é 你'}]
    plain = [talk[:1], talk, odd]
    system: list[Any] = [{"role": "system", "content": "Be brief."}]
    return plain + ([[*system, *c] for c in plain] if "system" in found.around else [])


def stop_words(tokenizer: Tokenizer) -> list[str]:
    """Every token that ends an answer, as text."""
    words = [tokenizer.token(index) for index in tokenizer.eos_ids]
    return list(dict.fromkeys(word for word in words if word))


def modelfile(tokenizer: Tokenizer, model: str, adapter: str | None = None) -> str:
    """The Modelfile for a .gguf file beside it, with an adapter's beside it where it is kept apart."""
    lines = [f"FROM ./{model}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    lines.append(f'TEMPLATE """{turns(tokenizer).go()}"""')
    lines += [f'PARAMETER stop "{word}"' for word in stop_words(tokenizer)]
    return "\n".join(lines) + "\n"
