"""Bottleneck adapters: h <- h + scale (f(h D^T + d) U^T + u), a small network after a sublayer.

houlsby   after attention and after the MLP, before the residual add (arXiv 1902.00751)
pfeiffer  after the MLP only (arXiv 2005.00247)
parallel  beside the MLP: it reads what the MLP reads, and its output is added to the MLP's, scale 4 (arXiv 2110.04366)

U starts at zero, so the start is exactly the base. Being non-linear, it can't be merged into a weight. Houlsby's paper also
trains the norms, later libraries don't: `norms: true` does, as replaced tensors in the same adapter.

The surprise: PEFT has none of these, so the file carries our own names and PEFT refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, cast, final

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from veneer.adapter import HostSource, Part
from veneer.base.host import Host
from veneer.errors import Unsupported
from veneer.methods._abstract import Method
from veneer.methods._layers import chosen_layers
from veneer.methods._lowrank import Names
from veneer.ops.gated import activate
from veneer.types import BaseShape, Factors, HostShape, Lowered, Primitive, Site, Sublayer
from veneer.types import Bottleneck as BottleneckPrimitive

_SUBLAYERS: dict[str, tuple[Sublayer, ...]] = {
    "houlsby": ("attn_out", "mlp_out"),
    "pfeiffer": ("mlp_out",),
    "parallel": ("mlp_out",),
}


@final
class Bottleneck(Method):
    """A small network after, or beside, a sublayer."""

    kind: ClassVar[str] = "bottleneck"
    site: ClassVar[Site] = "sublayer"
    paper: ClassVar[str] = "1902.00751"
    summary: ClassVar[str] = "h + scale f(h D) U"
    use: ClassVar[str] = "many tasks as modules beside each other, where merging is not needed"
    limits: ClassVar[str] = "not mergeable; two more products per sublayer when served"
    why_not_mergeable: ClassVar[str] = "it is not linear"
    settings: ClassVar[tuple[str, ...]] = ("style", "activation", "strength")

    style: Literal["houlsby", "pfeiffer", "parallel"] = Field("pfeiffer", description="where it sits")
    size: int | None = Field(None, ge=1, description="width; by default hidden/16, and hidden/2 for parallel")
    activation: Literal["relu", "gelu", "silu"] = Field("relu", description="the function in the middle")
    strength: float | None = Field(None, gt=0, description="the scale; by default 1, and 4 for parallel")
    layers: str | tuple[int, ...] | None = Field(None, description="block numbers, or last:N, first:N")
    norms: bool = Field(False, description="train the norms of those blocks too, as Houlsby's paper does")
    modules: Names = Field((), description="on a model outside the table: paths of the modules whose output it takes")

    @property
    def _scale(self) -> float:
        return self.strength if self.strength is not None else 4.0 if self.style == "parallel" else 1.0

    def places(self, shape: BaseShape) -> tuple[str, ...]:
        if self.modules:
            return self.modules
        layers = chosen_layers(self.layers, shape.layers)
        return tuple(f"layers.{i}.{sublayer}" for i in layers for sublayer in _SUBLAYERS[self.style])

    @model_validator(mode="after")
    def _norms_are_known(self) -> Self:
        if self.norms and self.modules:
            raise ValueError(
                "which norms belong to `modules` is not known: train them with a `full` adapter of their own"
            )
        return self

    def companions(self, shape: BaseShape, targets: Sequence[str]) -> tuple[tuple[dict[str, Any], str], ...]:
        layers = chosen_layers(self.layers, shape.layers) if self.norms else ()
        inside = [
            path for path in shape.norms if any(part.isdigit() and int(part) in layers for part in path.split("."))
        ]
        return tuple(({"kind": "full", "targets": (path,)}, path) for path in inside)

    def _width(self, hidden: int) -> int:
        return self.size or max(1, hidden // (2 if self.style == "parallel" else 16))

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        hidden, width = shape.out_features, self._width(shape.out_features)
        return {"down": (width, hidden), "down_bias": (width,), "up": (hidden, width), "up_bias": (hidden,)}

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.tensor_shapes(target, host.shape)
        tensors = {name: torch.zeros(size) for name, size in shapes.items()}
        tensors["down"] = torch.randn(shapes["down"], generator=generator) * shapes["down"][1] ** -0.5
        return tensors

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        """x is the sublayer's output; for parallel, (the sublayer's input, its output) stacked in front."""
        source, h = (x[0], x[1]) if self.style == "parallel" else (x, x)
        t = {name: tensor.to(h.dtype) for name, tensor in part.tensors.items()}
        inner = activate(F.linear(source, t["down"], t["down_bias"]), self.activation)
        return h + self._scale * F.linear(inner, t["up"], t["up_bias"])

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        return (self._primitive(part),)

    def lower_into(self, lowered: Lowered, part: Part, source: HostSource) -> Lowered:
        match = re.fullmatch(r"layers\.(\d+)\.(attn_out|mlp_out)", part.target or "")
        if match is None:
            raise Unsupported(
                f"'{part.target}' is a module of another model, not a sublayer of the native decoder",
                help="attach the adapter to the model it was made for",
            )
        at = (int(match[1]), cast(Sublayer, match[2]))
        there = lowered.sublayers.get(at, ())
        return replace(lowered, sublayers={**lowered.sublayers, at: (*there, self._primitive(part))})

    def _primitive(self, part: Part) -> BottleneckPrimitive:
        t, parallel = part.tensors, self.style == "parallel"
        return BottleneckPrimitive(
            t["down"], t["down_bias"], t["up"], t["up_bias"], self.activation, self._scale, parallel
        )
