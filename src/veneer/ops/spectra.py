"""Singular values of a product B A, without ever forming it, and what they say.

    B = Q_B R_B,  A^T = Q_A R_A,  SVD of the small core R_B R_A^T = U' S V'^T;  U = Q_B U',  V = Q_A V'

The cost is O((out + in) r^2) and the result agrees with the dense SVD to rounding. Everything runs in the dtype given; use
fp32 or fp64. The surprise: nothing here depends on how the product is factored, so two files that hold the same update
report the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def low_rank_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[out, k]`, S `[k]`, V^T `[k, in]` of b a, with k = min(rank, out, in), for b `[out, rank]` and a `[rank, in]`."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.t())
    u, s, vh = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return q_b @ u, s, vh @ q_a.t()


def low_rank_svd_reference(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the dense product."""
    k = min(b.shape[1], b.shape[0], a.shape[1])
    u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
    return u[:, :k], s[:k], vh[:k]


def leading_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Callable[[int], tuple[Tensor, Tensor]]]:
    """Singular values of b a, its norm, and a function from k to the leading U `[out, k]` and V^T `[k, in]`.

    By the Gram matrices B^T B and A A^T in fp64 in place of QR: large factors are only ever multiplied by thin ones, which is
    several times faster. Directions below 1e-8 of the strongest are lost, far below what fp32 factors hold.
    """
    root_b, root_a = _gram_root(b.t() @ b), _gram_root(a @ a.t())
    u, s, vh = torch.linalg.svd(root_b[0] @ root_a[0].t(), full_matrices=False)

    def leading(k: int) -> tuple[Tensor, Tensor]:
        return b @ (root_b[1] @ u[:, :k]), (vh[:k] @ root_a[1].t()) @ a

    return s, s.norm(), leading


def _gram_root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R `[k, r]` with R^T R = gram, and its right inverse `[r, k]`, over the directions that are more than rounding."""
    values, vectors = torch.linalg.eigh(gram)
    keep = values > values[-1] * 1e-16
    keep[-1] = True
    root = values[keep].clamp_min(0).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    return root[:, None] * vectors[:, keep].t(), vectors[:, keep] * inverse


def low_rank_singular_values(b: Tensor, a: Tensor) -> Tensor:
    """The singular values of b a, `[min(rank, out, in)]`, largest first."""
    r_b = torch.linalg.qr(b, mode="r").R
    r_a = torch.linalg.qr(a.t(), mode="r").R
    sigma: Tensor = torch.linalg.svdvals(r_b @ r_a.t())
    return sigma


def low_rank_inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    """<b1 a1, b2 a2> = tr((b1^T b2)(a2 a1^T)), a scalar."""
    return ((b1.t() @ b2) * (a1 @ a2.t())).sum()


@dataclass(frozen=True)
class Spectrum:
    """What the singular values sigma of one matrix say.

    frobenius       sqrt(sum sigma^2)
    spectral        sigma_1
    stable_rank     sum sigma^2 / sigma_1^2
    effective_rank  exp(-sum p ln p), p = sigma / sum sigma
    participation   (sum sigma^2)^2 / sum sigma^4
    energy_rank     how many singular values carry 90 % of the energy
    All ranks are n for an n x n identity, 1 for a rank-one matrix and 0 for the zero matrix.
    """

    frobenius: float
    spectral: float
    stable_rank: float
    effective_rank: float
    participation: float
    energy_rank: int


def spectrum(sigma: Tensor, *, energy: float = 0.9) -> Spectrum:
    """The measures of singular values `[k]`, largest first.

    >>> spectrum(torch.ones(4)).stable_rank, spectrum(torch.tensor([3.0, 0.0])).effective_rank
    (4.0, 1.0)
    """
    values = sigma.double()
    top = float(values[0]) if values.numel() else 0.0
    if top == 0.0:
        return Spectrum(0.0, 0.0, 0.0, 0.0, 0.0, 0)
    squares = (values / top).square()
    total = float(squares.sum())
    share = values[values > 0] / values.sum()
    reached = torch.cumsum(squares, 0) < energy * total * (1 - 1e-12)
    return Spectrum(
        frobenius=top * math.sqrt(total),
        spectral=top,
        stable_rank=total,
        effective_rank=math.exp(float(-(share * share.log()).sum())),
        participation=total**2 / float(squares.square().sum()),
        energy_rank=min(int(reached.sum()) + 1, values.numel()),
    )
