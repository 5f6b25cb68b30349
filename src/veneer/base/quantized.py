"""Quantised base layers: a `Host` for each checkpoint tensor, and the `Frozen` product of a projection group.

y = x deq(W)^T, dx = dy deq(W). The dense weight is made in a scratch that all layers share, used for one product and gone: it is
never kept for the backward pass, which makes it again. QLoRA (arXiv 2305.14314) is such a host with LoRA on it, and has no code.

The surprise: a group (q|k|v) keeps one storage for each of its parts. NF4 blocks and double quantisation run over a whole tensor,
so three tensors quantised together would be other numbers than those in the files everyone else writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.base.formats import Storage, load_all
from veneer.base.host import Host
from veneer.ops.frozen import product
from veneer.ops.int8 import Int8Rows
from veneer.ops.native.few import Rows
from veneer.ops.scratch import Scratch
from veneer.ops.twelve_bit import TwelveBit
from veneer.types import HostKind, HostShape


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
        pieces: list[Tensor] = []
        for part in self.parts:
            piece = part.few_rows(x)
            if piece is None:
                break
            pieces.append(piece)
        else:
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        with self.scratch.borrow((self.out_features, self.in_features), self.dtype) as dense:
            return product(x, self._fill(dense).t())

    def stored_rows(self) -> tuple[Rows, ...] | None:
        """The parts under each other; None where some part is not read where it lies."""
        found = [part.rows for part in self.parts if isinstance(part, (Int8Rows, TwelveBit))]
        return tuple(found) if len(found) == len(self.parts) else None

    def apply_transposed(self, dy: Float[Tensor, "n out"]) -> Float[Tensor, "n inp"]:
        with self.scratch.borrow((self.out_features, self.in_features), self.dtype) as dense:
            return product(dy, self._fill(dense))


def quantize_parts(weights: Sequence[Float[Tensor, "_ inp"]], name: str) -> tuple[Storage, ...]:
    """Each weight `[out, in]` by itself, in the format called `name` (a file of `base/formats/`)."""
    format = load_all()[name]
    return tuple(format(weight) for weight in weights)
