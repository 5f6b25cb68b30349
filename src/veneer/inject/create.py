"""A fresh adapter for a base: the places that a method asks for, each with its starting tensors.

The new adapter is the identity: it changes nothing until it is trained. Inits that need data get `stats`, gathered beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from veneer.adapter import Adapter, Provenance
from veneer.base.host import Host
from veneer.inits import INITS, InitStats
from veneer.inits import load_all as load_inits
from veneer.inject.targets import select
from veneer.methods import Method, load_all
from veneer.methods._lowrank import LowRankMethod
from veneer.methods._start import BaseView, start_parts
from veneer.types import Factors


def create(
    base: BaseView,
    spec: Method,
    generator: torch.Generator,
    *,
    stats: Mapping[str, InitStats] | None = None,
    provenance: Provenance | None = None,
) -> Adapter:
    """An adapter of method `spec` on `base` that leaves its function unchanged.

    stats  target -> what a data-driven init asked for (input covariance, gradient); None for the others
    """
    load_all()
    load_inits()
    gathered = stats or {}

    def factors(target: str, host: Host, own: torch.Generator) -> Factors | None:
        if not isinstance(spec, LowRankMethod):
            seen = gathered.get(target)
            return None if seen is None or seen.key is None or seen.value is None else Factors(seen.key, seen.value)
        rank = spec.rank_at(target)
        return INITS[spec.init](host, rank, spec.scale(target, rank), gathered.get(target), own)

    places = spec.places(base.shape)
    targets = select(base.shape, spec).targets if places is None else places
    parts = start_parts(spec, targets, base, generator, factors)
    return Adapter(spec, parts, provenance or Provenance())
