"""Heads and embeddings in merged and exported files: tied, stored twice, stored apart, under names of other families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.merge.test_merge import folder, hf_logits, ours, trained
from tests.models.tiny import checkpoint
from veneer.errors import BaseMismatch, TargetError
from veneer.formats.gguf_export import export_model
from veneer.formats.gguf_words import tokenizer_fields
from veneer.inject import ModuleSource, attach, create
from veneer.merge import Merged, merge, store_of
from veneer.methods.lora import LoRA
from veneer.methods.token_rows import TokenRows
from veneer.models.load import load_base

EMBED = "model.embed_tokens.weight"


def with_head(tmp_path: Path, *, own: bool) -> Path:
    """A folder whose config.json ties the head, and whose file has one: of its own, or the table once more."""
    place = folder(tmp_path, tie_word_embeddings=True)
    tensors = load_file(place / "model.safetensors")
    tensors["lm_head.weight"] = tensors[EMBED].flip(0).contiguous() if own else tensors[EMBED].clone()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_a_stored_head_that_differs_counts_whatever_the_config_says(tmp_path: Path) -> None:
    place = with_head(tmp_path, own=True)
    base = load_base(place, "float32")
    adapter = trained(base, LoRA(rank=2, targets=("embed_tokens", "q_proj")))
    merge(base, adapter, tmp_path / "out")
    assert off(hf_logits(tmp_path / "out"), ours(base, adapter)) < 1e-4
    head = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, load_file(place / "model.safetensors")["lm_head.weight"])
    for model, name in ((store_of(base), "plain"), (Merged(base, adapter), "merged")):
        export_model(model, tmp_path / f"{name}.gguf", tokenizer_fields(None, 0), filetype="f32")
    ids = torch.arange(3, 33).view(2, 15)
    assert off(load_base(tmp_path / "plain.gguf", "float32").logits(ids), base.logits(ids)) < 1e-4
    assert off(load_base(tmp_path / "merged.gguf", "float32").logits(ids), ours(base, adapter)) < 1e-4


def test_replaced_rows_reach_a_table_that_is_stored_twice(tmp_path: Path) -> None:
    base = load_base(with_head(tmp_path, own=False), "float32")
    adapter = trained(base, TokenRows(tokens=(5, 9)), 0.3)
    merge(base, adapter, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored[EMBED], stored["lm_head.weight"])
    assert off(hf_logits(tmp_path / "out"), ours(base, adapter)) < 1e-4


def test_a_head_that_a_family_calls_otherwise_keeps_its_adapter(tmp_path: Path) -> None:
    place = folder(tmp_path, "gpt_neox")
    export_model(store_of(load_base(place, "float32")), tmp_path / "m.gguf", tokenizer_fields(None, 0), filetype="f32")
    base = load_base(tmp_path / "m.gguf", "float32")
    adapter = trained(base, LoRA(rank=2, targets=(base.layout.head_path,)), 0.1)
    report = merge(base, adapter, tmp_path / "out")
    assert len(report.tensors) == 1
    assert off(hf_logits(tmp_path / "out"), ours(base, adapter)) < 1e-4
    assert off(hf_logits(tmp_path / "out"), hf_logits(place)) > 1e-3


def other_family(name: str) -> nn.Module:
    import transformers as hf

    sizes: dict[str, Any] = {
        "bloom": dict(vocab_size=53, hidden_size=16, n_layer=1, n_head=2),
        "falcon": dict(vocab_size=53, hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        "openai-gpt": dict(vocab_size=53, n_embd=16, n_layer=1, n_head=2, n_positions=32),
        "mamba": dict(vocab_size=53, hidden_size=16, num_hidden_layers=1, state_size=4),
    }
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(name, tie_word_embeddings=True, **sizes[name])
    return hf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["bloom", "falcon", "openai-gpt", "mamba"])
def test_a_tied_table_is_known_under_any_familys_name(name: str, tmp_path: Path) -> None:
    model = other_family(name)
    model.save_pretrained(tmp_path / "base")
    (table,) = [path for path, m in model.named_modules() if isinstance(m, nn.Embedding) and m.num_embeddings == 53]
    made = create(ModuleSource(model), LoRA(rank=2, targets=(table,)), torch.Generator().manual_seed(0))
    adapter = made.map_tensors(lambda t: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(TargetError, match="is tied"):
        merge(tmp_path / "base", adapter, tmp_path / "out")
    merge(tmp_path / "base", adapter, tmp_path / "out", untie=True)
    attach(model, adapter)
    ids = torch.arange(3, 18)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        got = type(model).from_pretrained(tmp_path / "out").eval()(ids).logits
    assert off(got, wanted) < 1e-4


def test_what_is_exported_belongs_to_its_base(tmp_path: Path) -> None:
    right = load_base(checkpoint("llama", tmp_path / "right", seed=0), "float32")
    wrong = load_base(checkpoint("llama", tmp_path / "wrong", seed=1), "float32")
    adapter = trained(right, LoRA(rank=2))
    with pytest.raises(BaseMismatch):
        Merged(wrong, adapter)
    assert Merged(wrong, adapter, allow_base_mismatch="a test").base_check.outcome == "allowed"


def test_an_index_counts_its_parameters(tmp_path: Path) -> None:
    place = checkpoint("llama", tmp_path / "base", shard_size="60KB")
    merge(place, trained(load_base(place, "float32"), LoRA(rank=2)), tmp_path / "out")
    counts = [
        json.loads((p / "model.safetensors.index.json").read_text())["metadata"] for p in (place, tmp_path / "out")
    ]
    assert counts[0] == counts[1]
