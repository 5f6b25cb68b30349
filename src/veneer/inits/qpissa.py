"""QPiSSA on a base that stays: train the strongest directions of the *original* weight on its quantised form; arXiv 2404.02948.

    s B0 A0 = best rank r of W            what is trained, as in PiSSA
    s B1 A1 = best rank r of s B0 A0 - (W - q(W))
    start     q(W) + s (B0 A0 - B1 A1)    nearer to W than q(W) is

The paper quantises W - s B0 A0 instead of W, a base for one adapter. Ours carries many and never changes, so the update that is
stored takes away what brings the sum nearest to W: docs/why/quantised-starts.md says what that costs, in numbers.

The surprise: the pair that is taken away is not the pair that is trained, so that the quantisation error is paid for, too.
"""

from __future__ import annotations

import torch

from veneer.base.host import Host
from veneer.inits._abstract import InitStats, init, need
from veneer.inits.spectral import best_factors
from veneer.types import Factors


@init("qpissa", needs=("weight",), paper="2404.02948")
def qpissa(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """The best rank-r part of the weight before quantisation, on the quantised base."""
    original = need(stats.weight if stats else None, "the weight before quantisation", "qpissa").float()
    a, b = best_factors(original, rank, scale)
    taken = best_factors(scale * b @ a - (original - host.weight().float()), rank, scale)
    return Factors(a, b, shifted=True, taken=taken)
