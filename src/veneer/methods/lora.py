"""LoRA: y = x W^T + b + scale (x A^T) B^T, arXiv 2106.09685; with scaling alpha/sqrt(r) it is rsLoRA, arXiv 2312.03732.

A starts random and B zero, so the first step moves only B. On an embedding the roles swap: A zero, B random.

With `invocation` it is an activated LoRA (aLoRA, arXiv 2504.12397): the update acts only from the start of the *last* place where
those tokens stand in the sequence, so the keys and values before it are the base's own.

With `lora_bias` the update has a bias of its own, y += scale (B A x + b), which starts at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from veneer.adapter import HostSource, Part
from veneer.base.host import Host
from veneer.errors import Unsupported
from veneer.methods._abstract import PeftForm
from veneer.methods._lowrank import Factored, LowRankMethod, Names, low_rank_output
from veneer.types import Bias, Factors, HostShape, Lowered, Primitive, Site


@final
class LoRA(LowRankMethod, Factored):
    """A low-rank update of each target weight."""

    kind: ClassVar[str] = "lora"
    site: ClassVar[Site] = "weight"
    paper: ClassVar[str] = "2106.09685"
    summary: ClassVar[str] = "W + scale B A"
    use: ClassVar[str] = "the default: all linear layers, rank 8 to 16; alpha/sqrt(r) above rank 32"
    limits: ClassVar[str] = "rank up to the layer's smaller side; convolutions on any module only, and without groups"
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="LORA",
        when={"use_dora": False},
        ranked=True,
        tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
        embedding={"A": "lora_embedding_A", "B": "lora_embedding_B"},
        optional={"bias": "lora_B.bias"},
        hosts=("linear", "conv1d", "embedding", "conv"),
        fields={
            "dropout": "lora_dropout",
            "bias": "bias",
            "lora_bias": "lora_bias",
            "invocation": "alora_invocation_tokens",
            "parameters": "target_parameters",
        },
    )

    invocation: tuple[int, ...] | str | None = Field(None, description="tokens (or their text) that switch it on")
    parameters: Names = Field((), description="3-D expert parameters of a file from PEFT; parts stand at NAME.EXPERT")

    lora_bias: bool = Field(False, description="train a bias with the update, scaled as it is")

    @model_validator(mode="after")
    def _one_kind_of_bias(self) -> Self:
        if self.lora_bias and self.bias != "none":
            raise ValueError("lora_bias adds a bias to the update and `bias` replaces the layer's own: choose one")
        return self

    def prepared(self, encode: Callable[[str], Sequence[int]]) -> Self:
        if not isinstance(self.invocation, str):
            return self
        return self.model_copy(update={"invocation": tuple(encode(self.invocation))})

    def refusal(self, target: str, shape: HostShape) -> str | None:
        if self.parameters:
            return "`parameters` describes experts in a file; no base here has 3-D parameters to start them on"
        if self.lora_bias and shape.kind == "embedding":
            return "an embedding has no bias for lora_bias to add"
        return super().refusal(target, shape)

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        own = super().tensor_shapes(target, shape)
        return {**own, "bias": (shape.out_features,)} if self.lora_bias else own

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        own = super().start(target, host, factors, generator)
        return {**own, "bias": torch.zeros(host.shape.out_features)} if self.lora_bias else own

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        if self.invocation is not None:
            raise Unsupported(
                "an activated LoRA acts by the position in the text, which a single layer does not see",
                help="load the base natively with vn.load_base",
            )
        base, bias = host.apply(x), self._bias(part)
        update = low_rank_output(x, *self.factors(part), host)
        if bias is not None:
            update = update + host.feature(bias)
        return base + update.to(base.dtype)

    def _bias(self, part: Part) -> Tensor | None:
        """scale * b `[out]`, or None."""
        if "bias" not in part.tensors:
            return None
        assert part.target is not None
        rank = part.tensors["A"].shape[0]  # a folded start has twice the rank and twice the alpha: the scale stays
        return self.scale(part.target, rank) * part.tensors["bias"]

    def plain_scale(self, part: Part) -> float | None:
        is_plain = set(part.tensors) == {"A", "B"} and part.host == "linear" and self.invocation is None
        return self.scale(part.target, part.tensors["A"].shape[0]) if is_plain and part.target is not None else None

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        bias = self._bias(part)
        return (*super().lower(part, host), *(() if bias is None else (Bias(bias),)))

    def lower_into(self, lowered: Lowered, part: Part, source: HostSource) -> Lowered:
        if isinstance(self.invocation, str):
            raise Unsupported("the invocation is still a text", help="give its token ids, or train with a tokenizer")
        return replace(super().lower_into(lowered, part, source), invocation=self.invocation)

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        if self.invocation is not None:
            raise Unsupported(
                "an activated LoRA cannot be merged: its update depends on the position in the text",
                help="serve it as it is, or train it without `invocation`",
            )
        (weight, bias), own = super().merged(part, host), self._bias(part)
        if own is None:
            return weight, bias
        return weight, own.float() if bias is None else bias.float() + own.float()
