"""VeRA: delta = diag(b) B diag(d) A with B and A random, frozen and shared by all layers; arXiv 2310.11454.

Each layer trains rank + out numbers. d starts at 0.1 and b at zero. Layers of different sizes take the first columns of A and the
first rows of B, as PEFT does. It is a LoRA in disguise, A' = diag(d) A and B' = diag(b) B, and that is how it runs.

The surprise: A and B are stored once, in a part without a target, so a file is right on every machine whatever its random
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from veneer.adapter import Part
from veneer.base.host import Host
from veneer.methods._abstract import Method, PeftForm
from veneer.methods._lowrank import Names
from veneer.types import Factors, HostShape, LowRank, Primitive, Site


@final
class VeRA(Method):
    """Two trained vectors per layer around shared random matrices."""

    kind: ClassVar[str] = "vera"
    site: ClassVar[Site] = "weight"
    paper: ClassVar[str] = "2310.11454"
    summary: ClassVar[str] = "W + diag(b) B diag(d) A"
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="VERA",
        tensors={"d": "vera_lambda_d", "b": "vera_lambda_b"},
        shared={"A": "vera_A", "B": "vera_B"},
        fields={"rank": "r", "dropout": "vera_dropout", "d_initial": "d_initial"},
        config=lambda method, parts: {"save_projection": True, "projection_prng_key": 0, "bias": "none"},
    )

    rank: int = Field(256, ge=1, description="rank of the shared matrices")
    d_initial: float = Field(0.1, description="where d starts")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input during training")
    targets: Names = Field(("all-linear",), description="which layers carry the adapter")
    exclude: Names = Field((), description="layers to leave out")
    layers: str | tuple[int, ...] | None = Field(None, description="block numbers, or last:N, first:N")

    def refusal(self, target: str, shape: HostShape) -> str | None:
        return None if shape.kind in ("linear", "conv1d") else f"{shape.kind} layers take no VeRA"

    def frozen(self) -> frozenset[str]:
        return frozenset({"A", "B"})

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        return {"d": (self.rank,), "b": (shape.out_features,)}

    def shared_start(self, shapes: Sequence[HostShape], generator: torch.Generator) -> dict[str, Tensor]:
        wide, tall = max(s.in_features for s in shapes), max(s.out_features for s in shapes)
        a = torch.empty(self.rank, wide).uniform_(-1, 1, generator=generator) / math.sqrt(wide / 6)
        b = torch.empty(tall, self.rank).uniform_(-1, 1, generator=generator) / math.sqrt(self.rank / 6)
        return {"A": a, "B": b}

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        return {"d": torch.full((self.rank,), self.d_initial), "b": torch.zeros(host.shape.out_features)}

    def factors(self, part: Part, shape: HostShape) -> tuple[Tensor, Tensor]:
        """The LoRA that this part is: A' `[rank, in]` and B' `[out, rank]`."""
        t = part.tensors
        a, b = t["A"][:, : shape.in_features], t["B"][: shape.out_features]
        return t["d"][:, None] * a.to(t["d"].dtype), t["b"][:, None] * b.to(t["b"].dtype)

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        t = part.tensors
        a, b = t["A"][:, : host.shape.in_features].float(), t["B"][: host.shape.out_features].float()
        y = host.apply(x)
        update = F.linear(t["d"] * F.linear(x.to(a.dtype), a), b) * t["b"]
        return y + update.to(y.dtype)

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        return (LowRank(*self.factors(part, host.shape)),)

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        a, b = self.factors(part, host.shape)
        return host.weight().float() + b.float() @ a.float(), host.bias
