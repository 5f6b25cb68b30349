"""Every family computes what transformers computes: logits, one step's adapter gradients, greedy text with a cache."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models import tiny
from veneer.engine.arena import Arena
from veneer.errors import FormatError, Unsupported
from veneer.inject import create
from veneer.methods import lower
from veneer.methods.lora import LoRA
from veneer.models.bank import EMPTY, Bank, spans_of
from veneer.models.base import Base
from veneer.models.families import FAMILIES, decoder_config, layout
from veneer.types import Segment

LENGTHS = (5, 23, 1, 40, 11)
LENGTH_DEPENDENT = {"llama-dynamic", "phi3-longrope"}


@cache
def pair(name: str) -> tuple[Base, Any]:
    return tiny.base(name)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 97, (n,), generator=generator) for n in lengths]


def packed_logits(base: Base, ids: list[Tensor], bank: Bank = EMPTY, adapter: int = -1) -> list[Tensor]:
    segments = [Segment(len(x), i, adapter) for i, x in enumerate(ids)]
    hidden = base.decoder.forward(torch.cat(ids), segments, bank)
    return list(base.decoder.logits(hidden, spans_of(segments), bank).split([len(x) for x in ids]))


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_packed_logits_equal_transformers_alone(name: str) -> None:
    base, model = pair(name)
    with torch.no_grad():
        for found, ids in zip(packed_logits(base, prompts()), prompts(), strict=True):
            close(found, model(ids[None]).logits[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [n for n in tiny.VARIANTS if n not in LENGTH_DEPENDENT])
def test_packed_logits_equal_transformers_padded(name: str, side: str) -> None:
    base, model = pair(name)
    ids = prompts((4, 17, 9))
    longest = max(map(len, ids))
    batch, mask = torch.zeros(len(ids), longest, dtype=torch.long), torch.zeros(len(ids), longest, dtype=torch.long)
    real = [slice(longest - len(x), longest) if side == "left" else slice(len(x)) for x in ids]
    for row, (x, where) in enumerate(zip(ids, real, strict=True)):
        batch[row, where], mask[row, where] = x, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(batch, attention_mask=mask, position_ids=positions).logits
        for row, found in enumerate(packed_logits(base, ids)):
            close(found, padded[row, real[row]])


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_every_path_is_a_module_of_transformers(name: str) -> None:
    base, model = pair(name)
    modules = dict(model.named_modules())
    for path, shape in base.shape.hosts.items():
        weight = modules[path].weight
        stored = (shape.in_features, shape.out_features)
        assert tuple(weight.shape) == (stored if shape.kind in ("conv1d", "embedding") else stored[::-1])
        host = base.host(path)
        assert host.shape == shape
        assert torch.equal(host.weight(), weight.t() if shape.kind in ("conv1d", "embedding") else weight)


@pytest.mark.parity
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_adapter_gradients_of_a_step_equal_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    base, model = tiny.base(name)
    generator = torch.Generator().manual_seed(3)
    adapter = create(base, LoRA(rank=4, alpha=8), generator)
    adapter = adapter.map_tensors(lambda t: (torch.randn(t.shape, generator=generator) * 0.1).requires_grad_())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(adapter.targets), fan_in_fan_out=name == "gpt2")
    theirs = peft.get_peft_model(model, config).eval()
    layers = {path: theirs.base_model.model.get_submodule(path) for path in adapter.targets}
    with torch.no_grad():
        for part in adapter.parts:
            layers[part.target].lora_A["default"].weight.copy_(part.tensors["A"])
            layers[part.target].lora_B["default"].weight.copy_(part.tensors["B"])
    ids = prompts((9, 20))
    bank = base.bank([lower(adapter, base)])
    ours = sum(loss(logits, x) for logits, x in zip(packed_logits(base, ids, bank, 0), ids, strict=True))
    wanted = sum(loss(theirs(x[None]).logits[0], x) for x in ids)
    ours.backward()
    wanted.backward()
    close(ours.detach(), wanted.detach())
    for part in adapter.parts:
        close(part.tensors["A"].grad, layers[part.target].lora_A["default"].weight.grad)
        close(part.tensors["B"].grad, layers[part.target].lora_B["default"].weight.grad)


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1], ids[1:], reduction="sum")


@pytest.mark.parametrize("name", [n for n in tiny.VARIANTS if n not in LENGTH_DEPENDENT])
def test_greedy_text_with_a_cache_equals_transformers(name: str) -> None:
    base, model = pair(name)
    config = base.config
    ids = prompts((6, 13))
    arena = Arena(config.layers, config.kv_heads, config.head_dim, base.dtype, base.device)
    for i in range(len(ids)):
        arena.open(i, 64)
    feed, starts, said = ids, [0] * len(ids), [[] for _ in ids]
    with torch.no_grad():
        for step in range(32):
            segments = [Segment(len(x), i, -1, start) for i, (x, start) in enumerate(zip(feed, starts, strict=True))]
            for i, (x, start) in enumerate(zip(feed, starts, strict=True)):
                arena.reserve(i, start + len(x))
            last = torch.tensor([len(x) for x in feed]).cumsum(0) - 1
            hidden = base.decoder.forward(torch.cat(feed), segments, cache=arena, rows=last)
            starts = [start + len(x) for start, x in zip(starts, feed, strict=True)]
            feed = [token[None] for token in base.decoder.logits(hidden).argmax(1)]
            for i, token in enumerate(feed):
                said[i].append(int(token))
                if step == 0:
                    arena.seat(i, starts[i])
        for x, tokens in zip(ids, said, strict=True):
            wanted = model.generate(x[None], max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)[
                0, len(x) :
            ]
            assert tokens == wanted.tolist()


def test_older_configs_say_the_same() -> None:
    """transformers 4 wrote rope_theta and rope_scaling where 5 writes rope_parameters."""
    new = json.loads(tiny.hf_config("llama-llama3").to_json_string())
    old = {k: v for k, v in new.items() if k != "rope_parameters"} | {
        "rope_theta": tiny.LLAMA3_ROPE["rope_theta"],
        "rope_scaling": {k: v for k, v in tiny.LLAMA3_ROPE.items() if k not in ("rope_theta", "rope_type")}
        | {"type": "llama3"},
    }
    assert decoder_config(old) == decoder_config(new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "model type 'mamba'"),
        ({"hidden_act": "xielu"}, "the activation is 'xielu'"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1.0}}, "rotary scaling 'axial'"),
        ({"num_key_value_heads": 3}, "not a multiple of 3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "stored quantised"),
        ({"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "add_cross_attention": True}, "add_cross"),
        ({"is_causal": False}, "is_causal is False"),
        ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "turns 6 of a head's 12 dimensions"),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 30.0, "rope_parameters": None},
            "attn_logit_softcapping",
        ),
    ],
)
def test_what_would_change_the_arithmetic_is_refused(change: dict[str, Any], words: str) -> None:
    raw = json.loads(tiny.hf_config("llama").to_json_string())
    with pytest.raises(Unsupported, match=words) as caught:
        decoder_config(raw | change)
    assert "veneer.attach" in str(caught.value)


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"rope_theta": 500.0, "rope_local_base_freq": 77.0},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {}}},
        {"rope_theta": 9.0, "rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}},
        {
            "rope_parameters": {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 9.0}},
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        },
        {"_sliding_window_pattern": 2},
    ],
)
def test_gemma_3_means_what_transformers_understands(stated: dict[str, Any]) -> None:
    """What a config.json leaves out, states in the old way, or in both ways."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 80}
    raw = {"model_type": "gemma3_text", "vocab_size": 97, **sizes, **stated}
    theirs = json.loads(AutoConfig.for_model(**json.loads(json.dumps(raw))).to_json_string(use_diff=False))
    assert decoder_config(raw) == decoder_config(theirs)


def test_missing_sizes_are_named_at_once() -> None:
    with pytest.raises(FormatError, match="hidden_size, num_hidden_layers"):
        decoder_config({"model_type": "llama", "num_attention_heads": 2, "vocab_size": 3, "intermediate_size": 4})


@pytest.mark.parametrize("family", FAMILIES)
def test_native_names_follow_the_layout(family: str) -> None:
    base, _ = pair(family)
    where = layout(base.config)
    assert [g.name for g in where.groups[:4]] == [f"layers.0.{n}" for n in ("qkv", "o", "up", "down")]
    assert {"embed", "final_norm"} <= set(where.tensors)
