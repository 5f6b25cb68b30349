"""SHiRA: W + S, S sparse: a fixed scattered set of a layer's own weights is trained; arXiv 2406.13175.

As many entries as a LoRA of that rank has numbers, rank (in + out), chosen once: at random, or where |W| is largest. The values
start at zero. Merging is a scatter-add, and the update has a high rank.

The surprise: a sparse update has no small product that a forward pass could run, so natively (trained, served, in a mixed batch)
it is a replaced weight: each adapter in memory holds a dense tensor for each of its layers. Merge it to serve it for free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from veneer.adapter import Part
from veneer.base.host import Host
from veneer.errors import TargetError
from veneer.methods._abstract import Method, PeftForm
from veneer.methods._lowrank import Names
from veneer.types import Factors, HostShape, Override, Primitive, Site


def _decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    values, indices = tensors["shira_weight"], tensors["shira_indices"].to(torch.int64)
    if values.dim() != 1 or tuple(indices.shape) != (2, len(values)):
        raise ValueError(f"{list(indices.shape)} indices for {list(values.shape)} values, expected [2, n] and [n]")
    if int(indices.min()) < 0 or torch.unique(indices, dim=1).shape[1] < len(values):
        raise ValueError("an index is negative or stands twice")
    return {"values": values, "indices": indices}


@final
class SHiRA(Method):
    """A sparse update at fixed places of the weight."""

    kind: ClassVar[str] = "shira"
    site: ClassVar[Site] = "weight"
    paper: ClassVar[str] = "2406.13175"
    summary: ClassVar[str] = "W + S, S sparse"
    use: ClassVar[str] = "merged adapters that are swapped often: few entries change, a scatter-add"
    limits: ClassVar[str] = "natively a dense copy per adapter; linear layers"
    dense: ClassVar[bool] = True
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="SHIRA",
        tensors={"values": "shira_weight", "indices": "shira_indices"},
        encode=lambda t: {"shira_weight": t["values"], "shira_indices": t["indices"].to(torch.int32)},
        decode=_decode,
        fields={"rank": "r"},
        hosts=("linear",),
        config=lambda method, parts: {"mask_type": "random", "init_weights": True},
    )

    rank: int = Field(16, ge=1, description="rank of the LoRA that has as many numbers: rank (in + out) a layer")
    mask: Literal["random", "magnitude"] = Field("random", description="which entries: random, or the largest |W|")
    targets: Names = Field(("all-linear",), description="which layers carry the adapter")
    exclude: Names = Field((), description="layers to leave out")
    layers: str | tuple[int, ...] | None = Field(None, description="block numbers, or last:N, first:N")

    def _count(self, shape: HostShape) -> int:
        return self.rank * (shape.in_features + shape.out_features)

    def refusal(self, target: str, shape: HostShape) -> str | None:
        if shape.kind not in ("linear", "conv1d"):
            return f"{shape.kind} layers take no SHiRA; linear layers do"
        count, most = self._count(shape), shape.in_features * shape.out_features
        if count > most:
            largest = most // (shape.in_features + shape.out_features)
            return f"rank {self.rank} asks for {count} entries, the layer has {most}: a rank up to {largest} fits"
        return None

    def frozen(self) -> frozenset[str]:
        return frozenset({"indices"})

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        return {"values": (self._count(shape),), "indices": (2, self._count(shape))}

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        count, numel = self._count(host.shape), host.shape.in_features * host.shape.out_features
        if self.mask == "random":
            chosen = torch.randperm(numel, generator=generator)[:count]
        else:
            chosen = host.weight().float().abs().flatten().topk(count).indices
        chosen = chosen.sort().values
        indices = torch.stack([chosen // host.shape.in_features, chosen % host.shape.in_features])
        return {"values": torch.zeros(count), "indices": indices}

    def _sparse(self, part: Part, shape: HostShape) -> Tensor:
        """S as a dense `[out, in]` tensor, differentiable in the values."""
        values, (rows, columns) = part.tensors["values"], part.tensors["indices"]
        if int(rows.max()) >= shape.out_features or int(columns.max()) >= shape.in_features:
            at, size = [int(rows.max()), int(columns.max())], [shape.out_features, shape.in_features]
            raise TargetError(f"shira at '{part.target}' has an entry at {at}, the weight is {size}")
        return values.new_zeros(shape.out_features, shape.in_features).index_put((rows, columns), values)

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        base, sparse = host.apply(x), self._sparse(part, host.shape)
        return base + (x.to(sparse.dtype) @ sparse.t()).to(base.dtype)

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        weight = host.weight()
        weight = weight.to(part.tensors["values"].dtype) + self._sparse(part, host.shape)
        return (Override((weight.t() if host.shape.kind == "conv1d" else weight).contiguous()),)

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        return host.weight().float() + self._sparse(part, host.shape).float(), host.bias
