"""What stands beside tokenizer.json counts as it does in transformers: tokens that it lacks, other flags, further templates."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Fast

from veneer.errors import FormatError, Unsupported
from veneer.models.tokenizer import SPACED, Tokenizer
from veneer.models.tokenizer_import import copy_tokenizer

TEXTS = ("Hello world <x> a", "<x>  <x>b <y> hi <eos> ", "  lead <bos>A<pad>", "<img>z <n1> q<x> w<x>w")
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
STRIPPING = AddedToken("<x>", lstrip=True, rstrip=True, normalized=False)
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
SAID = [{"role": "user", "content": "hi"}]
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
    "an object of a new token": ({"eos_token": {"__type": "AddedToken", **flagged("<y>", lstrip=True)}}, {}, ()),
    "an object in the map": ({}, {"special_tokens_map.json": {"eos_token": flagged("<y>", rstrip=True)}}, ()),
    "a single word": ({"added_tokens_decoder": {**LISTED, "259": flagged("<x>", single_word=True)}}, {}, ("<x>",)),
    "named, with flags there": ({"additional_special_tokens": ["<x>"]}, {}, (STRIPPING,)),
    "named, with flags in the list": (
        {"extra_special_tokens": ["<x>"], "added_tokens_decoder": {**LISTED, "259": flagged("<x>", lstrip=True)}},
        {},
        (STRIPPING,),
    ),
    "named, not in the list": ({"eos_token": "<x>", "added_tokens_decoder": LISTED}, {}, (STRIPPING,)),
    "further, and plain there": ({"additional_special_tokens": ["<x>", "<y>"]}, {}, ("<x>",)),
    "new ones by their names": (
        {"pad_token": "<img>", "unk_token": "<n1>", "eos_token": "<y>", "bos_token": "<x>"},
        {},
        (),
    ),
    "names and a list": (
        {"extra_special_tokens": {"image_token": "<img>"}, "additional_special_tokens": ["<y>"]},
        {},
        (),
    ),
    "added_tokens.json, named": (
        {"additional_special_tokens": ["<x>"]},
        {"added_tokens.json": {"<y>": 260, "<x>": 259, "<eos>": 300}},
        (),
    ),
    "split, and a space first": (
        {
            "tokenizer_class": "GPT2Tokenizer",
            "unk_token": "<pad>",
            "add_prefix_space": True,
            "split_special_tokens": True,
            "added_tokens_decoder": LISTED,
        },
        {},
        (),
    ),
    "specials are split": ({"split_special_tokens": True}, {}, ()),
    "a space first": ({"tokenizer_class": "GPT2Tokenizer", "unk_token": "<pad>", "add_prefix_space": True}, {}, ()),
}


def made(folder: Path, settings: dict[str, Any], files: dict[str, Any], plain: tuple[str | AddedToken, ...]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(NAMED))
    fast.add_tokens([AddedToken(t, normalized=False) if isinstance(t, str) else t for t in plain])
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
    assert ours.vocab_size == len(theirs)


def test_the_digest_changes_only_with_what_decides_the_tokens(tmp_path: Path) -> None:
    """It names tokens on disk, which must be found again."""
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        (
            {"added_tokens_decoder": LISTED, "add_prefix_space": True},
            {"special_tokens_map.json": {"eos_token": "<pad>"}},
        ),
        ({"split_special_tokens": True}, {}),
        ({}, {"additional_chat_templates/tool_use.jinja": "T"}),
        ({"image_token": "<eos>"}, {}),
    ]
    for place, (settings, files) in enumerate(cases):
        made(tmp_path / str(place), settings, files, ("<x>",))
    loaded = [Tokenizer.load(tmp_path / str(place)) for place in range(len(cases))]
    named = {name: SETTINGS[name] for name in ("bos_token", "eos_token", "pad_token")}
    as_ever = json.dumps([Fast.from_file(str(tmp_path / "0" / "tokenizer.json")).to_str(), None, named], sort_keys=True)
    assert loaded[0].digest == loaded[1].digest == hashlib.sha256(as_ever.encode()).hexdigest()
    assert len({tokenizer.digest for tokenizer in loaded}) == len(cases) - 1


@pytest.mark.parametrize("kind", SPACED)
@pytest.mark.parametrize("stated", [True, False])
def test_add_prefix_space_decides_in_the_classes_that_have_it(kind: str, stated: bool, tmp_path: Path) -> None:
    """In others it does nothing. The file has what the class makes of the other value."""
    from transformers import AutoTokenizer

    made(tmp_path / "t", {"tokenizer_class": kind, "add_prefix_space": not stated}, {}, ())
    other = AutoTokenizer.from_pretrained(tmp_path / "t").backend_tokenizer
    made(tmp_path / "u", {"tokenizer_class": f"{kind}Fast", "add_prefix_space": stated}, {}, ())
    other.save(str(tmp_path / "u" / "tokenizer.json"))
    made(tmp_path / "v", {"tokenizer_class": None, "add_prefix_space": stated}, {}, ())
    ours, theirs = Tokenizer.load(tmp_path / "u"), AutoTokenizer.from_pretrained(tmp_path / "u")
    for text in ("word", "a 12 b", " led", "x<eos>y"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert len(ours.encode("word")) == 4 + stated and len(Tokenizer.load(tmp_path / "v").encode("word")) == 4


BAD: list[dict[str, Any]] = [
    {"added_tokens_decoder": {"259": {"lstrip": True}}},
    {"added_tokens_decoder": {"first": flagged("<x>")}},
    {"additional_special_tokens": [3]},
    {"eos_token": {"content": "<x>", "lstrip": "no"}},
]


@pytest.mark.parametrize("settings", BAD)
def test_a_token_that_cannot_be_read_is_said(settings: dict[str, Any], tmp_path: Path) -> None:
    made(tmp_path / "t", settings, {}, ())
    with pytest.raises(FormatError, match="a token that is stated beside"):
        Tokenizer.load(tmp_path / "t")


def test_templates_see_the_checkpoints_own_names(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = "{{ image_token }}{{ eos_token }}{{ messages[0].content }}"
    made(tmp_path / "t", {"image_token": "<img>", "chat_template": template}, {}, ())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t").apply_chat_template(SAID, tokenize=False)
    assert Tokenizer.load(tmp_path / "t").render(SAID) == theirs == "<img><eos>hi"


@pytest.mark.parametrize("tools", [None, [], [TOOL]])
@pytest.mark.parametrize("names", [("default",), ("default", "tool_use"), ("tool_use",)])
@pytest.mark.parametrize("beside", [True, False])
def test_tools_take_the_template_named_for_them(
    tools: list[Any] | None, names: tuple[str, ...], beside: bool, tmp_path: Path
) -> None:
    """An empty list are tools too; without any, a default is needed."""
    from transformers import AutoTokenizer

    sources = {name: f"{name} {{{{ tools }}}}" for name in names}
    places = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
    files = {places[name]: source for name, source in sources.items()} if beside else {}
    listed = [{"name": name, "template": source} for name, source in sources.items()]
    made(tmp_path / "t", {"chat_template": "no" if beside else listed}, files, ())
    ours, theirs = Tokenizer.load(tmp_path / "t"), AutoTokenizer.from_pretrained(tmp_path / "t")
    try:
        wanted = theirs.apply_chat_template(SAID, tools=tools, tokenize=False)
    except ValueError:
        assert tools is None and names == ("tool_use",)
        with pytest.raises(Unsupported, match="no chat template"):
            ours.render(SAID, tools=tools)
    else:
        assert ours.render(SAID, tools=tools) == wanted


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
