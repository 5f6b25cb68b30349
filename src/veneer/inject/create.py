"""A fresh adapter for a base: the places that a method asks for, each with its starting tensors.

The new adapter is the identity: it changes nothing until it is trained. Inits that need data get `stats`, gathered beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from veneer.adapter import Adapter, Part, Provenance
from veneer.base.host import Host
from veneer.inits import INITS
from veneer.inject.targets import select
from veneer.methods import Method, load_all
from veneer.methods._lowrank import LowRankMethod
from veneer.types import BaseShape, Factors


class Source(Protocol):
    """A base to make an adapter for: native, or any module wrapped by `attach`."""

    @property
    def shape(self) -> BaseShape: ...

    def host(self, target: str) -> Host: ...


def create(
    base: Source,
    spec: Method,
    generator: torch.Generator,
    *,
    stats: Mapping[str, Any] | None = None,
    provenance: Provenance | None = None,
) -> Adapter:
    """An adapter of method `spec` on `base` that leaves its function unchanged.

    stats  target -> what a data-driven init asked for (input covariance, gradient); None for the others
    """
    parts = list(_parts(base, spec, generator, stats or {}))
    if isinstance(spec, LowRankMethod) and spec.bias != "none":
        parts += _bias_parts(base, spec, generator, {p.target for p in parts})
    return Adapter(spec, tuple(parts), provenance or Provenance())


def _parts(base: Source, spec: Method, generator: torch.Generator, stats: Mapping[str, Any]) -> Iterable[Part]:
    if spec.site == "weight":
        for target in select(base.shape, spec).targets:
            host = base.host(target)
            factors = _factors(spec, target, host, generator, stats.get(target))
            yield Part(spec.kind, "weight", target, spec.start(target, host, factors, generator))
    else:
        for place in spec.places(base.shape):
            yield spec.start_at(place, base, generator)


def _factors(spec: Method, target: str, host: Host, generator: torch.Generator, stats: Any) -> Factors | None:
    if not isinstance(spec, LowRankMethod):
        return None
    rank = spec.rank_at(target)
    return INITS[spec.init](host, rank, spec.scale(target, rank), stats, generator)


def _bias_parts(base: Source, spec: LowRankMethod, generator: torch.Generator, adapted: set[str | None]) -> list[Part]:
    bitfit = load_all()["bitfit"]()
    chosen = [
        path
        for path, shape in base.shape.hosts.items()
        if shape.has_bias and (spec.bias == "all" or path in adapted)
    ]
    return [Part("bitfit", "weight", path, bitfit.start(path, base.host(path), None, generator)) for path in chosen]
