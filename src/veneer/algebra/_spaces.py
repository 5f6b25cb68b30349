"""The coordinates in which element-wise rules act, chosen so that they see updates and never factors.

core   M_t = U^T delta_t V, with U and V the eigenvectors of sum delta_t delta_t^T and sum delta_t^T delta_t   (small by small)
knots  C_t = U^T delta_t                                                             (KnOTS, arXiv 2410.19735; small by in)
dense  delta_t itself                                                                (the papers' own form; out by in)

core and knots lose nothing: U M V^T is delta_t. The surprise: core space as published (arXiv 2509.17786) takes its bases from the
stacked raw factors, so rescaling one adapter's factors, which changes no update, rotates the basis and changes what TIES
does. The bases here come from the updates themselves, through QR cores, so they can't.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from veneer.algebra._rule import Product, Updates
from veneer.ops.spectra import leading_svd

Space: TypeAlias = Literal["core", "knots", "dense"]

NEGLIGIBLE = 3e-7
"""Directions weaker than this, relative to the strongest, are rounding of fp32 factors and not part of an update."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The updates in some space, `[adapters, rows, columns]`, and the way back to a product."""

    values: Tensor
    back: Callable[[Tensor], Product]


def left_basis(columns: Sequence[Tensor]) -> Tensor:
    """Orthonormal `[out, k]`: left singular vectors of the blocks side by side, strongest first, negligible ones dropped."""
    q, r = torch.linalg.qr(torch.cat(list(columns), dim=1))
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    basis: Tensor = q @ u[:, : numerical_rank(s)]
    return basis


def numerical_rank(s: Tensor, size: float = 0.0) -> int:
    """How many of the singular values s (largest first) are more than rounding; at least one.

    `size` is that of the terms of a sum, which may be far above the sum's own where they cancel.
    """
    return max(1, int((s > NEGLIGIBLE * max(float(s[0]), size)).sum()))


def output_basis(updates: Updates) -> Tensor:
    """Eigenvectors of sum delta_t delta_t^T: left singular vectors of [B_t R_t^T], where A_t^T = Q R_t."""
    return left_basis([b @ torch.linalg.qr(a.t(), mode="r").R.t() for b, a in zip(updates.B, updates.A, strict=True)])


def input_basis(updates: Updates) -> Tensor:
    """Eigenvectors of sum delta_t^T delta_t, `[in, k]`."""
    return left_basis([(torch.linalg.qr(b, mode="r").R @ a).t() for b, a in zip(updates.B, updates.A, strict=True)])


def core_space(updates: Updates) -> Coordinates:
    u, v = output_basis(updates), input_basis(updates)
    values = torch.stack([(u.t() @ b) @ (a @ v) for b, a in zip(updates.B, updates.A, strict=True)])
    return Coordinates(values, lambda merged: Product(u @ merged, v.t()))


def knots_space(updates: Updates) -> Coordinates:
    u = output_basis(updates)
    values = torch.stack([(u.t() @ b) @ a for b, a in zip(updates.B, updates.A, strict=True)])
    return Coordinates(values, lambda merged: Product(u, merged))


def dense_space(updates: Updates) -> Coordinates:
    values = torch.stack([b @ a for b, a in zip(updates.B, updates.A, strict=True)])
    return Coordinates(values, lambda merged: Product(*dense_factors(merged), rank=updates.rank))


def dense_factors(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A dense matrix as an exact product: with the identity on its shorter side."""
    rows, columns = delta.shape
    if columns <= rows:
        return delta, torch.eye(columns, dtype=delta.dtype, device=delta.device)
    return torch.eye(rows, dtype=delta.dtype, device=delta.device), delta


def product_norm(b: Tensor, a: Tensor) -> float:
    """|b a|_F without the product."""
    return float((torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.t(), mode="r").R.t()).norm())


SPACES: dict[Space, Callable[[Updates], Coordinates]] = {"core": core_space, "knots": knots_space, "dense": dense_space}


@dataclass(frozen=True, eq=False)
class Fit:
    """A product at some rank: B, A, the norm of what was fitted, and the relative Frobenius error."""

    B: Tensor
    A: Tensor
    norm: float
    error: float


def fitted(b: Tensor, a: Tensor, rank: int | None = None, size: float = 0.0) -> Fit:
    """The best product of at most `rank` (None: the numerical rank, so nothing is lost).

    The singular values are split evenly between B and A. Eckart-Young: no product of that rank is nearer.
    """
    s, norm, leading = leading_svd(b, a)
    keep = min(numerical_rank(s, size), s.numel() if rank is None else rank)
    total = float(norm)
    error = float(s[keep:].norm()) / total if total > 0 else 0.0
    u, vh = leading(keep)
    root = s[:keep].sqrt()
    return Fit(u * root, root[:, None] * vh, total, error if error > NEGLIGIBLE else 0.0)
