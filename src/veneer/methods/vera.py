"""VeRA: delta = diag(b) B diag(d) A with B and A random, frozen and shared by all layers; arXiv 2310.11454.

Each layer trains rank + out numbers. d starts at 0.1 and b at zero. Layers of different sizes take the first columns of A and the
first rows of B, as PEFT does. It is a LoRA in disguise, A' = diag(d) A and B' = diag(b) B, and that is how it runs.

The surprise: A and B are stored once, in a part without a target, so a file is right on every machine whatever its random
numbers. With `projection_key` they are left out and made again as PEFT makes them: from the key and the sizes of the largest
layer that carries the adapter, for which the base is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from veneer.adapter import Adapter, HostSource, Part
from veneer.base.host import Host
from veneer.errors import NeedsBase
from veneer.methods._abstract import Method, PeftForm
from veneer.methods._lowrank import Names
from veneer.types import Factors, HostShape, LowRank, Primitive, Site


def _config(method: Any, parts: Sequence[Part]) -> dict[str, Any]:
    key = method.projection_key
    return {"save_projection": key is None, "projection_prng_key": key or 0, "bias": "none"}


def _parse(config: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    stored = any(part.target is None for part in parts)
    return {} if stored else {"projection_key": config.get("projection_prng_key", 0)}


@lru_cache(maxsize=4)
def projections(key: int, rank: int, wide: int, tall: int) -> tuple[Tensor, Tensor]:
    """PEFT's A `[rank, wide]` and B `[tall, rank]`: one stream of uniform numbers, A first, each Kaiming for a ReLU."""
    generator = torch.Generator().manual_seed(key)
    made = []
    for shape in ((rank, wide), (tall, rank)):
        bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(shape[1])
        made.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return made[0], made[1]


@final
class VeRA(Method):
    """Two trained vectors per layer around shared random matrices."""

    kind: ClassVar[str] = "vera"
    site: ClassVar[Site] = "weight"
    paper: ClassVar[str] = "2310.11454"
    summary: ClassVar[str] = "W + diag(b) B diag(d) A"
    use: ClassVar[str] = "many adapters on one base: rank + out numbers a layer, one pair of matrices for all"
    limits: ClassVar[str] = "wants a rank of 256 and more; linear layers"
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="VERA",
        tensors={"d": "vera_lambda_d", "b": "vera_lambda_b"},
        shared={"A": "vera_A", "B": "vera_B"},
        fields={"rank": "r", "dropout": "vera_dropout", "d_initial": "d_initial"},
        remade=lambda config: config.get("save_projection") is False,
        config=_config,
        parse=_parse,
    )

    rank: int = Field(256, ge=1, description="rank of the shared matrices")
    d_initial: float = Field(0.1, description="where d starts")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input during training")
    projection_key: int | None = Field(None, description="make A and B from this seed (PEFT's) and don't store them")
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
        if self.projection_key is not None:
            return {}
        wide, tall = max(s.in_features for s in shapes), max(s.out_features for s in shapes)
        a = torch.empty(self.rank, wide).uniform_(-1, 1, generator=generator) / math.sqrt(wide / 6)
        b = torch.empty(tall, self.rank).uniform_(-1, 1, generator=generator) / math.sqrt(self.rank / 6)
        return {"A": a, "B": b}

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        return {"d": torch.full((self.rank,), self.d_initial), "b": torch.zeros(host.shape.out_features)}

    def completed(self, adapter: Adapter, source: HostSource) -> Adapter:
        """With A and B made from `projection_key`, where it is set."""
        own = [part.target for part in adapter.parts if part.kind == self.kind and part.target is not None]
        if self.projection_key is None or not own:
            return adapter
        shapes: list[HostShape] = [source.host(target).shape for target in own]
        wide, tall = max(s.in_features for s in shapes), max(s.out_features for s in shapes)
        a, b = projections(self.projection_key, self.rank, wide, tall)
        return replace(adapter, parts=(Part(self.kind, self.site, None, {"A": a, "B": b}), *adapter.parts))

    def factors(self, part: Part, shape: HostShape) -> tuple[Tensor, Tensor]:
        """The LoRA that this part is: A' `[rank, in]` and B' `[out, rank]`."""
        t = part.tensors
        a, b = self._projections(part, shape)
        return t["d"][:, None] * a.to(t["d"].dtype), t["b"][:, None] * b.to(t["b"].dtype)

    def _projections(self, part: Part, shape: HostShape) -> tuple[Tensor, Tensor]:
        """The part's share of A and B."""
        if "A" not in part.tensors:
            raise NeedsBase(
                f"the file of this VeRA leaves out A and B (projection_key: {self.projection_key}), which the sizes of all its "
                "layers decide",
                help="give the base: attach it, or methods.completed(adapter, base)",
            )
        return part.tensors["A"][:, : shape.in_features], part.tensors["B"][: shape.out_features]

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        t, y = part.tensors, host.apply(x)
        a, b = (p.to(t["d"].dtype) for p in self._projections(part, host.shape))
        update = F.linear(t["d"] * F.linear(x.to(a.dtype), a), b) * t["b"]
        return y + update.to(y.dtype)

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        return (LowRank(*self.factors(part, host.shape)),)

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        a, b = self.factors(part, host.shape)
        return host.weight().float() + b.float() @ a.float(), host.bias
