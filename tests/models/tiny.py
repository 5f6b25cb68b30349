"""Tiny random models of every family, as transformers builds them: the oracle for the native decoder.

`VARIANTS` names the configurations that differ in arithmetic; `hf_model(name)` builds one, `checkpoint(name, folder)`
saves it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.models.base import Base
from veneer.models.checkpoint import canonical, native_tensors
from veneer.models.decoder import Decoder
from veneer.models.families import decoder_config, layout

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 4.0, 8.0],
}
DYNAMIC = {
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
}
GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-mha": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}}),
    "llama-dynamic": ("llama", DYNAMIC),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": ("llama", {"rope_parameters": YARN_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "gemma2-softcaps": (
        "gemma2",
        {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.2},
    ),
    "gemma3_text": ("gemma3_text", {"head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2}),
    "phi3": ("phi3", {"num_key_value_heads": 4}),
    "phi3-window": ("phi3", {"sliding_window": 8}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 32}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_neox-sequential": ("gpt_neox", {"rotary_pct": 1.0, "use_parallel_residual": False, "attention_bias": False}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-unscaled": ("gpt2", {**GPT2, "scale_attn_weights": False, "n_inner": 64, "activation_function": "relu"}),
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox", "gpt2")


def hf_config(name: str = "llama", **changes: Any) -> Any:
    """The transformers configuration of a variant, with `changes` on top."""
    from transformers import AutoConfig

    family, own = VARIANTS[name]
    sizes = {} if family == "gpt2" else SIZES
    return AutoConfig.for_model(family, **{**sizes, **own, **changes})


def hf_model(name: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A transformers model of a variant, fp32, in eval mode, every tensor random (norms and biases too), from `seed`."""
    import torch
    from transformers import AutoModelForCausalLM

    config = hf_config(name, **changes)
    config._attn_implementation = "eager"
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def checkpoint(name: str, folder: Path, *, seed: int = 0, shard_size: str = "5GB", **changes: Any) -> Path:
    """A saved folder (config.json and safetensors, sharded when `shard_size` is small) of a variant."""
    model = hf_model(name, seed=seed, **changes)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def base(name: str = "llama", *, seed: int = 0, **changes: Any) -> tuple[Base, Any]:
    """A variant as a native base in memory, and the transformers model that its weights are shared with."""
    model = hf_model(name, seed=seed, **changes)
    config = decoder_config(json.loads(model.config.to_json_string(use_diff=False)))
    where = layout(config)
    stored = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    names = canonical(config, where, {key: tuple(t.shape) for key, t in stored.items()}, name)
    tensors = dict(native_tensors(config, where, lambda key: stored[names[key]]))
    return Base(name, Decoder(config, where, tensors)), model
