"""IA3: a learned vector rescales keys, values and the inner activations of the MLP; arXiv 2205.05638.

y = l * (x W^T + b) on keys and values; y = (l * x) W^T + b on the layer that leaves the MLP. The vectors start as ones.

The surprise: one method, two sides. A part says by the name of its tensor which side it scales, so files need no list of
feed-forward layers; layers that read the MLP's inner activations are told by their names (`feedforward`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from veneer.adapter import Part
from veneer.base.host import Host
from veneer.methods._abstract import Method, PeftForm
from veneer.methods._lowrank import Names
from veneer.types import BaseShape, Factors, HostShape, InScale, OutScale, Primitive, Site

_BY_FAMILY = (
    ("k_proj", "v_proj", "down_proj"),
    ("qkv_proj", "down_proj"),
    ("query_key_value", "dense_4h_to_h"),
    ("c_attn", "mlp.c_proj"),
)
"""What carries keys and values, and what leaves the MLP, in the families we know; the first row that fits is taken."""


def _named(target: str, names: Sequence[str]) -> bool:
    return any(target == name or target.endswith(f".{name}") for name in names)


def _encode(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"ia3_l": tensors["in_scale"][None, :] if "in_scale" in tensors else tensors["out_scale"][:, None]}


def _decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    vector = tensors["ia3_l"]
    if vector.dim() != 2 or 1 not in vector.shape:
        raise ValueError(f"ia3_l is {list(vector.shape)}, expected [1, in] or [out, 1]")
    return {"in_scale" if vector.shape[0] == 1 else "out_scale": vector.reshape(-1).contiguous()}


def _feedforward(method: Any, parts: Sequence[Part]) -> dict[str, Any]:
    return {"feedforward_modules": [p.target for p in parts if "in_scale" in p.tensors], "init_ia3_weights": True}


@final
class IA3(Method):
    """A vector of scales per layer: on the output, or on the input of feed-forward layers."""

    kind: ClassVar[str] = "ia3"
    site: ClassVar[Site] = "weight"
    paper: ClassVar[str] = "2205.05638"
    summary: ClassVar[str] = "l * (x W^T + b), or (l * x) W^T + b"
    use: ClassVar[str] = "very few examples, very small files"
    limits: ClassVar[str] = "little capacity; wants a high learning rate (3e-3)"
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="IA3",
        tensors={"out_scale": "ia3_l"},
        encode=_encode,
        decode=_decode,
        config=_feedforward,
        parse=lambda config, parts: {"feedforward": tuple(p.target for p in parts if "in_scale" in p.tensors)},
    )

    targets: Names = Field((), description="which layers; empty: keys, values and the MLP's last layer of the family")
    exclude: Names = Field((), description="layers to leave out")
    layers: str | tuple[int, ...] | None = Field(None, description="block numbers, or last:N, first:N")
    feedforward: Names = Field(
        ("down_proj", "dense_4h_to_h", "mlp.c_proj"), description="those of them whose input is scaled"
    )

    def places(self, shape: BaseShape) -> tuple[str, ...] | None:
        if self.targets:
            return None
        for names in _BY_FAMILY:
            found = tuple(path for path in shape.hosts if _named(path, names))
            if all(any(_named(path, (name,)) for path in found) for name in names):
                return found
        return None

    def refusal(self, target: str, shape: HostShape) -> str | None:
        return None if shape.kind in ("linear", "conv1d") else f"{shape.kind} layers have no activations to scale"

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        if _named(target, self.feedforward):
            return {"in_scale": (shape.in_features,)}
        return {"out_scale": (shape.out_features,)}

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.ones(size) for name, size in self.tensor_shapes(target, host.shape).items()}

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        if "in_scale" in part.tensors:
            return host.apply(x * part.tensors["in_scale"].to(x.dtype))
        y = host.apply(x)
        return y * part.tensors["out_scale"].to(y.dtype)

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        if "in_scale" in part.tensors:
            return (InScale(part.tensors["in_scale"]),)
        return (OutScale(part.tensors["out_scale"], scales_bias=True),)

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        weight = host.weight().float()
        if "in_scale" in part.tensors:
            return weight * part.tensors["in_scale"].float(), host.bias
        vector = part.tensors["out_scale"].float()
        return weight * vector[:, None], None if host.bias is None else host.bias.float() * vector
