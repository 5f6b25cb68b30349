"""Small models for the table of what works: one native family and one that only transformers knows, in 16 bit and NF4."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.works.table import Cell
from veneer.adapter import Adapter
from veneer.inject import ModuleSource, attach, create
from veneer.methods import METHODS, lower, parse
from veneer.models.bank import spans_of
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.types import Segment

IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(4))
DTYPES: Mapping[str, torch.dtype] = {"16-bit": torch.bfloat16, "NF4": torch.float32}
"""What products are computed in. PEFT's IA3 on a 4-bit model in bf16 stops over its own mix of dtypes."""
SMALL: Mapping[str, Any] = {
    "rank": 4,
    "target_rank": 2,
    "num_tokens": 3,
    "size": 6,
    "block": 8,
    "tokens": IDS[0, :4].unique().tolist(),
}
ON_NATIVE: Mapping[str, dict[str, Any]] = {"prefix": {"encoder": 6}, "ptuning": {"encoder_size": 5}}
ON_MODULE: Mapping[str, dict[str, Any]] = {
    **ON_NATIVE,
    "ia3": {"targets": ("k_proj", "v_proj", "fc2"), "feedforward": ("fc2",)},
    "bottleneck": {"modules": ("model.decoder.layers.0.self_attn", "model.decoder.layers.1.fc2")},
}
"""What a method has to be told at this size, and on a model whose names it does not know."""


def fields_of(cell: Cell) -> dict[str, Any]:
    """The method of a cell, small."""
    known = METHODS[cell.kind].model_fields
    own = (ON_NATIVE if cell.way == "native" else ON_MODULE).get(cell.kind, {})
    return {"kind": cell.kind} | {k: v for k, v in SMALL.items() if k in known} | own


def native_checkpoint(folder: Path) -> Path:
    """A Llama as the demo base is one: no biases, tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    _sharp(LlamaForCausalLM(config)).bfloat16().save_pretrained(folder)
    return folder


def module_checkpoint(folder: Path) -> Path:
    """An OPT, which the native decoder does not know."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=97, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2, dropout=0.0,
        max_position_embeddings=64, word_embed_proj_dim=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    _sharp(OPTForCausalLM(config)).bfloat16().save_pretrained(folder)
    return folder


def _sharp(model: Any) -> Any:
    """Weights large enough that the model has opinions: rounding does not decide a comparison."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * parameter.shape[1] ** -0.5)
    return model


@dataclass(frozen=True)
class Setting:
    """One way and precision, over checkpoints that are made once."""

    native: Path
    module: Path

    @cached_property
    def _loaded(self) -> dict[Any, Any]:
        return {}

    def base(self, weights: str) -> Base:
        """The native base, in memory once."""
        if ("base", weights) not in self._loaded:
            self._loaded["base", weights] = load_base(self.native, DTYPES[weights], "nf4" if weights == "NF4" else None)
        return self._loaded["base", weights]

    def model(self, cell: Cell) -> Any:
        """transformers' model of the cell's checkpoint in its precision, a new one each time."""
        if (cell.way, cell.weights) not in self._loaded:
            self._loaded[cell.way, cell.weights] = self._model(cell)
        return copy.deepcopy(self._loaded[cell.way, cell.weights])

    def _model(self, cell: Cell) -> Any:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        options: dict[str, Any] = {"dtype": DTYPES[cell.weights], "attn_implementation": "eager"}
        if cell.weights == "NF4":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[cell.weights]
            )
        return plain_products(AutoModelForCausalLM.from_pretrained(self.checkpoint(cell), **options).eval())

    def checkpoint(self, cell: Cell) -> Path:
        return self.native if cell.way == "native" else self.module

    def adapter(self, cell: Cell) -> Adapter:
        """An adapter of the cell's method after some imaginary training, moved so far that rounding is small beside it."""
        view: Any = self.base(cell.weights) if cell.way == "native" else ModuleSource(self.model(cell))
        fresh = create(view, parse(fields_of(cell)), torch.Generator().manual_seed(0))
        for size in (0.2, 0.6, 2.0):
            adapter = moved(fresh, size)
            effect = self.logits(cell, adapter) - self.logits(cell, None)
            if effect.norm() > 0.5 * self.logits(cell, None).norm():
                break
        return adapter

    def logits(self, cell: Cell, adapter: Adapter | None) -> Tensor:
        """fp32 `[3, 9, vocab]` under the adapter, or under the bare base."""
        if cell.way == "native":
            return native_logits(self.base(cell.weights), adapter)
        model = self.model(cell)
        if adapter is not None:
            attach(model, adapter)
        return module_logits(model)


def plain_products(model: Any) -> Any:
    """A 4-bit model of bitsandbytes that keeps its weights as they were loaded.

    At its first inference it would repack them for its CPU kernel. That kernel rounds products to bf16 and has no backward pass,
    and PEFT's DoRA takes its norms from repacked weights as if they were not.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model


def moved(adapter: Adapter, size: float) -> Adapter:
    """Every trained tensor moved at random."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for part in adapter.parts:
        frozen = METHODS[part.kind]().frozen()
        own = {
            name: t if name in frozen else t + size * torch.randn(t.shape, generator=generator)
            for name, t in part.tensors.items()
        }
        parts.append(replace(part, tensors=own))
    return replace(adapter, parts=tuple(parts))


def native_logits(base: Base, adapter: Adapter | None) -> Tensor:
    lowered = [] if adapter is None else [lower(adapter, base)]
    return mixed_logits(base, lowered, [-1 if adapter is None else 0] * len(IDS))


@torch.no_grad()
def mixed_logits(base: Base, lowered: list[Any], indices: list[int]) -> Tensor:
    """Each row of `IDS` under the adapter of its index."""
    bank = base.bank(lowered)
    segments = [Segment(IDS.shape[1], row, index) for row, index in enumerate(indices)]
    ids = IDS[: len(indices)]
    hidden = base.decoder.forward(ids.reshape(-1), segments, bank)
    return base.decoder.logits(hidden, spans_of(segments), bank).view(*ids.shape, -1).float()


@torch.no_grad()
def module_logits(model: Any, skip: int = 0) -> Tensor:
    logits: Tensor = model(IDS, attention_mask=torch.ones_like(IDS)).logits[:, skip:]
    return logits.float()


def assert_same(cell: Cell, ours: Tensor, theirs: Tensor, bare: Tensor) -> None:
    """Equal up to rounding, which is measured against what the adapter does: bf16 cannot be much nearer than that."""
    tolerance = 0.1 if DTYPES[cell.weights] == torch.bfloat16 else 1e-3
    effect = (theirs - bare).norm()
    assert effect > 0.3 * bare.norm(), "the adapter must do something"
    error = float((ours - theirs).norm() / effect)
    assert error <= tolerance, f"{error:.1%} of what the adapter does"


@contextmanager
def quiet_peft() -> Iterator[Any]:
    """peft, without its opinions on small models."""
    import warnings

    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield peft
