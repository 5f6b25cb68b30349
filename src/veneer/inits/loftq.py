"""LoftQ: start an adapter on a quantised base with what quantisation took away; arXiv 2310.08659.

(B, A) = best rank r of (W - q(W)) / s, so that q(W) + s B A is nearer to W than q(W) is.

The surprise: this is the first step of the paper's alternation, and the last one that means anything here. Later steps replace
q(W) by q(W - s B A), another base, while ours never changes: one quantised base carries many adapters. On a base that stays, the
first step is already the best rank-r answer (Eckart-Young), and repeating it gives it again: docs/why/quantised-starts.md.
`alternate` is the paper's whole loop, which the benchmark of quantisation measures.

The original weight has to be at hand: the 16-bit checkpoint that was quantised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from veneer.base.host import Host
from veneer.inits._abstract import InitStats, init, need
from veneer.inits.spectral import best_factors
from veneer.types import Factors


@init("loftq", needs=("weight",), paper="2310.08659")
def loftq(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """The best rank-r part of the quantisation error."""
    original = need(stats.weight if stats else None, "the weight before quantisation", "loftq")
    a, b = best_factors(original.float() - host.weight().float(), rank, scale)
    return Factors(a, b)


def alternate(
    weight: Tensor, quantise: Callable[[Tensor], Tensor], rank: int, scale: float, steps: int
) -> tuple[Tensor, Factors]:
    """The paper's loop: (Q, factors) of the step with the smallest |W - Q - s B A|. `quantise` goes there and back."""
    best: tuple[float, Tensor, Factors] | None = None
    update = torch.zeros_like(weight)
    for _ in range(steps):
        base = quantise(weight - update)
        a, b = best_factors(weight - base, rank, scale)
        update = scale * b @ a
        error = float(torch.linalg.norm(weight - base - update))
        if best is None or error < best[0]:
            best = (error, base, Factors(a, b))
    assert best is not None
    return best[1], best[2]
