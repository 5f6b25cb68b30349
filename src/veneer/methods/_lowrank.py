"""What the low-rank methods share: rank, alpha, the scale rule, patterns per target, and the product itself.

delta = scale * B @ A, with A `[rank, in]` and B `[out, rank]`. Patterns follow PEFT: a key matches a target as
`(.*\\.)?(KEY)$`, first hit wins. On a convolution A is a convolution of its own, with the kernel, stride, padding and dilation
of the layer, and B one of a single cell, so that the same matrices say the same update.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor

from veneer.adapter import Adapter, Part
from veneer.base.host import Host
from veneer.errors import ConfigError
from veneer.methods._abstract import Method
from veneer.methods._start import embedding_path
from veneer.types import (
    HELD_FACTORS,
    SCALE_RULES,
    BaseShape,
    Factors,
    HostShape,
    LowRank,
    Primitive,
    effective_scale,
)


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""One selector or several: `all-linear`, a name, a suffix, a glob, `re:REGEX`."""


def pattern_value(patterns: Mapping[str, float], target: str, default: float) -> float:
    """The value of the first key that matches `target`, or `default`."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", target):
            return value
    return default


class ScaledMethod(Method):
    """Fields and functions of every method with a rank and a scale: alpha and its rule, targets, patterns per target."""

    rank: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(32.0, gt=0, description="numerator of the scale")
    scaling: str = Field("alpha/r", description="scale rule: alpha/r (LoRA) or alpha/sqrt(r) (rsLoRA)")
    targets: Names = Field(("all-linear",), description="which layers carry the adapter")
    exclude: Names = Field((), description="layers to leave out")
    layers: str | tuple[int, ...] | None = Field(None, description="block numbers, or last:N, first:N")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input during training")
    rank_pattern: Mapping[str, int] = Field(default_factory=dict, description="target pattern -> rank")
    alpha_pattern: Mapping[str, float] = Field(default_factory=dict, description="target pattern -> alpha")

    @field_validator("scaling")
    @classmethod
    def _known_rule(cls, value: str) -> str:
        try:
            SCALE_RULES[value]
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value

    def rank_at(self, target: str) -> int:
        return int(pattern_value(self.rank_pattern, target, self.rank))

    def scale(self, target: str, rank: int) -> float:
        return effective_scale(self.scaling, pattern_value(self.alpha_pattern, target, self.alpha), rank)

    def scaled(self, factor: float) -> Self:
        if not factor > 0:
            raise ConfigError(
                f"a scale factor must be positive, got {factor}",
                help="to subtract an adapter use `veneer combine` with a negative weight",
            )
        patterns = {key: alpha * factor for key, alpha in self.alpha_pattern.items()}
        return self.model_copy(update={"alpha": self.alpha * factor, "alpha_pattern": patterns})

    def refusal(self, target: str, shape: HostShape) -> str | None:
        if shape.kind not in ("linear", "conv1d", "conv", "embedding"):
            return f"{shape.kind} layers take no low-rank update"
        if shape.groups > 1:
            return f"it is a convolution in {shape.groups} groups, whose channels a low-rank product would mix"
        rank, most = self.rank_at(target), min(shape.in_features, shape.out_features)
        return f"rank {rank} is above the layer's {most}" if rank > most else None


class LowRankMethod(ScaledMethod):
    """Fields and functions of every method whose update starts from scale * B @ A, both trained."""

    init: str = Field("default", description="initialisation scheme")
    rho: float = Field(1.0, ge=1, description="init: eva: how far ranks may move between layers; 1 keeps them equal")
    bias: Literal["none", "lora_only", "all"] = Field("none", description="which biases to train too")
    modules_to_save: Names = Field((), description="layers to train whole, beside the update")
    trainable_tokens: tuple[int, ...] = Field((), description="rows of the input embedding to train, beside the update")

    def companions(self, shape: BaseShape, targets: Sequence[str]) -> tuple[tuple[dict[str, Any], str], ...]:
        whole: list[str] = []
        for name in self.modules_to_save:
            matches = [path for path in shape.hosts if path == name or path.endswith(f".{name}")]
            whole += [path for path in matches or [name] if path not in whole]
        found: list[tuple[dict[str, Any], str]] = [({"kind": "full", "targets": (path,)}, path) for path in whole]
        if self.bias != "none":
            biased = targets if self.bias == "lora_only" else tuple(shape.hosts)
            biased = tuple(path for path in biased if shape.hosts[path].has_bias and path not in whole)
            found += [({"kind": "full", "only": "bias"}, path) for path in biased]
        if self.trainable_tokens:
            found.append(({"kind": "token_rows", "tokens": self.trainable_tokens}, embedding_path(shape)))
        return tuple(found)

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        """A of a convolution keeps the kernel's form, `[rank, channels, *kernel]`."""
        rank = self.rank_at(target)
        return {"A": (rank, *input_axes(shape)), "B": (shape.out_features, rank)}

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        if factors is None:
            raise ConfigError(
                f"{self.kind} needs starting factors for '{target}'", help="create adapters with inject.create"
            )
        a = factors.A.reshape(-1, *input_axes(host.shape))
        if not factors.shifted:
            return {"A": a, "B": factors.B}
        # Stored so that the sum is right on the original base: W + s (B A - B0 A0).
        a0, b0 = factors.taken or (factors.A, factors.B)
        return {"A": a, "B": factors.B, "A0": a0.reshape(a.shape).clone(), "B0": b0.clone()}

    def frozen(self) -> frozenset[str]:
        return frozenset({"A0", "B0"}) | HELD_FACTORS.get(self.init, frozenset())

    def folded(self, adapter: Adapter) -> Adapter:
        """A shifted start as a plain update of the original base: [B, -B0][A; A0], twice the rank and the same scale."""
        if not any("A0" in part.tensors for part in adapter.parts):
            return adapter
        double = {key: 2 * rank for key, rank in self.rank_pattern.items()}
        one, two = effective_scale(self.scaling, 1.0, self.rank), effective_scale(self.scaling, 1.0, 2 * self.rank)
        spec = self.model_copy(
            update={
                "rank": 2 * self.rank,
                "alpha": self.alpha * (one / two),
                "rank_pattern": double,
                "alpha_pattern": {key: alpha * (one / two) for key, alpha in self.alpha_pattern.items()},
                "init": "default",
            }
        )
        parts = [replace(p, tensors=_plain(p.tensors)) if p.kind == self.kind else p for p in adapter.parts]
        return replace(adapter, spec=spec, parts=tuple(parts))

    def factors(self, part: Part) -> tuple[Tensor, Tensor]:
        """A `[rank, in]` and scale * B of a part, the frozen start of a shifted init subtracted."""
        assert part.target is not None
        a, b = part.tensors["A"], part.tensors["B"]
        scale = self.scale(part.target, a.shape[0])
        if "A0" in part.tensors:
            a, b = torch.cat([a, part.tensors["A0"]]), torch.cat([b, -part.tensors["B0"]], dim=1)
        return a.flatten(1), b * scale


class Factored(Method):
    """A method whose update of a layer is B A and nothing else, whatever it is trained as."""

    @abstractmethod
    def factors(self, part: Part) -> tuple[Tensor, Tensor]:
        """A `[rank, in]`, and B `[out, rank]` with the scale in it."""

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        base = host.apply(x)
        return base + low_rank_output(x, *self.factors(part), host).to(base.dtype)

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        return (LowRank(*self.factors(part)),)

    def direct_delta(self, part: Part) -> Tensor:
        a, b = self.factors(part)
        return b.float() @ a.float()

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        return host.weight().float() + self.direct_delta(part), host.bias


def low_rank_output(x: Tensor, a: Tensor, b: Tensor, host: Host) -> Tensor:
    """B A x in this layer's place: rows x, token ids on an embedding, images on a convolution."""
    x = x if host.shape.kind == "embedding" else x.to(a.dtype)
    return host.mix(host.product(x, a), b)


def input_axes(shape: HostShape) -> tuple[int, ...]:
    """What one row of A looks like as stored: `[in]`, or `[channels, *kernel]` of a convolution."""
    return (shape.in_features // math.prod(shape.kernel), *shape.kernel)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rest = {name: tensor for name, tensor in tensors.items() if name not in ("A0", "B0")}
    if "A0" in tensors:
        rest["A"] = torch.cat([tensors["A"], tensors["A0"]])
        rest["B"] = torch.cat([tensors["B"], -tensors["B0"]], dim=1)
    return rest
