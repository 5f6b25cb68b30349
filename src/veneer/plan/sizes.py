"""How many numbers a base has, tensor by tensor, from its configuration alone.

The surprise: only the projections are ever quantised. Embedding, head, norms and biases stay in 16 bits, which is why a 4-bit
Llama-3-8B (128 k words) is 5.7 GB and not 4.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from veneer.errors import ConfigError
from veneer.models.config import DecoderConfig, Layout
from veneer.models.families import decoder_config


@dataclass(frozen=True)
class Sizes:
    """Numbers in a base.

    linear     (out, in) of every projection inside the blocks, as the checkpoint stores them
    embedding  the input embedding, and learned positions where there are any
    head       the output head; 0 where it is the embedding
    other      norms and biases
    """

    linear: tuple[tuple[int, int], ...]
    embedding: int
    head: int
    other: int

    @property
    def in_linear(self) -> int:
        return sum(rows * columns for rows, columns in self.linear)

    @property
    def parameters(self) -> int:
        return self.in_linear + self.embedding + self.head + self.other


def sizes_of(config: DecoderConfig, layout: Layout) -> Sizes:
    """Count a decoder. Exact: the sum over the checkpoint's tensors, a tied head counted once."""
    inside = [group for group in layout.groups if group.name != "head"]
    head = [group for group in layout.groups if group.name == "head"]
    embedding = config.vocab * config.hidden
    if "positions" in layout.tensors:
        embedding += config.max_positions * config.hidden
    biases = sum(group.out_features for group in layout.groups if group.bias)
    norms = sum(_norm_width(name, config) for name in layout.tensors if name not in ("embed", "positions"))
    return Sizes(
        linear=tuple((part.stop - part.start, group.in_features) for group in inside for part in group.parts),
        embedding=embedding,
        head=sum(group.out_features * group.in_features for group in head),
        other=biases + norms,
    )


def _norm_width(native: str, config: DecoderConfig) -> int:
    name = native.removesuffix("_bias").rsplit(".", 1)[-1]
    if name not in ("q_norm", "k_norm"):
        return config.hidden
    heads = config.heads if name == "q_norm" else config.kv_heads
    return config.head_dim * (heads if config.qk_norm == "full" else 1)


def _llama(hidden: int, layers: int, heads: int, kv: int, width: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": width,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **more,
    }


_TIED = {"tie_word_embeddings": True}

KNOWN: Mapping[str, dict[str, Any]] = {
    "SmolLM2-135M": _llama(576, 30, 9, 3, 1536, 49152, **_TIED),
    "SmolLM2-360M": _llama(960, 32, 15, 5, 2560, 49152, **_TIED),
    "Qwen2.5-0.5B": _llama(896, 24, 14, 2, 4864, 151936, **_TIED) | {"model_type": "qwen2"},
    "Llama-3.2-1B": _llama(2048, 16, 32, 8, 8192, 128256, head_dim=64, **_TIED),
    "Qwen2.5-1.5B": _llama(1536, 28, 12, 2, 8960, 151936, **_TIED) | {"model_type": "qwen2"},
    "Llama-3.2-3B": _llama(3072, 28, 24, 8, 8192, 128256, head_dim=128, **_TIED),
    "LLaMA-7B": _llama(4096, 32, 32, 32, 11008, 32000),
    "Llama-3-8B": _llama(4096, 32, 32, 8, 14336, 128256),
    "LLaMA-13B": _llama(5120, 40, 40, 40, 13824, 32000),
    "Qwen2.5-32B": _llama(5120, 64, 40, 8, 27648, 152064) | {"model_type": "qwen2"},
    "LLaMA-65B": _llama(8192, 80, 64, 64, 22016, 32000),
    "Llama-2-70B": _llama(8192, 80, 64, 8, 28672, 32000),
    "Llama-3-70B": _llama(8192, 80, 64, 8, 28672, 128256),
}
"""Public shapes, for questions about a size. A question about a model is answered from the model's own config.json."""


def known_base(size: str) -> tuple[str, DecoderConfig]:
    """The public shape nearest to a size written as `7B`, `135M` or `6738415616`, or one of their names.

    >>> known_base("7B")[0], known_base("llama-3-8b")[0]
    ('LLaMA-7B', 'Llama-3-8B')
    """
    for name in KNOWN:
        if name.lower() == size.lower():
            return name, decoder_config(KNOWN[name])
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMBT]?)", size.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"'{size}' is not a number of parameters", help="write 7B, 135M or a plain number")
    wanted = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2].upper()]
    name, total = min(_totals().items(), key=lambda item: abs(math.log(item[1] / wanted)))
    if not 0.5 < total / wanted < 2:
        raise ConfigError(
            f"no known shape is near {size} parameters; the nearest is {name} with {total:,}",
            help="give the model itself: --base FOLDER (its config.json is enough)",
        )
    return name, decoder_config(KNOWN[name])


def _totals() -> dict[str, int]:
    from veneer.models.families import layout

    found = {}
    for name, raw in KNOWN.items():
        config = decoder_config(raw)
        found[name] = sizes_of(config, layout(config)).parameters
    return found
