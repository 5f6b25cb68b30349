"""One sum, one rounding, and how much of the update survived it.

    merged = round(W + delta)          in fp32 (in fp64 where the checkpoint is fp32), a block of rows at a time
    lost   = ||merged - W - delta||_F / ||delta||_F

bf16 has eight significant bits: an update of 0.5 % of the weight's size loses a third of itself, one of 0.05 % nearly all.
Rounding at random in proportion (`stochastic`) loses nothing on average and adds noise instead. The surprise: the order matters
too. Rounding delta first and adding then, as is often done, rounds twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from veneer.errors import Unsupported
from veneer.ops.native import merge as native

BLOCK = 2**18
"""Elements of a block of rows: 1 MB of fp32, which stays in a core's cache through all the steps."""

MERGEABLE = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Rounded:
    """A merged tensor in its checkpoint's dtype, and the squared norms that its fidelity is made of."""

    value: Tensor
    lost_square: float
    delta_square: float
    weight_square: float


class Update(Protocol):
    """The exact update of a tensor, a few rows at a time, in the working dtype."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the update. The result may be overwritten."""

    def add(self, exact: Tensor, start: int, stop: int) -> float:
        """Add the rows to `exact`, and return the sum of their squares."""


@dataclass(frozen=True, eq=False)
class Dense(Update):
    """An update that is computed row by row: `between(start, stop)`."""

    between: Callable[[int, int], Tensor]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.between(start, stop)

    def add(self, exact: Tensor, start: int, stop: int) -> float:
        update = self.between(start, stop)
        exact += update
        return _square(update)


@dataclass(frozen=True, eq=False)
class LowRankRows(Update):
    """left @ right for left `[rows, rank]` and right `[rank, columns]`, added where it is made: no pass of its own.

    Its squares come from the small matrices: ||L R||^2 = <L^T L, R R^T>.
    """

    left: Tensor
    right: Tensor

    @cached_property
    def _gram(self) -> Tensor:
        right = self.right.double()
        return right @ right.t()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.left[start:stop] @ self.right

    def add(self, exact: Tensor, start: int, stop: int) -> float:
        exact.addmm_(self.left[start:stop], self.right)
        return self.square(start, stop)

    def square(self, start: int, stop: int) -> float:
        """The sum of the squares of these rows."""
        wide = self.left[start:stop].double()
        return float(((wide.t() @ wide) * self._gram).sum())


def working_dtype(stored: torch.dtype) -> torch.dtype:
    """What the sum is formed in: wider than what is stored, so that the one rounding is the only one."""
    return torch.float64 if stored == torch.float32 else torch.float32


def merged(stored: Tensor, update: Update, generator: torch.Generator | None = None) -> Rounded:
    """round(stored + update) for a matrix or vector; with a generator the rounding is stochastic."""
    work = working_dtype(stored.dtype)
    value = torch.empty_like(stored, memory_format=torch.contiguous_format)
    if isinstance(update, LowRankRows) and generator is None:
        squares = native.low_rank(stored, update.left, update.right, value)
        if squares is not None:
            return Rounded(value, squares[0], update.square(0, len(stored)), squares[1])
    lost = delta = weight = 0.0
    for start, stop in blocks(stored):
        exact = stored[start:stop].to(work)
        weight += _square(exact)
        delta += update.add(exact, start, stop)
        value[start:stop] = rounded(exact, stored.dtype, generator)
        lost += _square(exact.sub_(value[start:stop]))
    return Rounded(value, lost, delta, weight)


def blocks(tensor: Tensor) -> list[tuple[int, int]]:
    """Row ranges of about `BLOCK` elements. They are the same whenever the shape is, so products repeat bit for bit."""
    count = tensor.shape[0]
    step = max(1, BLOCK // max(1, tensor.numel() // max(1, count)))
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) ** 2


def rounded(exact: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """`exact` in `dtype`, to the nearest, or to one of the two neighbours with probabilities that keep the mean."""
    nearest = exact.to(dtype)
    if generator is None or dtype == exact.dtype:
        return nearest
    bits = {2: torch.int16, 4: torch.int32}[nearest.element_size()]
    magnitude = exact.abs()
    over = (nearest.abs().to(exact.dtype) > magnitude) & nearest.isfinite()
    # The bit patterns of floats of one sign are in order: one less is the next smaller magnitude.
    low = (nearest.view(bits) - over.to(bits)).view(dtype)
    high = (low.view(bits) + 1).view(dtype)
    small, large = low.abs().to(exact.dtype), high.abs().to(exact.dtype)
    draw = torch.rand(exact.shape, generator=generator, dtype=exact.dtype)
    up = draw * (large - small) < magnitude - small
    return torch.where(up & torch.isfinite(high), high, low)


def overflow(name: str, dtype: torch.dtype) -> Unsupported:
    """The refusal of a merged tensor that its dtype can't hold."""
    return Unsupported(
        f"'{name}' with the update in it has values that are no finite {str(dtype).removeprefix('torch.')}",
        help="merge into a bfloat16 or float32 checkpoint, or look at the adapter: `veneer doctor`",
    )


def share_lost(lost_square: float, delta_square: float) -> float:
    """||lost|| / ||delta||, 0 where there was nothing to lose."""
    return math.sqrt(lost_square / delta_square) if delta_square > 0 else 0.0
