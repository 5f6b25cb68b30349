"""LoRA: y = x W^T + b + scale (x A^T) B^T, arXiv 2106.09685; with scaling alpha/sqrt(r) it is rsLoRA, arXiv 2312.03732.

A starts random and B zero, so the first step moves only B. On an embedding the roles swap: A zero, B random.

With `invocation` it is an activated LoRA (aLoRA, arXiv 2504.12397): the update acts only from the start of the *last* place where
those tokens stand in the sequence, so the keys and values before it are the base's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Self, final

from pydantic import Field
from torch import Tensor

from veneer.adapter import HostSource, Part
from veneer.base.host import Host
from veneer.errors import Unsupported
from veneer.methods._abstract import PeftForm
from veneer.methods._lowrank import LowRankMethod, Names
from veneer.types import HostShape, Lowered, LowRank, Primitive, Site


@final
class LoRA(LowRankMethod):
    """A low-rank update of each target weight."""

    kind: ClassVar[str] = "lora"
    site: ClassVar[Site] = "weight"
    paper: ClassVar[str] = "2106.09685"
    summary: ClassVar[str] = "W + scale B A"
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="LORA",
        when={"use_dora": False},
        ranked=True,
        tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
        embedding={"A": "lora_embedding_A", "B": "lora_embedding_B"},
        fields={
            "dropout": "lora_dropout",
            "bias": "bias",
            "invocation": "alora_invocation_tokens",
            "parameters": "target_parameters",
        },
    )

    invocation: tuple[int, ...] | str | None = Field(None, description="tokens (or their text) that switch it on")
    parameters: Names = Field((), description="3-D expert parameters of a file from PEFT; parts stand at NAME.EXPERT")

    def prepared(self, encode: Callable[[str], Sequence[int]]) -> Self:
        if not isinstance(self.invocation, str):
            return self
        return self.model_copy(update={"invocation": tuple(encode(self.invocation))})

    def refusal(self, target: str, shape: HostShape) -> str | None:
        if self.parameters:
            return "`parameters` describes experts in a file; no base here has 3-D parameters to start them on"
        return super().refusal(target, shape)

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        if self.invocation is not None:
            raise Unsupported(
                "an activated LoRA acts by the position in the text, which a single layer does not see",
                help="load the base natively with vn.load_base",
            )
        base = host.apply(x)
        return base + self.low_rank_output(x, part, host).to(base.dtype)

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        a, b = self.factors(part)
        return (LowRank(a, b),)

    def lower_into(self, lowered: Lowered, part: Part, source: HostSource) -> Lowered:
        if isinstance(self.invocation, str):
            raise Unsupported("the invocation is still a text", help="give its token ids, or train with a tokenizer")
        return replace(super().lower_into(lowered, part, source), invocation=self.invocation)

    def direct_delta(self, part: Part) -> Tensor:
        a, b = self.factors(part)
        return b.float() @ a.float()

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        if self.invocation is not None:
            raise Unsupported(
                "an activated LoRA cannot be merged: its update depends on the position in the text",
                help="serve it as it is, or train it without `invocation`",
            )
        a, b = self.factors(part)
        return host.weight().float() + b.float() @ a.float(), host.bias
