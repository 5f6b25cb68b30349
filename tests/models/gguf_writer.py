"""Writes tiny transformers models as .gguf files in llama.cpp's order, from the rules of its converter.

The permutations here are llama.cpp's own formulas (the forward direction), so reading them back proves the inverse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

ARCH = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "gpt_neox": "gptneox",
    "gpt2": "gpt2",
}


def write(model: Any, path: Path, **extra: torch.Tensor) -> Path:
    """`model` as fp32 tensors; `extra` are further tensors by their ggml names."""
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(str(path), ARCH[family])
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    _particular(writer, config, family, head_dim)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == ARCH[family]), layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        writer.add_tensor(theirs, _ordered(family, name, tensor, heads, kv_heads).numpy().astype(np.float32))
    for name, tensor in extra.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _particular(writer: gguf.GGUFWriter, config: Any, family: str, head_dim: int) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if family in ("gpt2", "gpt_neox"):
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if rope:
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if getattr(config, "sliding_window", None) and family in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _ordered(family: str, name: str, tensor: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    module, kind = name.split(".")[-2:]
    if family == "llama" and module in ("q_proj", "k_proj"):
        count = heads if module == "q_proj" else kv_heads
        rows = tensor.shape[0] // count
        return tensor.reshape(count, 2, rows // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape).contiguous()
    if family == "gpt_neox" and module == "query_key_value":
        split = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
        return torch.cat([split[:, part].reshape(-1, *tensor.shape[1:]) for part in range(3)]).contiguous()
    if family == "gpt2" and kind == "weight" and module in ("c_attn", "c_proj", "c_fc"):
        return tensor.t().contiguous()
    if family in ("gemma2", "gemma3_text") and module.endswith("norm"):
        return tensor + 1.0
    return tensor
