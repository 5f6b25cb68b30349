"""Counts against the tensors themselves, for every family of decoders."""

from __future__ import annotations

import math

import pytest
import torch

from veneer.base.formats import load_all as load_formats
from veneer.base.quantized import quantize_parts
from veneer.errors import ConfigError
from veneer.models.checkpoint import shapes
from veneer.models.families import FAMILIES, decoder_config, layout
from veneer.ops.twelve_bit import TwelveBit
from veneer.plan.bytes import base_bytes, linear_bytes, stored_bytes
from veneer.plan.sizes import KNOWN, known_base, sizes_of

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 12,
}
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_the_tensors_of_the_checkpoint(family: str, tied: bool) -> None:
    raw = {"model_type": family, **(GPT2 if family == "gpt2" else SMALL), "tie_word_embeddings": tied}
    if family in ("phi3", "gpt_neox"):
        raw["num_key_value_heads"] = 4
    if family == "gpt_neox":
        raw.pop("head_dim")
    config = decoder_config(raw)
    where = layout(config)
    sizes = sizes_of(config, where)
    assert sizes.parameters == sum(math.prod(size) for size in shapes(config, where).values())
    assert base_bytes(sizes, "float32") == 4 * sizes.parameters
    assert base_bytes(sizes, "bfloat16", "nf4") == linear_bytes(sizes, "nf4") + 2 * (sizes.parameters - sizes.in_linear)


@pytest.mark.parametrize("name", sorted(load_formats()))
@pytest.mark.parametrize("size", [(64, 64), (130, 66), (1, 1), (300, 512)])
def test_quantised_bytes_are_the_tensors_that_are_kept(name: str, size: tuple[int, int]) -> None:
    (stored,) = quantize_parts([torch.randn(size)], name)
    listed = 10 * len(stored.places) if isinstance(stored, TwelveBit) else 0  # nobody knows before there are weights
    assert stored_bytes(name, *size) == stored.nbytes - listed


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("SmolLM2-135M", 134.5),
        ("SmolLM2-360M", 361.8),
        ("Qwen2.5-0.5B", 494.0),
        ("Llama-3.2-1B", 1235.8),
        ("Qwen2.5-1.5B", 1543.7),
        ("Llama-3.2-3B", 3212.7),
        ("LLaMA-13B", 13015.9),
        ("Qwen2.5-32B", 32763.9),
    ],
)
def test_known_shapes_have_their_published_size(name: str, millions: float) -> None:
    config = decoder_config(KNOWN[name])
    assert sizes_of(config, layout(config)).parameters / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ("7B", "LLaMA-7B"),
        ("8b", "Llama-3-8B"),
        ("135M", "SmolLM2-135M"),
        ("6738415616", "LLaMA-7B"),
        ("llama-2-70b", "Llama-2-70B"),
    ],
)
def test_a_size_finds_the_nearest_shape(size: str, name: str) -> None:
    assert known_base(size)[0] == name


@pytest.mark.parametrize("size", ["", "7 apples", "-3B", "0", "2T"])
def test_what_is_not_a_size(size: str) -> None:
    with pytest.raises(ConfigError):
        known_base(size)
