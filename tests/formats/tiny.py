"""Small transformers models and peft adapters for the parity tests."""

from __future__ import annotations

from typing import Any

import torch


def llama(**changes: Any) -> Any:
    """A random Llama of two layers, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


def gpt2() -> Any:
    """A random GPT-2 of two layers, whose projections are Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)).eval()


def stir(model: torch.nn.Module, seed: int = 1) -> None:
    """Give every trainable tensor a random value, so that nothing is at its harmless start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
