"""Does the merged model say what base and adapter said together?

    KL per token      mean over positions of sum p log(p / q), p from base + adapter, q from the merged model
    top-1 agreement   share of positions where both would pick the same token

Both run in the base's own dtype on probe prompts, so the numbers hold what rounding did to the weights and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from veneer import methods
from veneer.adapter import Adapter
from veneer.formats.checkpoint import open_checkpoint, plain_file, read_json
from veneer.models.base import Base, bound
from veneer.models.checkpoint import canonical, native_tensors
from veneer.models.decoder import Decoder
from veneer.models.families import decoder_config, layout

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n\ndef multiply(a, b):",
    "Dear customer, thank you for your message. We have looked into your order and",
    '{"name": "Ada", "born": 1815, "known_for": [',
)
RANDOM_ROWS, RANDOM_LENGTH = 4, 32


@dataclass(frozen=True)
class Agreement:
    """Mean KL divergence in nats per token, the largest one, the share of equal first choices, and over how many tokens."""

    kl: float
    worst_kl: float
    top1: float
    tokens: int


def agreement(base: Base, adapter: Adapter, merged: Path, prompts: Sequence[Sequence[int]] | None = None) -> Agreement:
    """Compare base + adapter with the checkpoint in `merged` on token ids, by default on a few texts."""
    probes = [torch.tensor(p) for p in prompts] if prompts is not None else default_probes(base)
    other = opened(merged, base.dtype)
    bank = base.bank([methods.lower(adapter, base)])
    kls: list[Tensor] = []
    same: list[Tensor] = []
    with torch.no_grad():
        for probe in probes:
            with bound(base, bank, 0):
                wanted = base.logits(probe[None])[0].float()
            got = other.logits(probe[None])[0].float()
            p, q = wanted.log_softmax(-1), got.log_softmax(-1)
            kls.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
            same.append(wanted.argmax(-1) == got.argmax(-1))
    kl, equal = torch.cat(kls), torch.cat(same)
    return Agreement(float(kl.mean()), float(kl.max()), float(equal.double().mean()), kl.numel())


def default_probes(base: Base) -> list[Tensor]:
    """A few texts, or random ids for a base without a tokenizer."""
    if base.tokenizer is not None:
        return [torch.tensor(base.tokenizer.encode(text)) for text in PROMPTS]
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(base.config.vocab, (RANDOM_ROWS, RANDOM_LENGTH), generator=generator))


def opened(folder: Path, dtype: torch.dtype) -> Base:
    """A checkpoint folder of a native family as a base in memory: nothing goes to the cache."""
    raw = read_json(plain_file(folder, "config.json"))
    stored = open_checkpoint(folder)
    config = decoder_config(raw)
    where = layout(config)
    names = canonical(config, where, {n: stored.info(n).shape for n in stored}, str(folder))
    tensors = dict(native_tensors(config, where, lambda name: stored.tensor(names[name]).to(dtype)))
    return Base(folder.name, Decoder(config, where, tensors), hf_config=raw)
