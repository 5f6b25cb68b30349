"""Starts that look at no weight and no data.

default    A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0 (Kaiming uniform with a = sqrt(5), as loralib and PEFT)
gaussian   A ~ N(0, 1/rank^2), B = 0 (PEFT's "gaussian")
orthogonal A's rows orthonormal, B = 0

On an embedding the roles are swapped, A = 0 and B ~ N(0, 1): a row of A per token would otherwise be random noise for every token
that training never sees.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.base.host import Host
from veneer.inits._abstract import InitStats, init
from veneer.types import Factors


@init("default", paper="2106.09685")
def default(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """Kaiming uniform A, zero B."""
    if host.shape.kind == "embedding":
        return _embedding(host, rank, generator)
    bound = 1 / math.sqrt(host.shape.in_features)
    a = torch.empty(rank, host.shape.in_features).uniform_(-bound, bound, generator=generator)
    return Factors(a, torch.zeros(host.shape.out_features, rank))


@init("gaussian")
def gaussian(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """Normal A with standard deviation 1/rank, zero B."""
    if host.shape.kind == "embedding":
        return _embedding(host, rank, generator)
    a = torch.randn(rank, host.shape.in_features, generator=generator) / rank
    return Factors(a, torch.zeros(host.shape.out_features, rank))


@init("orthogonal")
def orthogonal(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """Orthonormal rows of A, zero B."""
    if host.shape.kind == "embedding":
        return _embedding(host, rank, generator)
    q: Tensor = torch.linalg.qr(torch.randn(host.shape.in_features, rank, generator=generator)).Q
    return Factors(q.t().contiguous(), torch.zeros(host.shape.out_features, rank))


def _embedding(host: Host, rank: int, generator: torch.Generator) -> Factors:
    b = torch.randn(host.shape.out_features, rank, generator=generator)
    return Factors(torch.zeros(rank, host.shape.in_features), b)
