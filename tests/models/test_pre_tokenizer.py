"""A tokenizer out of a .gguf file cuts text where the checkpoint's own tokenizer.json does, for every known name."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Fast

from tests.models import tiny
from veneer.errors import Unsupported
from veneer.formats.gguf_export import export_model
from veneer.formats.gguf_words import tokenizer_fields
from veneer.merge import store_of
from veneer.models.catalog import find
from veneer.models.gguf import GgufFile
from veneer.models.gguf_file import Container
from veneer.models.load import load_base
from veneer.models.pre_tokenizer import CUTS, ONLY_ONE, SAME_AS, cut_as, cut_named, name_of
from veneer.models.tokenizer import Tokenizer

HARD = [
    "1234567890 and 3.14159, 2024-11-22T03:18:02Z, 1e-05, 0x1F600",
    "½ ² Ⅷ ١٢٣ १२३ 四五 a1b22c333d4444",
    "I'm, I'LL, we've, they'RE, it's, 'tis, d'accord, '' 's",
    "  leading, trailing  \t tab\n\nlines\r\n   \r\n\n  end \u00a0\u3000 ",
    "naïve Ångström A\u030angstrom e\u0301 ﬁ 漢字かな交じり 한국어 العربية עִבְרִית ไทย",
    "🙂‍↔️👩‍👩‍👧‍👦 \u200b\ufeff ﷽ \U0001d518\U0001d52b",
    "camelCaseHTTPServer snake_case_9 kebab-case ///path//to/file.py#L10 <|im_end|> <b>",
    "def f(x):\n\treturn x**2  # 42\n\n\n",
    "!!!??? ... --- === ### \\n\\t \x00\x1f",
    "",
]
CORPUS = [
    *HARD,
    "the 12 lines of 1999 and the 345 others weren't what they'd said: HELLO World 100% of 2024's 12/12",
] * 4
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def as_in_a_checkpoint(name: str) -> Fast:
    """A tokenizer.json as the makers of these models publish them, its merges learned with its own way of cutting."""
    cut = CUTS[name]
    fast = Fast.from_str(json.dumps(cut_as(json.loads(Fast(models.BPE()).to_str()), cut)))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if cut.adds_bos:
        fast.post_processor = processors.TemplateProcessing(
            "<|endoftext|> $A", None, [(SPECIAL[0], fast.token_to_id(SPECIAL[0]))]
        )
    return fast


def gguf_file(folder: Path, tokenizer: Tokenizer, **changes: Any) -> Path:
    """A tiny model with this tokenizer, as our own export writes it; a field set to None is left out."""
    base = load_base(tiny.checkpoint("llama", folder / "m", vocab_size=704), "float32")
    words = {k: v for k, v in (tokenizer_fields(tokenizer, 704) | changes).items() if v is not None}
    export_model(store_of(base), folder / "m.gguf", words, filetype="f16")
    return folder / "m.gguf"


@pytest.mark.parametrize("name", CUTS)
def test_ids_survive_the_way_through_a_gguf_file(name: str, tmp_path: Path) -> None:
    fast = as_in_a_checkpoint(name)
    original = Tokenizer(fast, {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2]})
    stated = {"tokenizer.ggml.add_bos_token": None}  # files of the models that add BOS by themselves do not say so
    file = gguf_file(tmp_path, original, **stated)
    assert Container(file).fields["tokenizer.ggml.pre"] == name
    GgufFile(file).tokenizer_files(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for text in HARD:
        assert ours.encode(text) == original.encode(text), text
        assert ours.encode(text, special=True) == original.encode(text, special=True), text
        assert ours.decode(ours.encode(text), skip_special=False) == original.decode(
            original.encode(text), skip_special=False
        )
    assert ours.eos_ids == original.eos_ids and ours.adds_bos == CUTS[name].adds_bos


def test_every_way_is_told_from_the_others() -> None:
    """On these texts no two names cut alike, but for those that differ in what comes after or before the cutting."""
    pieces = {name: [fast_pieces(as_in_a_checkpoint(name), text) for text in HARD] for name in CUTS}
    alike = {(a, b) for a in CUTS for b in CUTS if a < b and pieces[a] == pieces[b]}
    assert alike == {("gpt-2", "olmo"), ("dbrx", "llama-bpe")}


def fast_pieces(fast: Fast, text: str) -> list[str]:
    return [piece for piece, _ in fast.pre_tokenizer.pre_tokenize_str(text)]


def test_the_expressions_are_those_of_transformers() -> None:
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert CUTS["qwen2"].pattern == PRETOKENIZE_REGEX
    for name, pattern in theirs.GGUF_PRE_TOKENIZER_SPLITS.items():
        cut = CUTS.get(SAME_AS.get(name, name))
        assert cut is None or cut.pattern == pattern, name


@pytest.mark.parametrize("pre", ["bloom", "viking"])
def test_a_way_that_is_not_known_is_refused_before_anything_is_converted(pre: str, tmp_path: Path) -> None:
    file = gguf_file(tmp_path, Tokenizer(as_in_a_checkpoint("gpt-2"), {}), **{"tokenizer.ggml.pre": pre})
    with pytest.raises(Unsupported, match=f"in the way '{pre}'") as caught:
        load_base(file)
    assert "tokenizer.json" in str(caught.value.help)


@pytest.mark.parametrize("pre", [None, "default"])
def test_older_files_do_not_name_their_way(pre: str | None) -> None:
    assert [cut_named(pre, arch, "m.gguf") for arch in ONLY_ONE] == [CUTS[name] for name in ONLY_ONE.values()]
    with pytest.raises(Unsupported, match="does not say how"):
        cut_named(pre, "llama", "m.gguf")


def test_a_tokenizer_that_no_one_can_build_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_string("tokenizer.ggml.model", "rwkv")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("token_embd.weight", torch.zeros(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Unsupported, match=r"tokenizer in .* cannot be read"):
        GgufFile(tmp_path / "m.gguf").tokenizer_files(tmp_path)


@pytest.mark.parametrize("arch", ["llama", "phi3", "gemma2"])
@pytest.mark.parametrize("adds", [None, True, False])
def test_a_sentencepiece_text_begins_with_a_space_where_the_file_says_so(
    arch: str, adds: bool | None, tmp_path: Path
) -> None:
    pieces = ["▁", "h", "i", "▁h", "hi", "▁hi", "▁▁"]
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), arch)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces])
    writer.add_token_scores([-1000.0] * 259 + [-float(i) for i in range(len(pieces))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(pieces)])
    writer.add_bos_token_id(1)
    if adds is not None:
        writer.add_add_space_prefix(adds)
    writer.add_tensor("token_embd.weight", torch.zeros(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    GgufFile(tmp_path / "m.gguf").tokenizer_files(tmp_path)
    fast = Fast.from_file(str(tmp_path / "tokenizer.json"))
    said = adds is not False and arch != "gemma2"  # Gemma's never does
    assert fast.encode("hi hi", add_special_tokens=False).tokens == ["▁hi" if said else "hi", "▁hi"]
    for text in ("hi hi", " hi", "hi  hi", "héhi"):
        assert fast.decode(fast.encode(text, add_special_tokens=False).ids) == text or said


def test_what_changes_text_before_it_is_cut_has_no_name() -> None:
    data = json.loads(as_in_a_checkpoint("qwen2").to_str())
    assert name_of(data) == "qwen2" == name_of(data | {"normalizer": None})
    assert name_of(data | {"normalizer": {"type": "Lowercase"}}) is None
    prefixed = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    assert name_of(data | {"pre_tokenizer": prefixed}) is None and name_of(data | {"pre_tokenizer": None}) is None


# The demo base -------------------------------------------------------------------------------------------------------


def by_definition(fields: dict[str, Any], text: str) -> list[int]:
    """SmolLM's tokenizer from its definition: cut off digits, cut as GPT-2 does, then merge the best-ranked pair first."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(fields["tokenizer.ggml.merges"])}
    ids = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    codes = {int(byte): char for byte, char in byte_letters().items()}
    gpt2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    found: list[int] = []
    for part in regex.split(r"(\p{N})", text):
        for piece in gpt2.findall(part):
            letters = [codes[byte] for byte in piece.encode()]
            while len(letters) > 1:
                rank, at = min((ranks.get((a, b), 10**9), i) for i, (a, b) in enumerate(pairwise(letters)))
                if rank == 10**9:
                    break
                letters[at : at + 2] = [letters[at] + letters[at + 1]]
            found += [ids[token] for token in letters]
    return found


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others follow from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@pytest.mark.slow
def test_the_demo_base_reads_text_by_its_definition(tmp_path: Path) -> None:
    file = find("smollm2-135m")
    ours = load_base("smollm2-135m").require_tokenizer()
    fields = Container(file).fields
    for text in HARD:
        if "<|" not in text:
            assert ours.encode(text) == by_definition(fields, text), text
    assert ours.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]  # the published tokenizer.json's
    assert tokenizer_fields(ours, 49152)["tokenizer.ggml.pre"] == "smollm"
    assert tokenizer_fields(ours, 49152)["tokenizer.ggml.merges"] == fields["tokenizer.ggml.merges"]


@pytest.mark.slow
@pytest.mark.parity
def test_the_demo_base_reads_as_many_tokens_as_llama_cpp_does() -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    ours = load_base("smollm2-135m").require_tokenizer()
    params = xllamacpp.CommonParams()
    params.model.path = str(find("smollm2-135m"))
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    for text in HARD[:8]:
        answer = server.handle_completions({"prompt": text, "max_tokens": 1, "temperature": 0})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        assert answer["usage"]["prompt_tokens"] == len(ours.encode(text)), text
