"""BitFit: only biases are trained; arXiv 2106.10199.

The part keeps the difference to the base's bias, so it starts at zero and can be added to any base.

The surprise: Llama-like bases have no biases. There it adds one, which serves as it is but cannot be written into a checkpoint
whose architecture has no place for it.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from veneer.adapter import Part
from veneer.base.host import Host
from veneer.methods._abstract import Method
from veneer.methods._lowrank import Names
from veneer.types import Bias, Factors, HostShape, Primitive, Site


@final
class BitFit(Method):
    """A bias per layer."""

    kind: ClassVar[str] = "bitfit"
    site: ClassVar[Site] = "weight"
    paper: ClassVar[str] = "2106.10199"
    summary: ClassVar[str] = "x W^T + b + delta"
    use: ClassVar[str] = "a very small change of tone or format, on a base that has biases"
    limits: ClassVar[str] = "little capacity; Llama-like checkpoints have no place for a bias to be merged into"

    targets: Names = Field(("all-linear",), description="which layers get a trained bias")
    exclude: Names = Field((), description="layers to leave out")
    layers: str | tuple[int, ...] | None = Field(None, description="block numbers, or last:N, first:N")

    def refusal(self, target: str, shape: HostShape) -> str | None:
        return None if shape.kind in ("linear", "conv1d", "conv") else f"{shape.kind} layers have no bias"

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        return {"bias": (shape.out_features,)}

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        return {"bias": torch.zeros(host.shape.out_features)}

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        y = host.apply(x)
        return y + host.feature(part.tensors["bias"].to(y.dtype))

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        return (Bias(part.tensors["bias"]),)

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        bias = part.tensors["bias"].float()
        return host.weight().float(), bias if host.bias is None else host.bias.float() + bias
