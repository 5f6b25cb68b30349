"""Chat templates in adapter folders: where transformers puts them, strictly read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.small import lora, small_base
from veneer.adapter import Adapter
from veneer.errors import FormatError

OWN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter as PEFT writes it."""
    lora(small_base(), 1).save(tmp_path / "a")
    (tmp_path / "a" / "veneer.json").unlink()
    return tmp_path / "a"


def settings(template: object) -> str:
    return json.dumps({"tokenizer_class": "X", "chat_template": template})


def test_a_template_is_read_from_where_transformers_puts_it(folder: Path) -> None:
    assert Adapter.load(folder).provenance.chat_template is None
    (folder / "tokenizer_config.json").write_text(settings("{{ 1 }}"))
    assert Adapter.load(folder).provenance.chat_template == "{{ 1 }}"
    named = [{"name": "tool_use", "template": "{{ 2 }}"}, {"name": "default", "template": "{{ 3 }}"}]
    (folder / "tokenizer_config.json").write_text(settings(named))
    assert Adapter.load(folder).provenance.chat_template == "{{ 3 }}"
    (folder / "chat_template.jinja").write_text(OWN)
    assert Adapter.load(folder).provenance.chat_template == OWN, "the file goes before the settings, as in transformers"


def test_a_template_does_not_change_which_function_an_adapter_is(folder: Path) -> None:
    before = Adapter.load(folder).digest
    (folder / "chat_template.jinja").write_text(OWN)
    assert Adapter.load(folder).digest == before


def test_it_is_kept_when_the_adapter_is_saved(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text(OWN)
    Adapter.load(folder).save(tmp_path / "again")
    assert Adapter.load(tmp_path / "again").provenance.chat_template == OWN


def test_two_templates_that_differ_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text(OWN)
    Adapter.load(folder).save(tmp_path / "again")
    (tmp_path / "again" / "chat_template.jinja").write_text(OWN)
    assert Adapter.load(tmp_path / "again").provenance.chat_template == OWN
    (tmp_path / "again" / "chat_template.jinja").write_text("{{ other }}")
    with pytest.raises(FormatError, match=r"not the one that veneer\.json says"):
        Adapter.load(tmp_path / "again")


@pytest.mark.parametrize(
    "name,content,word",
    [
        ("chat_template.jinja", b"{% for m in %}", "not valid"),
        ("chat_template.jinja", b"\xff\xfe", "UTF-8"),
        ("chat_template.jinja", b"x" * (1 << 19), "at most"),
        ("tokenizer_config.json", settings("{% if %}").encode(), "not valid"),
        ("tokenizer_config.json", settings(7).encode(), "neither"),
        ("tokenizer_config.json", settings([{"name": "rag", "template": "x"}]).encode(), "neither"),
        ("tokenizer_config.json", settings([{"name": "default", "template": 3}]).encode(), "neither"),
        ("tokenizer_config.json", b"[]", "expected an object"),
    ],
)
def test_a_bad_template_is_refused_with_its_place(folder: Path, name: str, content: bytes, word: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(FormatError, match=word) as error:
        Adapter.load(folder)
    assert name in str(error.value)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(OWN)
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="leads out"):
        Adapter.load(folder)
