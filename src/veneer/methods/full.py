"""Full fine-tuning of chosen layers: the tensor itself is trained and stands in for the base's.

It is the other end of the scale from LoRA (one word apart in a run file), and the form in which an adapter keeps what PEFT calls
`modules_to_save` and trained biases.

The surprise: the tensor is kept as the checkpoint stores it (`[in, out]` for GPT-2's Conv1D, `[vocabulary, hidden]` for an
embedding), so files hold what other tools expect to find.
"""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from veneer.adapter import HostSource, Part
from veneer.base.host import Host
from veneer.methods._abstract import Method
from veneer.methods._lowrank import Names, input_axes
from veneer.types import Factors, HostShape, Lowered, Override, Primitive, Site


@final
class Full(Method):
    """Whole tensors, trained and stored. `targets` takes any selector; `layers: last:4` keeps it affordable."""

    kind: ClassVar[str] = "full"
    site: ClassVar[Site] = "override"
    summary: ClassVar[str] = "the weight itself"
    use: ClassVar[str] = "the upper bound to compare with, or a few layers, norms and heads whole"
    limits: ClassVar[str] = "as many numbers as the layers have; a dense copy per adapter in memory"

    targets: Names = Field(("all-linear",), description="which layers to train whole")
    exclude: Names = Field((), description="layers to leave out")
    layers: str | tuple[int, ...] | None = Field(None, description="block numbers, or last:N, first:N")
    only: Literal["weight", "bias"] | None = Field(None, description="train only this tensor of each layer")

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        stored = (shape.out_features, *(() if shape.kind == "norm" else input_axes(shape)))
        found: dict[str, tuple[int, ...]] = {"weight": stored[::-1] if _transposed(shape) else stored}
        if shape.has_bias:
            found["bias"] = (shape.out_features,)
        return {name: size for name, size in found.items() if self.only in (None, name)}

    def refusal(self, target: str, shape: HostShape) -> str | None:
        return "it has no bias" if self.only == "bias" and not shape.has_bias else None

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        found = {}
        for name in self.tensor_shapes(target, host.shape):
            value = host.bias if name == "bias" else host.weight().t() if _transposed(host.shape) else host.weight()
            assert value is not None
            value = value.reshape(self.tensor_shapes(target, host.shape)[name])
            found[name] = value.detach().float().contiguous().clone()
        return found

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        weight, bias = self.merged(part, host)
        if host.shape.kind == "embedding":
            return host.product(x, weight).to(host.dtype)
        return host.product(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        return tuple(Override(value) for value in part.tensors.values())

    def lower_into(self, lowered: Lowered, part: Part, source: HostSource) -> Lowered:
        overrides = {f"{part.target}.{name}": Override(value) for name, value in part.tensors.items()}
        return self.replacing(lowered, overrides)

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        weight = part.tensors.get("weight")
        if weight is None:
            weight = host.weight()
        elif _transposed(host.shape):
            weight = weight.t()
        return (weight if host.shape.kind == "norm" else weight.flatten(1)).float(), part.tensors.get("bias", host.bias)


def _transposed(shape: HostShape) -> bool:
    return shape.kind in ("conv1d", "embedding")
