"""Rules that look at single entries: TIES (arXiv 2306.01708), DARE (2311.03099), magnitude pruning.

    trim      keep the `density` largest |entries| of each update
    drop      keep each entry with probability `density` and divide it by `density`: unbiased, E = delta
    elect     sign_ij = sign(sum_t w_t v_t,ij)
    average   sum of w_t v_t,ij over the adapters that agree with sign_ij, divided by the sum of their |w_t|

    ties = trim, elect, average       dare = drop, weighted sum
    dare_ties = drop, elect, average  magnitude = trim, weighted sum

Scope is one target: `density` counts the entries of that target's matrix (as mergekit and PEFT do; the TIES paper counts over
the whole model). The election is weighted and the average divides by the weights (as mergekit does), so the weights of
`ties` are relative: one adapter at 0.5 is that adapter. An entry whose votes cancel has no majority and becomes 0.

The space in which entries are looked at is the canonical core (`_spaces.py`) unless said otherwise, so the result is low-rank
by construction and does not depend on how the updates are factored. The surprise: PEFT's rules of these names prune A and
B apart, which is another operation altogether (its issue 3004).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from veneer.algebra._rule import Density, Product, Updates, rule
from veneer.algebra._spaces import SPACES, Space
from veneer.registry import Registry

Entrywise: TypeAlias = Callable[[Tensor, Tensor, float, Sequence[torch.Generator]], Tensor]
"""(values `[adapters, rows, columns]`, weights `[adapters]`, density, a random stream per adapter) -> `[rows, columns]`."""

INNER: Registry[Entrywise] = Registry("element-wise rule")

CANCELLED = 1e-9
"""A sum of votes below this share of the votes cast is a draw."""


def trimmed(values: Tensor, density: float) -> Tensor:
    """Each `[rows, columns]` matrix with only its `density` largest entries by magnitude; equal ones stay together."""
    flat = values.abs().flatten(1)
    keep = max(1, round(density * flat.shape[1]))
    threshold = flat.kthvalue(flat.shape[1] - keep + 1, dim=1).values
    return torch.where(values.abs() >= threshold[:, None, None], values, 0.0)


def dropped(values: Tensor, density: float, streams: Sequence[torch.Generator]) -> Tensor:
    """Each entry kept with probability `density` and divided by it."""
    draws = torch.stack([torch.rand(v.shape, generator=g, dtype=v.dtype) for v, g in zip(values, streams, strict=True)])
    return torch.where(draws < density, values / density, 0.0)


def elected(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean over those that agree with the weighted majority sign of their entry."""
    votes = values * weights[:, None, None]
    total = votes.sum(0)
    sign = torch.where(total.abs() > CANCELLED * votes.abs().sum(0), total.sign(), 0.0)
    agree = (votes.sign() == sign) & (sign != 0)
    shares = (agree * weights.abs()[:, None, None]).sum(0)
    return torch.where(shares > 0, (votes * agree).sum(0) / shares.clamp_min(torch.finfo(votes.dtype).tiny), 0.0)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights[:, None, None]).sum(0)


INNER["ties"] = lambda values, weights, density, streams: elected(trimmed(values, density), weights)
INNER["magnitude"] = lambda values, weights, density, streams: weighted_sum(trimmed(values, density), weights)
INNER["dare"] = lambda values, weights, density, streams: weighted_sum(dropped(values, density, streams), weights)
INNER["dare_ties"] = lambda values, weights, density, streams: elected(dropped(values, density, streams), weights)


def entrywise(updates: Updates, inner: str, density: float, space: Space) -> Product:
    """Apply an element-wise rule in a space and come back."""
    act = INNER[inner]
    coordinates = SPACES[space](updates)
    weights = torch.tensor(updates.weights, dtype=coordinates.values.dtype)
    return coordinates.back(act(coordinates.values, weights, density, updates.generators()))


@rule("ties")
def ties(updates: Updates, *, density: Density = 0.2, space: Space = "core") -> Product:
    """Trim, elect a sign per entry, average those that agree."""
    return entrywise(updates, "ties", density, space)


@rule("dare")
def dare(updates: Updates, *, density: Density = 0.5, space: Space = "core") -> Product:
    """Drop entries at random, rescale the rest, weighted sum: the mean over seeds is the linear sum."""
    return entrywise(updates, "dare", density, space)


@rule("dare_ties")
def dare_ties(updates: Updates, *, density: Density = 0.5, space: Space = "core") -> Product:
    """Drop entries at random, rescale the rest, then elect and average as TIES does."""
    return entrywise(updates, "dare_ties", density, space)


@rule("magnitude")
def magnitude(updates: Updates, *, density: Density = 0.2, space: Space = "core") -> Product:
    """Keep the largest entries of each update as they are, weighted sum."""
    return entrywise(updates, "magnitude", density, space)


@rule("core")
def core(updates: Updates, *, density: Density = 0.2, inner: str = "ties") -> Product:
    """An element-wise rule in the canonical core space."""
    return entrywise(updates, inner, density, "core")


@rule("knots")
def knots(updates: Updates, *, density: Density = 0.2, inner: str = "ties") -> Product:
    """An element-wise rule in the output-aligned space of KnOTS (arXiv 2410.19735)."""
    return entrywise(updates, inner, density, "knots")
