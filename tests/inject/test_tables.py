"""Embeddings under `attach`: scaled ones, tied ones, and ones whose rows are not their weight. The native decoder agrees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.inject.test_attach import lora_on
from veneer.adapter import Adapter, Part
from veneer.errors import Unsupported
from veneer.inject import attach, attached
from veneer.methods.full import Full
from veneer.methods.lora import LoRA
from veneer.methods.token_rows import TokenRows
from veneer.models.load import load_base

IDS = [[5, 6, 7, 8, 9, 10, 11]]
EMBED = "model.embed_tokens"


def gemma() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=8,
    )
    return Gemma3ForCausalLM(config).eval()


def lora(model: nn.Module) -> Adapter:
    return lora_on(model, EMBED)


def rows() -> Adapter:
    tokens = torch.tensor([6, 9])
    part = Part("token_rows", "override", EMBED, {"tokens": tokens, "rows": torch.randn(2, 16)}, "embedding")
    return Adapter(TokenRows(tokens=(6, 9)), (part,))


def table() -> Adapter:
    part = Part("full", "override", EMBED, {"weight": torch.randn(53, 16)}, "embedding")
    return Adapter(Full(targets=(EMBED,)), (part,))


def theirs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor(IDS)).logits
    return logits.flatten(0, 1)


@pytest.mark.parametrize("kind", ["lora", "token_rows", "full"])
def test_a_scaled_and_tied_embedding_is_what_the_native_decoder_makes_of_it(kind: str, tmp_path: Path) -> None:
    model = gemma()
    adapter = lora(model) if kind == "lora" else rows() if kind == "token_rows" else table()
    model.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), dtype="float32")
    before = theirs(model)
    with attached(base, adapter):
        expected = base.logits(IDS).reshape(before.shape)
    assert not torch.allclose(expected, before, atol=1e-2)
    handle = attach(model, adapter)
    assert torch.allclose(theirs(model), expected, rtol=1e-4, atol=1e-4)
    with handle.disabled():
        assert torch.equal(theirs(model), before)
    handle.detach()
    assert torch.equal(theirs(model), before)


def test_rows_of_a_tied_table_are_trained_through_the_head_too() -> None:
    model = gemma()
    handle = attach(model, rows())
    model(input_ids=torch.tensor([[1, 2, 3]])).logits[..., 6].sum().backward()  # token 6 is not read, only scored
    (trained,) = handle.parameters()
    assert trained.grad is not None and trained.grad[0].any()
    assert [p.kind for p in handle.adapter().parts] == ["token_rows"]
    handle.detach()


def test_a_head_with_an_adapter_of_its_own_reads_the_replaced_table(tmp_path: Path) -> None:
    model = gemma()
    head = lora_on(model, "lm_head")
    both = Adapter(LoRA(rank=2, alpha=4), (*rows().parts, *head.parts))
    model.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), dtype="float32")
    with attached(base, both):
        expected = base.logits(IDS)
    attach(model, both)
    assert torch.allclose(theirs(model), expected.reshape(-1, 53), rtol=1e-4, atol=1e-4)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("layer", "word"), [(Doubled(4, 4), "a forward of its own"), (nn.Embedding(4, 4, max_norm=1.0), "max_norm")]
)
def test_a_layer_that_is_no_plain_product_is_refused(layer: nn.Module, word: str) -> None:
    model = nn.Sequential(layer, nn.Linear(4, 4))
    with pytest.raises(Unsupported, match=word):
        attach(model, lora_on(model, "0"))
    attach(model, lora_on(model, "1"))  # the layers beside it are none of its business
