"""An adapter's effective update at one target, as an exact product in fp64.

A part whose method lowers to low-rank primitives alone gives its factors, the scale folded in. A part whose update depends on
the frozen weight (DoRA, IA3) gives its dense update times an identity, which is exact too, and needs the base. Everything
else an adapter may carry (biases, replaced tensors, prompts, bottlenecks) is no update of a weight: it is listed, and the
caller decides; nothing is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer import methods
from veneer.adapter import Adapter, HostSource, Part
from veneer.algebra._spaces import dense_factors
from veneer.base.host import Host
from veneer.errors import NeedsBase, Unsupported
from veneer.types import Bias, HostShape, LowRank, Primitive


class _Absent(Host):
    """The host of a base that was not given: any look at it says so."""

    def __init__(self, target: str, kind: str) -> None:
        self._message = f"the {kind} update at '{target}' depends on the frozen weight"

    def _refuse(self) -> NeedsBase:
        return NeedsBase(self._message, help="give the base: combine(..., base=base) or `base:` in the recipe")

    @property
    def shape(self) -> HostShape:  # type: ignore[override]
        raise self._refuse()

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        raise self._refuse()

    @property
    def dtype(self) -> torch.dtype:
        raise self._refuse()

    @property
    def device(self) -> torch.device:
        raise self._refuse()

    def weight(self) -> Tensor:
        raise self._refuse()


@dataclass(frozen=True, eq=False)
class Source:
    """One adapter's update at one target: B `[out, rank]` with the scale folded in, A `[rank, in]`, fp64.

    `rank` is what the adapter stores, None for methods without one; `dense` says the product is a dense matrix in disguise.
    """

    B: Tensor
    A: Tensor
    rank: int | None
    dense: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]


def is_update(part: Part) -> bool:
    """Whether `part` changes a weight (and is not a bias alone, a whole tensor, a prompt, a sublayer)."""
    return part.site == "weight" and part.target is not None and set(part.tensors) != {"bias"}


def is_shared(part: Part) -> bool:
    """Whether `part` holds tensors that the other weight parts of its kind are made of (VeRA's A and B)."""
    return part.site == "weight" and part.target is None


def source(adapter: Adapter, part: Part, base: HostSource | None) -> Source:
    """The exact update of `part`; NeedsBase or Unsupported say what is in the way."""
    target = part.target
    assert target is not None
    part = methods.complete(adapter if base is None else methods.completed(adapter, base), part)
    part = replace(part, tensors={name: _exact(tensor) for name, tensor in part.tensors.items()})
    method = methods.method_of(adapter, part)
    host: Host = _Absent(target, part.kind) if base is None else base.host(target)
    primitives = method.lower(part, host)
    stored = part.tensors["A"].shape[0] if "A" in part.tensors else None
    if primitives and all(isinstance(p, LowRank) for p in primitives):
        a, b = stacked(primitives)
        return Source(b, a, a.shape[0], dense=False)
    return Source(*dense_factors(_dense_update(method, part, host)), stored, dense=True)


def _exact(tensor: Tensor) -> Tensor:
    """A tensor in fp64 on the CPU; indices stay whole numbers."""
    return tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype)


def stacked(primitives: Sequence[Primitive]) -> tuple[Tensor, Tensor]:
    """A and B of low-rank primitives side by side, fp64."""
    products = [p for p in primitives if isinstance(p, LowRank)]
    return torch.cat([p.A for p in products]).double(), torch.cat([p.B for p in products], dim=1).double()


def _dense_update(method: methods.Method, part: Part, host: Host) -> Tensor:
    weight, bias = method.merged(part, host)
    before = host.bias
    moved = bias is not None and (before is None or not torch.equal(bias.float(), before.float()))
    if moved or any(isinstance(p, Bias) for p in method.lower(part, host)):
        raise Unsupported(
            f"{part.kind} at '{part.target}' also changes the bias, which a combined LoRA can't hold",
            help="merge this adapter into the base, or leave the target out with exclude",
        )
    return weight.double() - host.weight().double()
