"""Exact sums: delta = sum_t w_t delta_t (task arithmetic, arXiv 2212.04089), stored in four ways.

    cat            A = [A_1; A_2; ...], B = [w_1 B_1, w_2 B_2, ...]: rank sum r_t, no arithmetic at all
    linear         the same matrix at its numerical rank: a - a is rank 1 and zero, a + a has the rank of a
    svd            its best approximation of a given rank (Eckart-Young), the error reported
    factor_linear  PEFT's `linear`: (sum sqrt(w) B)(sum sqrt(w) A). Not a sum of updates

The surprise: `factor_linear` has cross terms B_i A_j, so half of one adapter plus half of another can differ from their sum
by 100 %, and +1 and -1 do not cancel. It is here for those who must reproduce it, under its own name only.
"""

from __future__ import annotations

import math

import torch

from veneer.algebra._rule import Product, Rank, Updates, rule
from veneer.algebra._spaces import fitted, product_norm
from veneer.errors import Unsupported


@rule("cat")
def cat(updates: Updates) -> Product:
    """The weighted sum by concatenation: exact, the ranks add up."""
    b = torch.cat([w * b for w, b in zip(updates.weights, updates.B, strict=True)], dim=1)
    return Product(b, torch.cat(updates.A))


@rule("linear")
def linear(updates: Updates) -> Product:
    """The weighted sum at its numerical rank: exact, and no larger than it must be."""
    summed = cat(updates)
    size = max(abs(w) * product_norm(b, a) for w, b, a in zip(updates.weights, updates.B, updates.A, strict=True))
    fit = fitted(summed.B, summed.A, size=size)
    return Product(fit.B, fit.A)


@rule("svd")
def svd(updates: Updates, *, rank: Rank | None = None) -> Product:
    """The best approximation of the weighted sum at `rank`, by default the largest rank among the adapters."""
    summed = cat(updates)
    return Product(summed.B, summed.A, rank=updates.rank if rank is None else rank)


@rule("factor_linear")
def factor_linear(updates: Updates) -> Product:
    """PEFT's factor-wise form, for compatibility: depends on how each update is factored."""
    ranks = {a.shape[0] for a in updates.A}
    if len(ranks) > 1:
        raise Unsupported(
            f"factor_linear adds factors, so all ranks must be equal; at '{updates.target}' they are {sorted(ranks)}",
            help="use linear, cat or svd: they add updates and take any ranks",
        )
    pairs = list(zip(updates.weights, updates.A, updates.B, strict=True))
    a = torch.stack([math.sqrt(abs(w)) * a for w, a, _ in pairs]).sum(0)
    b = torch.stack([math.copysign(math.sqrt(abs(w)), w) * b for w, _, b in pairs]).sum(0)
    return Product(b, a)
