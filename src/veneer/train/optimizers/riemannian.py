"""Riemannian preconditioning of the factors' gradients, then AdamW or plain descent; arXiv 2402.02347.

    g_A <- (B^T B + d I)^-1 g_A        g_B <- g_B (A A^T + d I)^-1        d = 0.01

With d = 0 and plain descent the change of the weight is the same for (A, B) and (R A, B R^-1): the step no longer depends on how
the update happens to be split. Costs two r x r inverses a layer and step, and no memory.

The surprise: while B is zero, d alone divides A's gradient, which is zero as well; the first steps are those of B.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from veneer.errors import ConfigError
from veneer.train.config import TrainConfig
from veneer.train.optim import FlatParameters, groups_of, inverse, optimizer

DAMPING = 1e-2


@torch.no_grad()
def precondition(parameters: FlatParameters, damping: float) -> None:
    """Each gradient of a factor by the inverse metric of the other factor, in place."""
    for pair in parameters.pairs():
        if pair.grad_a is not None:
            pair.grad_a.copy_(inverse(pair.b.t() @ pair.b, damping) @ pair.grad_a)
        if pair.grad_b is not None:
            pair.grad_b.copy_(pair.grad_b @ inverse(pair.a @ pair.a.t(), damping))


def _require_pairs(parameters: FlatParameters, name: str) -> None:
    if not parameters.pairs():
        raise ConfigError(f"{name} needs a method with factors A and B", help="use optimizer: adamw")


@optimizer("riemannian", paper="2402.02347")
def riemannian(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """AdamW on gradients preconditioned by the other factor (scaled AdamW)."""
    _require_pairs(parameters, "riemannian")
    return _ScaledAdamW(parameters, config)


@optimizer("riemannian_sgd", state=lambda trained: 0, paper="2402.02347")
def riemannian_sgd(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """Plain descent on gradients preconditioned by the other factor (scaled GD)."""
    _require_pairs(parameters, "riemannian_sgd")
    return _ScaledSGD(parameters, config)


class _ScaledAdamW(torch.optim.AdamW):
    def __init__(self, parameters: FlatParameters, config: TrainConfig) -> None:
        super().__init__(groups_of(parameters, config), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self._parameters = parameters

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        precondition(self._parameters, DAMPING)
        super().step(closure)
        return None


class _ScaledSGD(torch.optim.SGD):
    def __init__(self, parameters: FlatParameters, config: TrainConfig) -> None:
        super().__init__(groups_of(parameters, config), lr=config.lr, weight_decay=config.weight_decay)
        self._parameters = parameters

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        precondition(self._parameters, DAMPING)
        super().step(closure)
        return None
