"""A tokenizer small enough to reason about: bytes, a few longer pieces, specials, and real Jinja templates.

`pieces` are taken greedily, longest first, before bytes, so tests can make tokens that straddle a boundary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2

from veneer.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}{{ raise_exception('only user and assistant') }}"
    "{% endif %}{% endfor %}"
)
THINKING = (  # an empty think block in the generation prompt, none in the history
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
PLAIN = (  # no special tokens at all
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
BROKEN_PROMPT = (
    "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>")


class FakeTokenizer:
    """Implements `data.TextTokenizer`. Ids: specials first, then the 256 bytes, then the pieces."""

    def __init__(
        self,
        template: str | None = CHATML,
        *,
        pieces: Sequence[str] = (),
        eos: Sequence[str] = ("<|im_end|>",),
        bos: str | None = None,
        adds_eos: bool = False,
    ) -> None:
        self.template = template
        self.pieces = sorted(pieces, key=len, reverse=True)
        self.pattern = re.compile("|".join(re.escape(t) for t in (*SPECIALS, *self.pieces)) + "|.", re.DOTALL)
        self.eos_ids = [SPECIALS.index(token) for token in eos]
        self.bos_id = None if bos is None else SPECIALS.index(bos)
        self.adds_eos = adds_eos
        self.digest = repr((tuple(self.pieces), tuple(eos), bos, adds_eos))
        self.vocab_size = len(SPECIALS) + 256 + len(self.pieces)

    def encode(self, text: str, special: bool = False) -> list[int]:
        ids = self.encode_with_offsets(text)[0]
        if special and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_ids[0]] if special and self.adds_eos else ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for match in self.pattern.finditer(text):
            found = match.group()
            if found in SPECIALS:
                new = [SPECIALS.index(found)]
            elif found in self.pieces:
                new = [len(SPECIALS) + 256 + self.pieces.index(found)]
            else:
                new = [len(SPECIALS) + byte for byte in found.encode()]
            ids += new
            offsets += [match.span()] * len(new)
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[bytes] = []
        for token in ids:
            if token < len(SPECIALS):
                parts.append(SPECIALS[token].encode())
            elif token < len(SPECIALS) + 256:
                parts.append(bytes([token - len(SPECIALS)]))
            else:
                parts.append(self.pieces[token - len(SPECIALS) - 256].encode())
        return b"".join(parts).decode(errors="replace")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        assert self.template is not None
        template = _compiled(self.template)
        try:
            return template.render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error


@lru_cache
def _compiled(source: str) -> jinja2.Template:
    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.Environment()
    environment.globals["raise_exception"] = fail
    return environment.from_string(source)
