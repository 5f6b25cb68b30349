""".gguf files: every family's tensors come back in the checkpoint's order, and damaged files are refused with a reason."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import pytest
import torch

from tests.models import gguf_writer, tiny
from veneer.engine.arena import Arena
from veneer.errors import FormatError, Unsupported, VeneerError
from veneer.models.base import Base
from veneer.models.families import decoder_config
from veneer.models.gguf import GgufFile
from veneer.models.gguf_file import Container
from veneer.models.load import load_base
from veneer.types import Segment

Change: TypeAlias = Callable[[bytes], bytes]
VARIANTS = (
    "llama",
    "llama-tied-mha",
    "llama-linear",
    "llama-yarn",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt_neox",
    "gpt2",
)


@pytest.mark.parametrize("name", VARIANTS)
def test_tensors_and_config_come_back(name: str, tmp_path: Path) -> None:
    changes = {"query_pre_attn_scalar": 16} if name.startswith("gemma") else {}
    if name == "gemma3_text":
        changes |= {"sliding_window_pattern": 6, "num_hidden_layers": 6}
    model = tiny.hf_model(name, **changes)
    file = GgufFile(gguf_writer.write(model, tmp_path / "m.gguf"))
    wanted = decoder_config(json.loads(model.config.to_json_string()))
    found = decoder_config(file.config)
    assert found.norm_eps == pytest.approx(wanted.norm_eps)
    assert found.rope.theta == pytest.approx(wanted.rope.theta)
    assert found.attention_softcap == pytest.approx(wanted.attention_softcap)
    alike = {f: getattr(wanted, f) for f in ("norm_eps", "rope", "local_rope", "attention_softcap", "logit_softcap")}
    assert replace(found, **alike) == wanted
    assert found.rope.dim == wanted.rope.dim
    stored = model.state_dict()
    for tensor in set(stored) - ({"lm_head.weight"} if wanted.tied_head else set()):
        assert file.shapes[tensor] == tuple(stored[tensor].shape)
        assert torch.allclose(file.read(tensor), stored[tensor], atol=1e-6), tensor


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_logits_equal_transformers_load_of_the_same_file(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    gguf_writer.write(tiny.hf_model(name), tmp_path / "m.gguf")
    base = load_base(tmp_path / "m.gguf", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(ids).logits
        assert (base.logits(ids) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert base.tokenizer is None


def stated(model: Any, path: Path, **fields: Any) -> GgufFile:
    """The model as a file that says these things, too."""
    whole = gguf_writer._particular

    def saying(writer: gguf.GGUFWriter, config: Any, family: str, head_dim: int) -> None:
        whole(writer, config, family, head_dim)
        for key, value in fields.items():
            name = f"{writer.arch}.{key.replace('__', '.')}"
            writer.add_array(name, value) if isinstance(value, list) else (
                writer.add_bool(name, value) if isinstance(value, bool) else writer.add_float32(name, value)
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_writer, "_particular", saying)
        return GgufFile(gguf_writer.write(model, path))


def test_what_a_file_says_of_windows_and_of_local_frequencies_is_read(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    gemma = tiny.hf_model("gemma3_text", num_hidden_layers=6, layer_types=kinds)
    says = {"attention__sliding_window_pattern": [kind == "sliding_attention" for kind in kinds]}
    file = stated(gemma, tmp_path / "g.gguf", **says, rope__freq_base_swa=50.0, attention__scale=0.25)
    found = decoder_config(file.config)
    assert found.local_layers == (True, False) * 3
    assert found.local_rope is not None and found.local_rope.theta == 50.0
    assert found.attention_scale == 0.25


def test_what_a_file_says_of_yarn_is_read_or_refused(tmp_path: Path) -> None:
    yarn = tiny.hf_model("llama-yarn")
    betas = {"rope__scaling__yarn_beta_fast": 16.0, "rope__scaling__yarn_beta_slow": 2.0}
    scaling = decoder_config(stated(yarn, tmp_path / "b.gguf", **betas).config).rope.scaling
    assert (scaling["beta_fast"], scaling["beta_slow"]) == (16.0, 2.0)
    with pytest.raises(Unsupported, match="YaRN"):
        _ = stated(yarn, tmp_path / "a.gguf", rope__scaling__attn_factor=0.5).config
    with pytest.raises(Unsupported, match=r"attention by 0\.5"):
        _ = stated(tiny.hf_model("llama"), tmp_path / "s.gguf", attention__scale=0.5).config
    with pytest.raises(Unsupported, match="is_causal"):
        decoder_config(stated(tiny.hf_model("llama"), tmp_path / "c.gguf", attention__causal=False).config)


def test_llama_3_frequencies_come_as_a_tensor(tmp_path: Path) -> None:
    divisors = torch.linspace(1.0, 8.0, 6)
    model = tiny.hf_model("llama")
    file = GgufFile(gguf_writer.write(model, tmp_path / "m.gguf", **{"rope_freqs.weight": divisors}))
    scaling = decoder_config(file.config).rope.scaling
    assert scaling["short_factor"] == scaling["long_factor"] == pytest.approx(divisors.tolist())
    assert scaling["attention_factor"] == 1.0
    assert load_base(tmp_path / "m.gguf", dtype="float32").decoder.turn == math.inf
    assert "rope_freqs.weight" not in file.shapes


def test_quantised_blocks_are_dequantised_as_gguf_does(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    writer = gguf.GGUFWriter(str(tmp_path / "q.gguf"), "llama")
    kinds = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "BF16", "F32")
    for kind in kinds:
        packed = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(kind, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = Container(tmp_path / "q.gguf")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(str(tmp_path / "q.gguf")).tensors}
    for kind in kinds:
        wanted = gguf.quants.dequantize(theirs[kind].data, theirs[kind].tensor_type)
        assert np.array_equal(file.dense(kind).numpy(), wanted.astype(np.float32)), kind


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = gguf_writer.write(tiny.hf_model("llama"), tmp_path / "m.gguf").read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"not a model at all",
        "cut header": whole[:90],
        "cut data": whole[:-100],
        "version": whole[:4] + b"\x09\x00\x00\x00" + whole[8:],
        "huge count": whole[:16] + b"\xff" * 8 + whole[24:],
    }.items():
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(FormatError, match="complete GGUF"):
            load_base(tmp_path / "bad.gguf")
        assert name
    writer = gguf.GGUFWriter(str(tmp_path / "mamba.gguf"), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(Unsupported, match="'mamba' model"):
        load_base(tmp_path / "mamba.gguf")


def renamed(old: bytes, new: bytes) -> Change:
    return lambda whole: whole.replace(old, new, 1)


def number(key: bytes, value: int, beyond: int = 4) -> Change:
    """Other 32 bits behind a name: a field's value (behind its type), or how many dimensions a tensor has."""

    def change(whole: bytes) -> bytes:
        at = whole.index(key) + len(key) + beyond
        return whole[:at] + struct.pack("<I", value) + whole[at + 4 :]

    return change


def field(key: bytes, kind: int, value: bytes) -> Change:
    """One more field, before the others."""
    more = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    return lambda whole: whole[:16] + struct.pack("<Q", whole[16] + 1) + more + whole[24:] + bytes(64)


@pytest.mark.parametrize(
    ("kind", "change", "word"),
    [
        (
            FormatError,
            renamed(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"),
            "blk.0.attn_q.weight stands in it twice",
        ),
        (FormatError, field(b"llama.block_count", 4, struct.pack("<I", 2)), "llama.block_count stands in it twice"),
        (FormatError, field(b"general.alignment", 4, struct.pack("<I", 0)), "aligned to 0"),
        (FormatError, field(b"general.alignment", 8, struct.pack("<Q", 1) + b"8"), "aligned to '8'"),
        (FormatError, field(b"deep", 9, struct.pack("<IQ", 9, 1) * 10_000), "not a complete GGUF file"),
        (FormatError, number(b"blk.0.attn_q.weight", 5, 0), "5 dimensions"),
        (FormatError, renamed(b"llama.block_count", b"llama.black_count"), "llama.block_count is None"),
        (FormatError, number(b"llama.block_count", 1 << 23), "too few for 8388608 blocks"),
        (FormatError, number(b"llama.block_count", (1 << 32) - 1), "llama.block_count is 4294967295"),
        (FormatError, number(b"llama.attention.head_count", 0), "llama.attention.head_count is 0"),
        (Unsupported, field(b"split.count", 2, struct.pack("<H", 3)), "one of 3 pieces"),
    ],
)
def test_a_header_that_cannot_be_is_refused_at_once(
    kind: type[VeneerError], change: Change, word: str, tmp_path: Path
) -> None:
    whole = gguf_writer.write(tiny.hf_model("llama"), tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(change(whole))
    with pytest.raises(kind, match=word) as caught:
        load_base(tmp_path / "m.gguf")
    assert caught.value.help


def test_rows_are_whole_blocks(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "q.gguf"), "llama")
    writer.add_tensor("q", np.zeros((4, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = (tmp_path / "q.gguf").read_bytes()
    assert Container(tmp_path / "q.gguf").tensors["q"].shape == (4, 32)
    (tmp_path / "q.gguf").write_bytes(whole.replace(struct.pack("<QQ", 32, 4), struct.pack("<QQ", 16, 8)))
    with pytest.raises(FormatError, match="rows of 16 numbers are no whole blocks of 32"):
        Container(tmp_path / "q.gguf")


@pytest.mark.slow
@pytest.mark.parity
def test_the_demo_base_says_what_transformers_says() -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    from veneer.models.catalog import find

    path = find("smollm2-135m")
    base = load_base("smollm2-135m", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.tensor([base.require_tokenizer().encode("The capital of France is Paris, and the capital of Italy is")])
    with torch.no_grad():
        wanted = theirs(ids).logits
        found = base.logits(ids)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert base.require_tokenizer().decode([int(found[0, -1].argmax())]) == " Rome"
    said = theirs.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    assert greedy(base, ids[0], 32) == said.tolist()


def greedy(base: Base, ids: torch.Tensor, count: int) -> list[int]:
    """Greedy text with a cache."""
    config = base.config
    arena = Arena(config.layers, config.kv_heads, config.head_dim, base.dtype, base.device)
    arena.open(0, len(ids) + count)
    feed, start, said = ids, 0, []
    with torch.no_grad():
        for _ in range(count):
            last = torch.tensor([len(feed) - 1])
            hidden = base.decoder.forward(feed, [Segment(len(feed), 0, -1, start)], cache=arena, rows=last)
            start, feed = start + len(feed), base.decoder.logits(hidden).argmax(1)
            said.append(int(feed))
    return said
