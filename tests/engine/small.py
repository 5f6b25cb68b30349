"""Small random bases and adapters, and the plainest way to generate from them: the yardstick for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

from veneer.adapter import Adapter, Part
from veneer.methods import lower, parse
from veneer.models.bank import spans_of
from veneer.models.base import Base
from veneer.models.checkpoint import native_shapes
from veneer.models.decoder import Decoder
from veneer.models.families import decoder_config, layout
from veneer.models.tokenizer import Tokenizer
from veneer.types import Lowered, Segment

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def small_base(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Base:
    """A random base with sharp opinions, so that greedy answers don't hang on rounding."""
    raw = {"model_type": family, **SIZES, **changes}
    config = decoder_config(raw)
    where = layout(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in native_shapes(config, where).items():
        value = torch.randn(shape, generator=generator)
        scale = 1.0 if len(shape) == 1 else 2.0 / shape[-1] ** 0.5
        tensors[name] = (1 + 0.1 * value if "norm" in name else value * scale).to(dtype)
    return Base("small", Decoder(config, where, tensors), identity="0" * 64, hf_config=raw)


def with_tokenizer(base: Base) -> Base:
    """The base with a byte-level tokenizer: ids 0..255 are bytes, 256.. are <eos>, <user>, <end>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<eos>", "<user>", "<end>"])
    template = "{% for m in messages %}<user>{{ m.content }}<end>{% endfor %}"
    base.__dict__["tokenizer"] = Tokenizer(fast, {"eos_token": "<eos>"}, template)
    return base


def lora(base: Base, seed: int, rank: int = 4, size: float = 0.3, targets: Sequence[str] | None = None) -> Adapter:
    """A random LoRA on every projection (or on those whose path ends with one of `targets`)."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for path, host in base.shape.hosts.items():
        if host.kind == "embedding" or path == base.layout.head_path:
            continue
        if targets is not None and not path.endswith(tuple(targets)):
            continue
        a = torch.randn(rank, host.in_features, generator=generator) * host.in_features**-0.5
        b = torch.randn(host.out_features, rank, generator=generator) * size
        parts.append(Part("lora", "weight", path, {"A": a, "B": b}, host.kind))
    return Adapter(parse({"kind": "lora", "rank": rank, "alpha": float(rank)}), tuple(parts))


def plain_greedy(base: Base, prompt: Sequence[int], lowered: Lowered | None, count: int) -> list[int]:
    """Greedy tokens, the whole sequence anew for every token: no cache, no batch."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(plain_logits(base, tokens, lowered)[-1].argmax()))
    return tokens[len(prompt) :]


def plain_logits(base: Base, tokens: Sequence[int], lowered: Lowered | None, switch: int = 0) -> torch.Tensor:
    """Logits `[N, vocab]` of one whole sequence."""
    bank = base.bank([] if lowered is None else [lowered])
    index = -1 if lowered is None else 0
    segments = [Segment(switch, 0, -1, 0)] if switch else []
    segments.append(Segment(len(tokens) - switch, 0, index, switch))
    with torch.no_grad():
        hidden = base.decoder.forward(torch.tensor(tokens), segments, bank)
        return base.decoder.logits(hidden, spans_of(segments), bank)


def lowered_of(base: Base, adapter: Adapter | None) -> Lowered | None:
    return None if adapter is None else lower(adapter, base)


def ids(seed: int, count: int, vocab: int = 250) -> list[int]:
    """A random prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (count,), generator=generator).tolist()


__all__ = [
    "Path",
    "ids",
    "lora",
    "lowered_of",
    "plain_greedy",
    "plain_logits",
    "replace",
    "small_base",
    "with_tokenizer",
]
