"""A tiny chat model on disk: random llama weights, a byte tokenizer, a ChatML template. No download, a second to make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def folder(path: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint folder that both veneer and transformers load."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab = 256 + len(SPECIAL)
    config = LlamaConfig(
        **{
            "vocab_size": vocab + (-vocab) % 8,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": 256,
            "eos_token_id": 258,
            "pad_token_id": 256,
            **changes,
        }
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).float().save_pretrained(path)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a tokenizer with one token for each byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "chat_template": TEMPLATE,
        "model_max_length": 512,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def chat_rows(path: Path, rows: int = 40, *, start: int = 0) -> Path:
    """A JSONL file of short conversations with answers that follow from the question."""
    with path.open("w") as file:
        for i in range(start, start + rows):
            question, answer = f"double {i}?", f"it is {2 * i}."
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
