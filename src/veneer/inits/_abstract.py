"""What an init is, and what it may know of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from veneer.base.host import Host
from veneer.errors import ConfigError
from veneer.registry import Registry
from veneer.types import HELD_FACTORS, Factors


@dataclass(frozen=True, eq=False)
class InitStats:
    """What calibration saw at one target. An init says by `needs(name)` which of these it reads; the others may be None.

    weight      the weight before it was quantised, `[out, in]`
    gradient    gradient of the loss, mean over batches, `[out, in]`
    components  right singular vectors of the centred inputs, strongest first, `[k, in]`
    energies    the singular values that belong to them, `[k]`
    total       sum of all squared singular values, of which `energies` are the first
    covariance  mean of x x^T over the inputs x, not centred, `[in, in]`
    key, value  what a text leaves in the cache, each `[layers, tokens, kv_heads, head_dim]` (at the place "")
    """

    weight: Tensor | None = None
    gradient: Tensor | None = None
    components: Tensor | None = None
    energies: Tensor | None = None
    total: float = 0.0
    covariance: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None


class Init(Protocol):
    """A start for B @ A. `stats` is None for inits that need no data."""

    def __call__(
        self, host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator
    ) -> Factors: ...


INITS: Registry[Init] = Registry("init")
_NEEDS: dict[str, frozenset[str]] = {}
_PAPERS: dict[str, str] = {}


GENERAL = "general"
"""Among `needs`: what is gathered comes from general text (`data.general`), not from the rows that are trained on."""


def init(
    name: str, *, needs: tuple[str, ...] = (), holds: tuple[str, ...] = (), paper: str = ""
) -> Callable[[Init], Init]:
    """File an init under `name`, with the fields of `InitStats` that it reads and the factors that training leaves alone."""
    _NEEDS[name] = frozenset(needs)
    _PAPERS[name] = paper
    if holds:
        HELD_FACTORS[name] = frozenset(holds)
    return INITS.register(name)


def paper(name: str) -> str:
    """The arXiv number behind an init, or ""."""
    return _PAPERS.get(name, "")


def needs(name: str) -> frozenset[str]:
    """What has to be gathered from data before this init can start: fields of `InitStats`."""
    return _NEEDS.get(name, frozenset())


def need(value: Tensor | None, what: str, name: str) -> Tensor:
    """`value`, or a refusal that says what was not gathered."""
    if value is None:
        raise ConfigError(
            f"init: {name} needs {what}, and none was gathered", help="train with data, or use init: default"
        )
    return value
