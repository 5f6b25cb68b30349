"""Prompt tuning: trained rows before the input embeddings; arXiv 2104.08691.

The rows start as those of random words of the vocabulary, or of a text, which trains far better than noise.

The surprise: rows set to a text's embeddings are the same, bit for bit, as putting that text before the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, final

import torch
from pydantic import Field
from torch import Tensor

from veneer.adapter import HostSource, Part
from veneer.base.host import Host
from veneer.errors import ConfigError
from veneer.methods._abstract import Method, PeftForm
from veneer.types import BaseShape, Factors, HostShape, Lowered, Primitive, Site, Tokens


def prompt_rows(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """PEFT's prompt_embeddings as rows; two rows of embeddings (encoder and decoder) are not for decoders."""
    rows = tensors["prompt_embeddings"]
    if rows.dim() != 2 or rows.shape[0] != config.get("num_virtual_tokens"):
        raise ValueError(
            f"prompt_embeddings is {list(rows.shape)}, num_virtual_tokens {config.get('num_virtual_tokens')}"
        )
    return {"rows": rows}


def prompt_config(method: Any, parts: Sequence[Part]) -> dict[str, Any]:
    """What PEFT wants to know of every prompt method."""
    return {"token_dim": parts[0].tensors["rows"].shape[1], "num_transformer_submodules": 1}


@final
class PromptTuning(Method):
    """Virtual tokens."""

    kind: ClassVar[str] = "prompt"
    site: ClassVar[Site] = "tokens"
    paper: ClassVar[str] = "2104.08691"
    summary: ClassVar[str] = "[P; E[x]]"
    use: ClassVar[str] = "the smallest adapter: tasks that a good prompt almost solves, on large bases"
    limits: ClassVar[str] = "native bases; not mergeable; weak on small bases"
    why_not_mergeable: ClassVar[str] = "it changes the input"
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="PROMPT_TUNING",
        level="model",
        tensors={"rows": "prompt_embeddings"},
        decode=prompt_rows,
        encode=lambda tensors: {"prompt_embeddings": tensors["rows"]},
        fields={"num_tokens": "num_virtual_tokens"},
        config=lambda method, parts: {**prompt_config(method, parts), "prompt_tuning_init": "RANDOM"},
    )

    num_tokens: int = Field(20, ge=1, description="how many virtual tokens")
    init: Literal["vocab", "text", "random"] = Field("vocab", description="rows of random words, of a text, or noise")
    init_text: str | tuple[int, ...] = Field("", description="the text (or its token ids) for init: text")

    def prepared(self, encode: Callable[[str], Sequence[int]]) -> Self:
        if not isinstance(self.init_text, str) or self.init != "text":
            return self
        return self.model_copy(update={"init_text": tuple(encode(self.init_text))})

    def places(self, shape: BaseShape) -> tuple[str, ...]:
        return ("",)

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        return {"rows": (self.num_tokens, shape.out_features)}

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        if self.init == "random":
            return {"rows": torch.rand(self.num_tokens, host.shape.out_features, generator=generator) - 0.5}
        if self.init == "vocab":
            ids = torch.randint(host.shape.in_features, (self.num_tokens,), generator=generator)
        elif isinstance(self.init_text, str) or not self.init_text:
            raise ConfigError("init: text needs init_text, as token ids or with a tokenizer to make them")
        else:
            ids = torch.tensor(self.init_text)[torch.arange(self.num_tokens) % len(self.init_text)]
        return {"rows": host.apply(ids.to(host.device)).detach().float().clone()}

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        """x is the embeddings of a sequence, `[tokens, hidden]`."""
        return torch.cat([part.tensors["rows"].to(x.dtype), x])

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        return (Tokens(part.tensors["rows"]),)

    def lower_into(self, lowered: Lowered, part: Part, source: HostSource) -> Lowered:
        return replace(lowered, tokens=Tokens(part.tensors["rows"]))
