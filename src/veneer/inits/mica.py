"""MiCA: B holds the weight's r weakest left singular vectors and stays, A starts at zero and is trained; arXiv 2604.01694.

    W = U S V^T        B = U_{last r}        A = 0        trained: A alone, rank * in numbers

The update stays in directions that the base's outputs use least. The base isn't shifted.

The surprise: of a weight with more outputs than inputs it takes the weakest directions that W *has*, not those it never reaches.
"""

from __future__ import annotations

import torch

from veneer.base.host import Host
from veneer.inits._abstract import InitStats, init
from veneer.types import Factors


@init("mica", holds=("B",), paper="2604.01694")
def mica(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """The weakest left singular vectors as a B that stays, zero A."""
    u = torch.linalg.svd(host.weight().float(), full_matrices=False).U
    return Factors(torch.zeros(rank, host.shape.in_features), u[:, -rank:].contiguous())
