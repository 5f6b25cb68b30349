"""Trained rows of an embedding: for new or rare tokens, a few rows in place of the whole table.

The rows are absolute, not differences, as in PEFT's trainable tokens. On a base whose head is the embedding the same rows serve
both, because the table is one tensor.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from veneer.adapter import HostSource, Part
from veneer.base.host import Host
from veneer.methods._abstract import Method, PeftForm
from veneer.methods._start import embedding_path
from veneer.types import BaseShape, Factors, HostShape, Lowered, Override, Primitive, Site


@final
class TokenRows(Method):
    """Rows of the input embedding, by token id."""

    kind: ClassVar[str] = "token_rows"
    site: ClassVar[Site] = "override"
    summary: ClassVar[str] = "E[tokens] = rows"
    use: ClassVar[str] = "new or rare tokens of a tokenizer"
    limits: ClassVar[str] = "an embedding only; the rows are absolute"
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="TRAINABLE_TOKENS",
        tensors={"rows": "trainable_tokens_delta"},
        decode=lambda tensors, config: {
            "rows": tensors["trainable_tokens_delta"],
            "tokens": torch.tensor(config["token_indices"], dtype=torch.int64),
        },
        encode=lambda tensors: {"trainable_tokens_delta": tensors["rows"]},
        fields={"tokens": "token_indices"},
    )

    tokens: tuple[int, ...] = Field((), description="ids of the tokens whose rows are trained")

    def places(self, shape: BaseShape) -> tuple[str, ...]:
        return (embedding_path(shape),)

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        return {"rows": (len(self.tokens), shape.out_features), "tokens": (len(self.tokens),)}

    def frozen(self) -> frozenset[str]:
        return frozenset({"tokens"})

    def refusal(self, target: str, shape: HostShape) -> str | None:
        if shape.kind != "embedding":
            return f"{shape.kind} layers have no token rows, only an embedding has"
        beyond = [t for t in self.tokens if not 0 <= t < shape.in_features]
        if beyond:
            return f"tokens {beyond} are outside its {shape.in_features} rows"
        if len(set(self.tokens)) != len(self.tokens):
            return "a token stands twice in `tokens`"
        return None if self.tokens else "`tokens` is empty"

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        ids = torch.tensor(self.tokens, dtype=torch.int64)
        return {"rows": host.weight().t()[ids].detach().float().clone(), "tokens": ids}

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        return F.embedding(x, self.merged(part, host)[0].t()).to(host.dtype)

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        return (Override(part.tensors["rows"], part.tensors["tokens"]),)

    def lower_into(self, lowered: Lowered, part: Part, source: HostSource) -> Lowered:
        return self.replacing(
            lowered, {f"{part.target}.weight": Override(part.tensors["rows"], part.tensors["tokens"])}
        )

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        table = host.weight().t().float().index_copy(0, part.tensors["tokens"], part.tensors["rows"].float())
        return table.t(), host.bias
