"""Chat requests are rendered with the template that their adapter brings, and end where that template ends a turn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine.small import lora, small_base, with_tokenizer
from tests.engine.test_engine import engine
from veneer.adapter import Adapter
from veneer.engine import Engine, Request, Use
from veneer.errors import ConfigError, DataError, FormatError
from veneer.models.base import Base

CHAT = [{"role": "user", "content": "hello"}]
OWN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"


def bringing(base: Base, seed: int, template: str | None) -> Adapter:
    adapter = lora(base, seed)
    return replace(adapter, provenance=replace(adapter.provenance, chat_template=template))


def text_of(running: Engine, adapter: str | list[str | Use] | None) -> str:
    tokens = running.read(Request(CHAT, adapter=adapter)).tokens
    return running.base.require_tokenizer().decode(tokens, skip_special=False)


def test_the_adapters_template_goes_before_the_bases() -> None:
    running = engine(with_tokenizer(small_base()))
    base = running.base
    own = base.require_tokenizer().template
    assert own is not None
    running.add("plain", lora(base, 1))
    running.add("same", bringing(base, 2, own))
    running.add("own", bringing(base, 3, OWN))
    for adapter in (None, "plain", "same"):
        assert text_of(running, adapter) == "<user>hello<end>"
    assert text_of(running, "own") == "[user]hello<eos>"
    assert text_of(running, ["plain", "own"]) == "[user]hello<eos>"
    assert text_of(running, [Use("own", 0.0), "plain"]) == "<user>hello<end>", "at scale 0 it does not take part"
    texts = [running.read(Request("hello", adapter=name)).tokens for name in (None, "own")]
    assert texts[0] == texts[1], "a text prompt is nobody's conversation"


def test_an_answer_ends_where_the_adapters_template_ends_a_turn() -> None:
    running = engine(with_tokenizer(small_base()))
    tokenizer = running.base.require_tokenizer()
    running.add("ends", bringing(running.base, 1, "{% for m in messages %}{{ m.content }}<user>{% endfor %}"))
    own, base = (running.read(Request(CHAT, adapter=name)).ending for name in ("ends", None))
    assert tokenizer.id_of("<user>") in own
    assert tokenizer.id_of("<user>") not in base
    assert tokenizer.id_of("<end>") in base
    assert tokenizer.id_of("<end>") not in own
    assert running.read(Request(CHAT, adapter="ends", ignore_eos=True)).ending == frozenset()


def test_templates_that_differ_or_fail_are_refused_and_only_in_chats() -> None:
    running = engine(with_tokenizer(small_base()))
    base = running.base
    running.add("one", bringing(base, 1, OWN))
    running.add("two", bringing(base, 2, OWN + " "))
    running.add("broken", bringing(base, 3, "{% for m in %}"))
    running.add("strict", bringing(base, 4, "{{ raise_exception('no user turns') }}"))
    with pytest.raises(ConfigError, match="one, two bring different"):
        text_of(running, ["one", "two"])
    with pytest.raises(FormatError, match="not valid"):
        text_of(running, "broken")
    with pytest.raises(DataError, match="no user turns"):
        text_of(running, "strict")
    for adapter in (["one", "two"], "broken", "strict"):
        assert running.read(Request("hello", adapter=adapter)).tokens


def test_many_templates_are_not_all_kept() -> None:
    running = engine(with_tokenizer(small_base()))
    for number in range(70):
        running.add(str(number), bringing(running.base, 1, f"{number} {OWN}"), replace=True)
        assert text_of(running, str(number)).startswith(f"{number} ")
    assert len(running._intake._spellers) <= 64
