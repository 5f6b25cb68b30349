"""Quantised base layers: a `Host` for each checkpoint tensor, and the `Frozen` product of a projection group.

y = x deq(W)^T, dx = dy deq(W). The dense weight is made in a scratch that all layers share, used for one product and gone: it is
never kept for the backward pass, which makes it again. QLoRA (arXiv 2305.14314) is such a host with LoRA on it, and has no code.

The surprise: a group (q|k|v) keeps one storage for each of its parts. NF4 blocks and double quantisation run over a whole tensor,
so three tensors quantised together would be other numbers than those in the files everyone else writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.base.host import Host
from veneer.ops import int8, nf4
from veneer.ops.frozen import product
from veneer.ops.scratch import Scratch
from veneer.registry import Registry
from veneer.types import HostKind, HostShape


@runtime_checkable
class Storage(Protocol):
    """A quantised weight `[out, in]`."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...

    def dequantise(self, out: Tensor) -> Tensor:
        """Write the dense weight into `out`, contiguous `[out, in]` of any float dtype, and return it."""


Quantise: TypeAlias = Callable[[Tensor], Storage]

QUANTISATIONS: Registry[Quantise] = Registry("quantisation")
"""Name -> dense weight `[out, in]` to storage."""
QUANTISATIONS["nf4"] = nf4.quantise
QUANTISATIONS["nf4-dq"] = partial(nf4.quantise, double=True)
QUANTISATIONS["int8"] = int8.quantise


class QuantizedHost(Host):
    """A host over quantised storage; `dtype` is what products are computed in."""

    def __init__(
        self, storage: Storage, dtype: torch.dtype, bias: Tensor | None = None, *, kind: HostKind = "linear"
    ) -> None:
        out_features, in_features = storage.shape
        self.storage = storage
        self._dtype = dtype
        self.bias = bias
        self.shape = HostShape(kind, in_features, out_features, bias is not None)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def weight(self) -> Tensor:
        """A new dense tensor: whoever asks owns it."""
        return self.storage.dequantise(torch.empty(self.storage.shape, dtype=self._dtype))


@dataclass(frozen=True, eq=False)
class QuantizedFrozen:
    """The frozen product of a group: parts in output order, one scratch shared with all other groups."""

    parts: tuple[Storage, ...]
    dtype: torch.dtype
    scratch: Scratch

    @property
    def in_features(self) -> int:
        return self.parts[0].shape[1]

    @property
    def out_features(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def _fill(self, dense: Tensor) -> Tensor:
        start = 0
        for part in self.parts:
            stop = start + part.shape[0]
            part.dequantise(dense[start:stop])
            start = stop
        return dense

    def apply(self, x: Float[Tensor, "n inp"]) -> Float[Tensor, "n out"]:
        pieces = [int8.few_rows(x, part) for part in self.parts if isinstance(part, int8.Int8Rows)]
        whole = [piece for piece in pieces if piece is not None]
        if len(whole) == len(self.parts):
            return whole[0] if len(whole) == 1 else torch.cat(whole, dim=1)
        with self.scratch.borrow((self.out_features, self.in_features), self.dtype) as dense:
            return product(x, self._fill(dense).t())

    def apply_transposed(self, dy: Float[Tensor, "n out"]) -> Float[Tensor, "n inp"]:
        with self.scratch.borrow((self.out_features, self.in_features), self.dtype) as dense:
            return product(dy, self._fill(dense))


def quantize_parts(weights: Sequence[Float[Tensor, "_ inp"]], name: str) -> tuple[Storage, ...]:
    """Each weight `[out, in]` by itself. `name` is a key of `QUANTISATIONS`."""
    quantise = QUANTISATIONS[name]
    return tuple(quantise(weight) for weight in weights)
