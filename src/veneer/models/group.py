"""Projections that share an input, as one frozen product with named row slices.

q, k and v read the same activations, as do gate and up: one wide product serves them all. Names, files and merges speak of the
parts; only the forward pass sees the group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.models.config import PartSpec
from veneer.ops.low_rank import DenseFrozen, Frozen


@dataclass(frozen=True, eq=False)
class Group:
    """One frozen product y = x W^T + b and which checkpoint module owns which rows of W.

    transposed  whether the checkpoint stores W^T (Conv1D), and so does what replaces it
    """

    name: str
    frozen: Frozen
    bias: Tensor | None
    parts: tuple[PartSpec, ...]
    transposed: bool = False

    @property
    def out_features(self) -> int:
        return self.parts[-1].stop

    def split(self) -> tuple[Group, ...]:
        """One group per part, for the rare forward in which a part needs an input of its own."""
        return tuple(self._single(part) for part in self.parts)

    def _single(self, part: PartSpec) -> Group:
        if len(self.parts) == 1:
            return self
        frozen: Frozen
        if isinstance(self.frozen, DenseFrozen):
            frozen = DenseFrozen(self.frozen.weight[part.start : part.stop])
        else:
            frozen = RowsOf(self.frozen, part.start, part.stop)
        bias = None if self.bias is None else self.bias[part.start : part.stop]
        alone = replace(part, start=0, stop=part.stop - part.start)
        return Group(f"{self.name}:{part.path}", frozen, bias, (alone,), self.transposed)


class RowsOf:
    """Rows `[start, stop)` of a product that can't be cut, such as a packed 4-bit one. Correct, not fast."""

    def __init__(self, whole: Frozen, start: int, stop: int) -> None:
        self._whole, self._start, self._stop = whole, start, stop
        self.in_features = whole.in_features
        self.out_features = stop - start
        self.dtype = whole.dtype

    def apply(self, x: Tensor) -> Tensor:
        return self._whole.apply(x)[:, self._start : self._stop].contiguous()

    def apply_transposed(self, dy: Tensor) -> Tensor:
        wide = torch.zeros(dy.shape[0], self._whole.out_features, dtype=dy.dtype, device=dy.device)
        wide[:, self._start : self._stop] = dy
        return self._whole.apply_transposed(wide)
