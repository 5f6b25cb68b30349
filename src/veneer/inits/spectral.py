"""Starts from the frozen weight itself. They shift the base, and are stored as an update of the original one.

pissa          the strongest r singular triples: B0 = U sqrt(S/s), A0 = sqrt(S/s) V^T (arXiv 2404.02948)
pissa_fast     the same by a randomised SVD of four power iterations
olora          W = Q R: B0 = Q[:, :r], A0 = R[:r] (arXiv 2406.01775)

Training starts from W - s B0 A0 + s B A, which is W. They train the strong directions of W, and take a smaller learning rate than
a start from zero does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.base.host import Host
from veneer.inits._abstract import InitStats, init
from veneer.types import Factors


@init("pissa", paper="2404.02948")
def pissa(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """The best rank-r part of W."""
    a, b = best_factors(host.weight().float(), rank, scale)
    return Factors(a, b, shifted=True)


@init("pissa_fast", paper="2404.02948")
def pissa_fast(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """Nearly the best rank-r part of W, at the cost of a few products."""
    u, s, v = randomised_svd(host.weight().float(), rank, generator)
    root = (s / scale).sqrt()
    return Factors(root[:, None] * v.t(), u * root, shifted=True)


@init("olora", paper="2406.01775")
def olora(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """The first columns of Q and rows of R."""
    q, r = torch.linalg.qr(host.weight().float())
    return Factors(r[:rank].contiguous(), q[:, :rank].contiguous(), shifted=True)


def best_factors(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A and B with scale B A the best rank-r approximation of `weight`, the singular values split evenly."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def randomised_svd(
    weight: Tensor, rank: int, generator: torch.Generator, *, iterations: int = 4, spare: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """U `[m, r]`, S `[r]`, V `[n, r]` by subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061)."""
    width = min(rank + spare, *weight.shape)
    q = torch.linalg.qr(weight @ torch.randn(weight.shape[1], width, generator=generator, dtype=weight.dtype)).Q
    for _ in range(iterations):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.t() @ weight, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vh[:rank].t()
