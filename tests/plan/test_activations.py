"""Predicted activation bytes against what autograd really holds: every saved storage of one pass, counted once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from veneer.inject.targets import select
from veneer.methods import parse
from veneer.models.bank import Bank
from veneer.models.decoder import Decoder
from veneer.models.families import decoder_config, layout
from veneer.plan.activations import activation_bytes, saved
from veneer.plan.counts import adapter_tensors
from veneer.plan.estimate import Work, estimate, traffic_of
from veneer.plan.sizes import KNOWN
from veneer.types import Lowered, LowRank, Segment

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 96, "n_layer": 4, "n_head": 6, "n_positions": 512}
CLOSE = 0.04
"""The promise is ten percent; the formula names every tensor, so what is left is rotary tables and a view or two."""

BASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-float32": LLAMA,
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "gemma3": LLAMA | {"model_type": "gemma3_text", "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "olmo2": LLAMA | {"model_type": "olmo2"},
    "gpt_neox": LLAMA | {"model_type": "gpt_neox", "num_key_value_heads": 6, "rotary_pct": 0.5},
    "gpt2": GPT2,
}
TOKENS = 384


@contextmanager
def held(known: set[int]) -> Iterator[dict[int, int]]:
    """Storage -> bytes, of all that autograd saves inside; `known` storages are the weights."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def build(raw: dict[str, Any], fields: dict[str, Any], dtype: torch.dtype) -> tuple[Decoder, Bank, Any]:
    config = decoder_config(raw)
    where = layout(config)
    tensors: dict[str, Any] = {}
    for group in where.groups:
        tensors[group.name] = torch.randn(group.out_features, group.in_features, dtype=dtype) / 10
        if group.bias:
            tensors[f"{group.name}_bias"] = torch.zeros(group.out_features, dtype=dtype)
    rows = {"embed": config.vocab, "positions": config.max_positions}
    for name in where.tensors:
        last = name.rsplit(".", 1)[-1]
        if last in rows:
            tensors[name] = torch.randn(rows[last], config.hidden, dtype=dtype)
        elif last in ("q_norm", "k_norm"):
            wide = config.head_dim * (config.heads if last == "q_norm" else config.kv_heads)
            tensors[name] = torch.ones(config.head_dim if config.qk_norm == "head" else wide, dtype=dtype)
        else:
            tensors[name] = torch.ones(config.hidden, dtype=dtype)
    decoder = Decoder(config, where, tensors)
    spec = parse(fields)
    shape = where.base_shape(config)
    counted = list(adapter_tensors(spec, shape, select(shape, spec).targets))
    weights = {}
    for target in dict.fromkeys(t.target for t in counted):
        pair = [torch.randn(t.shape, requires_grad=True) for t in counted if t.target == target]
        weights[target] = (LowRank(pair[0], pair[1]),)
    bank = Bank.of([Lowered(weights=weights)], decoder.groups, where.embed_path)
    return decoder, bank, traffic_of(where, spec, counted, 1.0)


def measure(decoder: Decoder, bank: Bank, rows: torch.Tensor | None) -> int:
    known = {t.untyped_storage().data_ptr() for t in decoder.tensors.values()}
    for packed in bank.groups.values():
        known |= {t.untyped_storage().data_ptr() for p in packed.packs for t in (p.A, *p.B) if t is not None}
    tokens = torch.randint(0, decoder.config.vocab, (TOKENS,))
    segments = [Segment(TOKENS // 3, sequence, 0) for sequence in range(3)]
    with held(known) as found:
        hidden = decoder.forward(tokens, segments, bank, rows=rows)
        decoder.loss(hidden, torch.zeros(len(hidden), dtype=torch.long), None, [], bank).backward()
    return sum(found.values())


ALL = {"kind": "lora", "rank": 8}
FEW = {"kind": "lora", "rank": 4, "targets": ["*.q_proj", "*.v_proj"], "layers": "last:2"}
DOWN = {"kind": "lora", "rank": 4, "targets": ["*.down_proj"]}


@pytest.mark.parametrize(
    ("base", "fields"),
    [pytest.param(base, ALL, id=base) for base in sorted(BASES)]
    + [pytest.param(base, FEW, id=f"{base}-q-v-last-2") for base in ("llama", "llama-float32", "gemma3")]
    + [pytest.param(base, DOWN, id=f"{base}-down") for base in ("llama", "olmo2", "qwen3")],
)
def test_predicted_is_measured(base: str, fields: dict[str, Any]) -> None:
    dtype = torch.float32 if base == "llama-float32" else torch.bfloat16
    decoder, bank, traffic = build(BASES[base], fields, dtype)
    predicted = activation_bytes(decoder.config, traffic, TOKENS, dtype.itemsize)
    assert predicted == pytest.approx(measure(decoder, bank, None), rel=CLOSE)


def test_fewer_labels_are_fewer_bytes() -> None:
    decoder, bank, traffic = build(LLAMA, {"kind": "lora", "rank": 8}, torch.bfloat16)
    rows = torch.arange(0, TOKENS, 4)
    some = type(traffic)(traffic.ranks, traffic.from_input, label_share=0.25)
    predicted = activation_bytes(decoder.config, some, TOKENS, 2)
    assert predicted < activation_bytes(decoder.config, traffic, TOKENS, 2)
    assert predicted == pytest.approx(measure(decoder, bank, rows), rel=CLOSE)


def test_recomputed_blocks_keep_their_input_only() -> None:
    _, _, traffic = build(LLAMA, {"kind": "lora", "rank": 8}, torch.bfloat16)
    config = decoder_config(LLAMA)
    kept = [activation_bytes(config, traffic, TOKENS, 2, recompute=n) for n in range(config.layers + 1)]
    block = sum(saved(config, traffic, 2, 1).values())
    assert kept[1] > kept[2] > kept[4]
    assert kept[2] - kept[3] == pytest.approx(TOKENS * (block - 2 * config.hidden))


def test_the_formula_of_a_llama_block() -> None:
    """Every projection adapted, 16 bits: the closed form in the module's docstring."""
    config = decoder_config(KNOWN["Llama-3-8B"])
    where = layout(config)
    shape = where.base_shape(config)
    spec = parse({"kind": "lora", "rank": 16})
    traffic = traffic_of(where, spec, list(adapter_tensors(spec, shape, select(shape, spec).targets)), 1.0)
    h, wide, narrow, f = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim, 14336
    ranks = 16 * 7
    closed = 2 * (2 * h + 2 * (wide + narrow) + 2 * f) + 2 * ranks + 4 * config.heads
    assert sum(saved(config, traffic, 2, 5).values()) == closed


def test_bytes_grow_linearly_with_tokens() -> None:
    config = decoder_config(LLAMA)
    where = layout(config)
    spec = parse({"kind": "lora"})
    targets = select(where.base_shape(config), spec).targets
    found = [estimate(config, where, spec, targets, Work(tokens=n)).bytes["activations"] for n in (1000, 2000, 4000)]
    assert found[1] == 2 * found[0] and found[2] == 4 * found[0]
