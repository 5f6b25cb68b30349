"""What stands beside tokenizer.json counts as it does in transformers: tokens that it lacks, other flags, further templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Fast

from veneer.models.tokenizer import Tokenizer
from veneer.models.tokenizer_import import copy_tokenizer

TEXTS = ("Hello world <x> a", "<x>  <x>b <y> hi<eos>", "  lead <bos>A<pad>", "<img>z <n1> q<x>")
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
}
NAMED = ("<bos>", "<eos>", "<pad>")


def flagged(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
    return {"content": content, **plain, **flags}


LISTED = {str(256 + i): flagged(token, special=True) for i, token in enumerate(NAMED)}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[Any, ...]]] = {
    "plain": ({}, {}, ()),
    "additional": ({"additional_special_tokens": ["<x>", "<y>"]}, {}, ()),
    "extra list": ({"extra_special_tokens": ["<x>"]}, {}, ()),
    "extra by name": ({"extra_special_tokens": {"image_token": "<img>"}}, {}, ()),
    "a name of its own": ({"image_token": "<img>"}, {}, ()),
    "in the map": ({}, {"special_tokens_map.json": {"additional_special_tokens": ["<x>"], "eos_token": "<y>"}}, ()),
    "the map is not read": (
        {"added_tokens_decoder": LISTED},
        {"special_tokens_map.json": {"additional_special_tokens": ["<x>"], "eos_token": "<pad>"}},
        (),
    ),
    "added_tokens.json": ({}, {"added_tokens.json": {"<x>": 259, "<n1>": 260}}, ()),
    "listed": ({"added_tokens_decoder": {**LISTED, "259": flagged("<x>", special=True)}}, {}, ()),
    "listed with other flags": (
        {"added_tokens_decoder": {**LISTED, "259": flagged("<x>", lstrip=True, rstrip=True, special=True)}},
        {},
        ("<x>",),
    ),
    "an object with flags": ({"eos_token": {"__type": "AddedToken", **flagged("<eos>", lstrip=True)}}, {}, ()),
    "named, and plain there": ({"eos_token": "<x>"}, {}, ("<x>",)),
    "specials are split": ({"split_special_tokens": True}, {}, ()),
    "a space first": ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, {}, ()),
}


def made(folder: Path, settings: dict[str, Any], files: dict[str, Any], plain: tuple[str, ...]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(NAMED))
    fast.add_tokens([AddedToken(text, normalized=False) for text in plain])
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    for name, value in {"tokenizer_config.json": {**SETTINGS, **settings}, **files}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_flags_beside_tokenizer_json_count_as_in_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made(tmp_path / "t", *CASES[name])
    ours, theirs = Tokenizer.load(tmp_path / "t"), AutoTokenizer.from_pretrained(tmp_path / "t")
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    if name == "plain":
        assert ours.digest == Tokenizer(ours.fast, {**SETTINGS}).digest


def test_templates_in_a_folder_of_their_own_are_found_and_copied(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tools = {"additional_chat_templates/tool_use.jinja": "T{{ tools | length }}{{ messages[0].content }}"}
    files = {"chat_template.jinja": "D{{ messages[0].content }}", **tools}
    made(tmp_path / "t", {"chat_template": "no"}, files, ())
    (tmp_path / "copy").mkdir()
    copy_tokenizer(tmp_path / "t", tmp_path / "copy")
    ours, theirs = Tokenizer.load(tmp_path / "copy"), AutoTokenizer.from_pretrained(tmp_path / "t")
    said = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    for arguments in ({}, {"tools": [tool]}):
        assert ours.render(said, **arguments) == theirs.apply_chat_template(said, tokenize=False, **arguments)


def test_the_settings_template_comes_before_chat_template_json(tmp_path: Path) -> None:
    """transformers' tokenizers do not read that file: it is for folders that say it nowhere else."""
    other = {"chat_template.json": {"chat_template": "J{{ messages[0].content }}"}}
    made(tmp_path / "both", {"chat_template": "S{{ messages[0].content }}"}, other, ())
    made(tmp_path / "one", {}, other, ())
    said = [{"role": "user", "content": "hi"}]
    assert [Tokenizer.load(tmp_path / name).render(said) for name in ("both", "one")] == ["Shi", "Jhi"]


@pytest.mark.parametrize("stated", [[258, 257], 258])
def test_what_ends_an_answer_stands_in_config_json_where_nothing_else_says_it(stated: Any, tmp_path: Path) -> None:
    made(tmp_path / "t", {}, {"config.json": {"eos_token_id": stated}}, ())
    assert set(Tokenizer.load(tmp_path / "t").eos_ids) == {257, 258}
    (tmp_path / "t" / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    assert set(Tokenizer.load(tmp_path / "t").eos_ids) == {257, 256}
