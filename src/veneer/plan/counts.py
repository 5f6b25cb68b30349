"""How many numbers an adapter trains and stores, from the base's shape and the method's own `tensor_shapes`.

LoRA on one `[out, in]` weight is rank * (in + out). Nothing here knows a method: what it declares is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from veneer.base.host import Host
from veneer.errors import NotFound, TargetError, listed
from veneer.inits import load_all as load_inits
from veneer.methods import METHODS, Method
from veneer.methods._start import Place, host_at
from veneer.registry import did_you_mean
from veneer.types import BaseShape


@dataclass(frozen=True)
class _Unloaded:
    """A base of which only the shape is known."""

    shape: BaseShape

    def host(self, target: str) -> Host:
        known = {**self.shape.hosts, **self.shape.norms}
        if target not in known:
            raise NotFound(f"the base has no '{target}'", help=did_you_mean(target, list(known)))
        return Place(known[target])


@dataclass(frozen=True)
class Counted:
    """One tensor that an adapter would store."""

    kind: str
    target: str
    name: str
    shape: tuple[int, ...]
    trained: bool

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def adapter_tensors(spec: Method, shape: BaseShape, targets: Sequence[str]) -> Iterator[Counted]:
    """Every tensor of an adapter of method `spec` at `targets` (module paths, or the method's own places), without a weight."""
    load_inits()  # some of them hold a factor fixed
    base = _Unloaded(shape)
    wanted: list[tuple[Method, str]] = [(spec, target) for target in targets]
    for fields, target in spec.companions(shape, targets):
        rest = {name: value for name, value in fields.items() if name != "kind"}
        wanted.append((METHODS[fields["kind"]](**rest), target))
    places = [(method, target, host_at(method.site, target, base).shape) for method, target in wanted]
    refusals = [f"{t or m.kind}: {why}" for m, t, place in places if (why := m.refusal(t, place)) is not None]
    if refusals:
        raise TargetError(f"{spec.kind} cannot go everywhere it was asked to:\n{listed(refusals)}")
    for method, target, place in places:
        for name, size in method.tensor_shapes(target, place).items():
            yield Counted(method.kind, target, name, tuple(size), name not in method.frozen())


def adapter_parameters(spec: Method, shape: BaseShape, targets: Sequence[str]) -> int:
    """Numbers that are trained."""
    return sum(tensor.numbers for tensor in adapter_tensors(spec, shape, targets) if tensor.trained)
