"""What we hand to llama.cpp and Ollama reads as the tokens that we read: hard texts, whole conversations, and the way back.

llama.cpp tokenizes with the exported file itself. Ollama's Go template is rendered here by a small reader of the part of Go's
template language that `formats/ollama.py` writes (no Ollama runs): literals, `.Content`, `range`, `if`/`else if` with `eq` and
`ne`, `index`, and the trimming of white space beside a dash. What it renders is then tokenized by llama.cpp as Ollama would.
"""

from __future__ import annotations

import json
import re
import unicodedata
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.formats.test_gguf_export import CHATML
from tests.models import tiny
from tests.models.test_pre_tokenizer import HARD, SPECIAL, as_in_a_checkpoint
from veneer.formats.gguf_export import export_model
from veneer.formats.gguf_words import tokenizer_fields
from veneer.formats.ollama import modelfile, turns
from veneer.merge import store_of
from veneer.models.catalog import find
from veneer.models.load import load_base
from veneer.models.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]
TALKS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 = ?"}],
    [
        {"role": "user", "content": "Why  is\n\nthe sky blue? {{ .Content }} 12345"},
        {"role": "assistant", "content": 'It "scatters"\\n\tshort waves.  '},
        {"role": "user", "content": "naïve 你好 🙂‍↔️ it's I'LL"},
    ],
]

# llama.cpp -----------------------------------------------------------------------------------------------------------


Post = Callable[[str, dict[str, Any]], dict[str, Any]]


@contextmanager
def llama_cpp(model: Path) -> Iterator[Post]:
    """llama.cpp with a model, answering on a local port."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup, params.port, params.use_jinja = 128, 1, False, 0, True
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    place = server.listening_address

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{place}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found

    yield post
    del server


def ids_of(post: Post, text: str, *, special: bool = False) -> list[int]:
    """llama.cpp's tokens of a text. `special` reads control tokens as such, and adds what the model begins with."""
    ids: list[int] = post("/tokenize", {"content": text, "add_special": special, "parse_special": special})["tokens"]
    return ids


def exported(folder: Path, name: str) -> tuple[Path, Tokenizer]:
    """A tiny model with the tokenizer that models of this pre-tokenizer have, as our export writes it."""
    tokenizer = Tokenizer(
        as_in_a_checkpoint(name), {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2]}, CHATML.replace("Be kind", name)
    )
    base = load_base(tiny.checkpoint("llama", folder / "m", vocab_size=704), "float32")
    export_model(store_of(base), folder / "m.gguf", tokenizer_fields(tokenizer, 704), filetype="f16")
    return folder / "m.gguf", tokenizer


@pytest.mark.parity
@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_llama_cpp_reads_our_file_as_we_read(tmp_path: Path, name: str) -> None:
    """llama.cpp composes no characters (NFC), as Qwen's tokenizer.json does: there, texts are given composed."""
    model, ours = exported(tmp_path, name)
    composed = json.loads(ours.fast.to_str())["normalizer"] is not None
    texts = [unicodedata.normalize("NFC", text) if composed else text for text in HARD]
    with llama_cpp(model) as post:
        for text in (text for text in texts if "<|" not in text and "\x00" not in text):
            ids = ids_of(post, text)
            assert ids == ours.encode(text), text
            assert post("/detokenize", {"tokens": ids})["content"] == text
        for talk in TALKS:
            told = post("/apply-template", {"messages": talk})["prompt"]
            assert told == ours.render(talk, add_generation_prompt=True)
            assert ids_of(post, told, special=True) == ours.encode(told, special=True)


@pytest.mark.parity
def test_what_ollama_would_send_is_what_we_would(tmp_path: Path) -> None:
    model, ours = exported(tmp_path, "smollm")
    template = template_of(modelfile(ours, "m.gguf"))
    with llama_cpp(model) as post:
        for talk in TALKS:
            sent = go(template, talk)
            assert sent == ours.render(talk, add_generation_prompt=True)
            assert ids_of(post, sent, special=True) == ours.encode(sent, special=True)


@pytest.mark.slow
@pytest.mark.parity
def test_the_demo_base_through_the_same(tmp_path: Path) -> None:
    ours = load_base("smollm2-135m").require_tokenizer()
    template = template_of(modelfile(ours, "m.gguf"))
    with llama_cpp(find("smollm2-135m")) as post:
        for text in (text for text in HARD if "<|" not in text and "\x00" not in text):
            assert ids_of(post, text) == ours.encode(text), text
        for talk in TALKS:
            sent = go(template, talk)
            assert sent == ours.render(talk, add_generation_prompt=True)
            assert ids_of(post, sent, special=True) == ours.encode(sent, special=True)


# Go's templates ------------------------------------------------------------------------------------------------------


def template_of(text: str) -> str:
    """The TEMPLATE of a Modelfile."""
    found = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert found is not None
    return found[1]


def go(template: str, messages: Messages) -> str:
    """What Go's text/template writes for `template` and {"Messages": messages}."""
    pieces = list(_pieces(template))
    out, at = _block(pieces, 0, {".Messages": list(messages)})
    assert at == len(pieces), "an end too many"
    return out


def _pieces(template: str) -> Iterator[tuple[bool, str]]:
    """(is action, text), white space trimmed where a dash stands at the braces."""
    at, trim = 0, False
    for found in re.finditer(r'\{\{(- )?((?:"(?:[^"\\]|\\.)*"|[^"}])*?)( -)?\}\}', template):
        text = template[at : found.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        yield False, text.rstrip(" \t\r\n") if found[1] else text
        yield True, found[2].strip()
        at, trim = found.end(), bool(found[3])
    rest = template[at:]
    yield False, rest.lstrip(" \t\r\n") if trim else rest


def _block(pieces: Sequence[tuple[bool, str]], at: int, scope: dict[str, Any], write: bool = True) -> tuple[str, int]:
    """Write pieces from `at` to the block's `end` or `else`; the text, and where that stands."""
    out = ""
    while at < len(pieces):
        is_action, text = pieces[at]
        word = text.partition(" ")[0]
        if not is_action:
            out, at = out + (text if write else ""), at + 1
        elif word in ("end", "else"):
            return out, at
        elif word == "range":
            begin, made = at + 1, ""
            for item in _value(text[6:], scope) if write else ():
                part, at = _block(pieces, begin, {**scope, **{f".{k.capitalize()}": v for k, v in item.items()}})
                made += part
            if not made:
                _, at = _block(pieces, begin, scope, write=False)
            out, at = out + made, at + 1
        elif word == "if":
            made, at = _branches(pieces, at, scope, write)
            out += made
        elif ":=" in text:
            name, _, value = text.partition(":=")
            scope[name.strip()] = _value(value.strip(), scope) if write else None
            at += 1
        else:
            out, at = out + (str(_value(text, scope)) if write else ""), at + 1
    return out, at


def _branches(pieces: Sequence[tuple[bool, str]], at: int, scope: dict[str, Any], write: bool) -> tuple[str, int]:
    out, done = "", False
    while True:
        text = pieces[at][1].removeprefix("else").strip()
        holds = write and not done and (not text or bool(_value(text.removeprefix("if").strip(), scope)))
        made, at = _block(pieces, at + 1, scope, holds)
        out, done = out + made, done or holds
        if pieces[at][1] == "end":
            return out, at + 1


def _value(text: str, scope: Mapping[str, Any]) -> Any:
    words = re.findall(r'"(?:[^"\\]|\\.)*"|\S+', text)
    if words[0] in ("eq", "ne"):
        return (_value(words[1], scope) == _value(words[2], scope)) == (words[0] == "eq")
    if words[0] == "index":
        return _value(words[1], scope)[int(words[2])]
    assert len(words) == 1, text
    if text.startswith('"'):
        return json.loads(text)  # the escapes that we write mean the same in Go and in JSON
    if text.startswith("$"):
        name, _, attribute = text.partition(".")
        return scope[name][attribute.lower()] if attribute else scope[name]
    return scope[text]


def test_the_reader_of_go_templates_knows_what_it_should() -> None:
    """Against the examples of Go's own documentation of text/template."""
    talk = [{"role": "user", "content": "U"}, {"role": "tool", "content": "T"}]
    assert go('{{"23" -}} < {{- "45"}}', talk) == "23<45"
    assert go('{{ "q\\"\\\\\\n" }}', talk) == 'q"\\\n'
    assert go("a {{ range .Messages }} {{ .Content }} {{ end }} b", talk) == "a  U  T  b"
    assert (
        go(
            '{{ range .Messages }}{{ if eq .Role "user" }}1{{ else if ne .Role "tool" }}2{{ else }}3{{ end }}{{ end }}',
            talk,
        )
        == "13"
    )
    assert go('{{ $f := index .Messages 0 }}{{ if ne $f.Role "system" }}x{{ end }}', talk) == "x"


def test_the_go_template_says_what_the_checkpoints_own_says() -> None:
    for name in ("gpt-2", "smollm"):
        chat = Tokenizer(as_in_a_checkpoint(name), {"eos_token": SPECIAL[2]}, CHATML)
        template = template_of(modelfile(chat, "m.gguf"))
        for talk in TALKS:
            assert go(template, talk) == chat.render(talk, add_generation_prompt=True) == turns(chat).render(talk)
