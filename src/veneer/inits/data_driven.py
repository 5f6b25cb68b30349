"""Starts that look at data: at the layer's inputs (EVA) or at the first gradient (LoRA-GA).

eva      A0 = the strongest directions of the inputs, orthonormal, B0 = 0 (arXiv 2410.07170). No shift of the base.
lora_ga  the gradient G = U S V^T: A0 = c V_{1..r}^T, B0 = c U_{r+1..2r}, c = out^(1/4) / sqrt(gamma) (arXiv 2407.05000). Shifts
         the base. Use it with scaling alpha/sqrt(r).

The surprise of LoRA-GA: both factors carry c and no singular value enters, so that the first step of gradient descent moves the
weight along the best rank-2r approximation of the gradient. PEFT's version scales otherwise, and that property is lost there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from veneer.base.host import Host
from veneer.errors import ConfigError
from veneer.inits._abstract import InitStats, init, need
from veneer.types import Factors

GAMMA = 16.0
"""LoRA-GA's stability constant: the larger, the smaller the start."""


@init("eva", needs=("components",), paper="2410.07170")
def eva(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """The strongest directions of what the layer sees."""
    components = need(stats.components if stats else None, "the inputs' directions", "eva")
    if components.shape[0] < rank:
        raise ConfigError(f"eva has {components.shape[0]} directions for rank {rank}", help="calibrate on more tokens")
    return Factors(components[:rank].float().clone(), torch.zeros(host.shape.out_features, rank))


@init("lora_ga", needs=("gradient",), paper="2407.05000")
def lora_ga(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """Directions of the first gradient, one half on each side."""
    gradient = need(stats.gradient if stats else None, "the first gradient", "lora_ga").float()
    if 2 * rank > min(gradient.shape):
        raise ConfigError(f"lora_ga takes twice the rank, {2 * rank}, from a gradient of {list(gradient.shape)}")
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    size = gradient.shape[0] ** 0.25 / math.sqrt(GAMMA)
    a, b = size * vh[:rank], size * u[:, rank : 2 * rank]
    excess = float((scale * b @ a).abs().max() / host.weight().abs().max().float().clamp_min(1e-38))
    if excess > 1:
        a, b = a / math.sqrt(excess), b / math.sqrt(excess)
    return Factors(a, b, shifted=True)


def spread_ranks(stats: Mapping[str, InitStats], rank: int, rho: float = 2.0) -> dict[str, int]:
    """EVA's budget: `rank` per target on average, given to the directions that explain most of their layer's inputs.

    A layer gets at most rho * rank, and may get none, which removes its adapter. With rho = 1 all get `rank`.
    """
    most = max(rank, round(rho * rank))
    shares: list[tuple[float, str]] = []
    for target, seen in stats.items():
        energies = need(seen.energies, "the inputs' directions", "eva")[:most].double()
        shares += [(float(e) ** 2 / max(seen.total, 1e-38), target) for e in energies]
    shares.sort(key=lambda share: -share[0])
    ranks = dict.fromkeys(stats, 0)
    for _, target in shares[: rank * len(stats)]:
        ranks[target] += 1
    return ranks
