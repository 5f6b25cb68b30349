"""Rotary positions as a checkpoint's config.json gives them.

Plain RoPE turns the pair (i, i + dim/2) at position p by p * theta^(-2i/dim) (arXiv 2104.09864); the scalings stretch
those frequencies for longer contexts. The surprise: transformers 4 and 5 write the same thing under different keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.errors import FormatError, Unsupported
from veneer.models.config import Rope

Raw = Mapping[str, Any]

ATTACH = "load it with transformers and use veneer.attach(model, adapter): slower, the same adapters"

ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}


def read_rope(raw: Raw) -> Rope:
    """Rotary positions from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    `scaling` is empty for plain RoPE. Otherwise it has `rope_type`, the checkpoint's numbers, and always
    `original_max_position_embeddings` and `max_position_embeddings`.
    """
    given = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    theta = given.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    partial = given.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    legacy = given.pop("type", "default")
    kind = given.pop("rope_type", None) or legacy
    if raw.get("model_type") == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"
    if kind not in ROPE_KEYS:
        raise Unsupported(f"the rotary scaling '{kind}' is not one of {', '.join(ROPE_KEYS)}", help=ATTACH)
    missing = [key for key in ROPE_KEYS[kind] if given.get(key) is None]
    if missing:
        raise FormatError(f"config.json: the rotary scaling '{kind}' has no {', '.join(missing)}")
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    dim = int(head_dim * partial)
    if kind == "default":
        return Rope(float(theta), dim)
    longest = raw["max_position_embeddings"]
    original = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or longest
    lengths = {"original_max_position_embeddings": original, "max_position_embeddings": longest}
    return Rope(float(theta), dim, {**given, "rope_type": kind, **lengths})
