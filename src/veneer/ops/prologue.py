"""How the input of a product came about, so that the product can keep the source and make the input again.

Kept by the product: `source`. Made again in the backward pass: `value(source)`, element-wise work of a few passes over memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from veneer.ops.gated import gated_slope, gated_value
from veneer.ops.norm import rms_norm_slope, rms_norm_value


@runtime_checkable
class Prologue(Protocol):
    """`keeps`: whether the gradient of the source needs the source."""

    @property
    def keeps(self) -> bool: ...

    def value(self, source: Tensor) -> Tensor:
        """The input of the product."""

    def slope(self, source: Tensor | None, dx: Tensor) -> Tensor:
        """The gradient of the source; may reuse dx. `source` may be None unless `keeps`."""


@dataclass(frozen=True)
class Identity:
    """The input is the source."""

    keeps = False

    def value(self, source: Tensor) -> Tensor:
        return source

    def slope(self, source: Tensor | None, dx: Tensor) -> Tensor:
        return dx


@dataclass(frozen=True)
class Gated:
    """act(gate) * up, from `gate_up`."""

    activation: str
    keeps = True

    def value(self, source: Tensor) -> Tensor:
        return gated_value(source, self.activation)

    def slope(self, source: Tensor | None, dx: Tensor) -> Tensor:
        assert source is not None
        return gated_slope(source, dx, self.activation)


@dataclass(frozen=True, eq=False)
class Normed:
    """RMSNorm of the residual stream, its weight frozen."""

    weight: Tensor
    eps: float
    offset: float
    keeps = True

    def value(self, source: Tensor) -> Tensor:
        return rms_norm_value(source, self.weight, self.eps, self.offset)[0]

    def slope(self, source: Tensor | None, dx: Tensor) -> Tensor:
        assert source is not None
        _, inverse = rms_norm_value(source, self.weight, self.eps, self.offset)
        return rms_norm_slope(source, self.weight, inverse, dx, self.offset, weight_gradient=False)[0]
