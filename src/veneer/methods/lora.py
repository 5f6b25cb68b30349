"""LoRA: y = x W^T + b + scale (x A^T) B^T, arXiv 2106.09685; with scaling alpha/sqrt(r) it is rsLoRA, arXiv 2312.03732.

A starts random and B zero, so the first step moves only B. On an embedding the roles swap: A zero, B random.
"""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from veneer.adapter import Part
from veneer.base.host import Host
from veneer.methods._lowrank import LowRankMethod
from veneer.types import LowRank, Primitive, Site


@final
class LoRA(LowRankMethod):
    """A low-rank update of each target weight."""

    kind: ClassVar[str] = "lora"
    site: ClassVar[Site] = "weight"
    paper: ClassVar[str] = "2106.09685"
    summary: ClassVar[str] = "W + scale B A"

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        base = host.apply(x)
        return base + self.low_rank_output(x, part, host).to(base.dtype)

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        a, b = self.factors(part)
        return (LowRank(a, b),)

    def direct_delta(self, part: Part) -> Tensor:
        a, b = self.factors(part)
        return b.float() @ a.float()

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        a, b = self.factors(part)
        return host.weight().float() + b.float() @ a.float(), host.bias
