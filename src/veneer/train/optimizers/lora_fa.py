"""LoRA-FA: A stays as it started and B's gradient is projected; arXiv 2308.03303.

    g_B <- s^-2 g_B (A A^T + 1e-8 I)^-1

so that a plain step moves the weight by the full gradient projected on A's rows. A has no gradient, no moments, and no share in
the clipped norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from veneer.errors import ConfigError
from veneer.plan.bytes import MOMENTS
from veneer.plan.counts import Counted
from veneer.train.config import TrainConfig
from veneer.train.optim import FlatParameters, inverse, optimizer

DAMPING = 1e-8


def _moments_without_a(trained: Sequence[Counted]) -> int:
    return MOMENTS * sum(tensor.numbers for tensor in trained if tensor.name != "A")


@optimizer("lora_fa", state=_moments_without_a, freezes=("A",), paper="2308.03303")
def lora_fa(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """AdamW on the projected gradient of B; A never moves."""
    if not any(pair.trains_b for pair in parameters.pairs()):
        raise ConfigError(
            "lora_fa needs a method with factors A and B, and trains B alone",
            help="use optimizer: adamw, or another init",
        )
    return _LoRAFA(parameters, config)


class _LoRAFA(torch.optim.AdamW):
    def __init__(self, parameters: FlatParameters, config: TrainConfig) -> None:
        groups = [{"params": [b], "ratio": 1.0} for b in parameters.buffers.values()]
        super().__init__(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self._parameters = parameters

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for pair in self._parameters.pairs():
            if pair.grad_b is not None:
                pair.grad_b.copy_(pair.grad_b @ inverse(pair.a @ pair.a.t(), DAMPING) / pair.scale**2)
        super().step(closure)
        return None
