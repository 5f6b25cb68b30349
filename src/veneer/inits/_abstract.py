"""What an init is, and what it may know of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from veneer.base.host import Host
from veneer.registry import Registry
from veneer.types import Factors


@dataclass(frozen=True, eq=False)
class InitStats:
    """What calibration saw at one target. Fields that an init does not ask for (`Init.needs`) may be None.

    covariance  mean of x x^T over tokens, `[in, in]`
    gradient    gradient of the loss, mean over batches, `[out, in]`
    components  right singular vectors of the inputs, strongest first, `[k, in]`
    energies    their singular values, `[k]`
    tokens      how many tokens were seen
    """

    covariance: Tensor | None = None
    gradient: Tensor | None = None
    components: Tensor | None = None
    energies: Tensor | None = None
    tokens: int = 0


class Init(Protocol):
    """A start for B @ A. `stats` is None for inits that need no data."""

    def __call__(
        self, host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator
    ) -> Factors: ...


INITS: Registry[Init] = Registry("init")
