"""LoRA-One: start one scaled step of full gradient descent away from the base; arXiv 2502.01235.

    -G = U S V^T        B0 = U_r sqrt(S_r / S_1) / sqrt(gamma)        A0 = sqrt(S_r / S_1) V_r^T / sqrt(gamma)        gamma = 128

so that scale B0 A0 = (scale / gamma) (-G)_r / S_1. Use it with scaling alpha/sqrt(r).

The surprise: it is the one start that changes the function. The base isn't shifted against it, since the step is meant: the loss
falls with it while scale / gamma is small.
"""

from __future__ import annotations

import torch

from veneer.base.host import Host
from veneer.errors import ConfigError
from veneer.inits._abstract import InitStats, init, need
from veneer.types import Factors

GAMMA = 128.0
"""The larger, the smaller the step."""


@init("lora_one", needs=("gradient",), paper="2502.01235")
def lora_one(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """One step against the first gradient, its best rank-r part."""
    gradient = need(stats.gradient if stats else None, "the first gradient", "lora_one").float()
    u, s, vh = torch.linalg.svd(-gradient, full_matrices=False)
    if not float(s[0]) > 0:
        raise ConfigError(
            f"init: lora_one found no gradient at a layer of {list(gradient.shape)}: nothing of it reaches the loss",
            help="leave the layer out with method.exclude, or use init: default",
        )
    root = (s[:rank] / s[0] / GAMMA).sqrt()
    return Factors(root[:, None] * vh[:rank], u[:, :rank] * root)
