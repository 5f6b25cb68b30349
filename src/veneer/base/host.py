"""The one seam between methods and base layers.

A `Host` is a view of a frozen layer: its shape, its dense weight, and products with it. Weight methods see hosts only, so a
method works on linear layers, GPT-2's Conv1D, embeddings and quantised weights without a line for any of them.

The surprise: every host speaks `[out, in]`, whatever the storage. For an embedding that is `[hidden, vocabulary]`, and `apply`
takes token ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.types import HostKind, HostShape


class Host(ABC):
    """A frozen layer, seen as y = x W^T + b."""

    shape: HostShape
    bias: Tensor | None

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype that products are computed in."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def weight(self) -> Tensor:
        """The dense weight `[out, in]` in `dtype`; a view where the storage allows. Never write to it."""

    def apply(self, x: Tensor) -> Tensor:
        """x W^T + b for x `[..., in]`; for an embedding, rows for ids `[...]`."""
        if self.shape.kind == "embedding":
            return F.embedding(x, self.weight().t())
        return F.linear(x, self.weight(), self.bias)

    def apply_transposed(self, dy: Tensor) -> Tensor:
        """dy W, the gradient of the input, for dy `[..., out]`."""
        return dy @ self.weight()


class DenseHost(Host):
    """A host over a 16- or 32-bit tensor as the checkpoint stores it: `[out, in]`, or `[in, out]` for conv1d and embedding."""

    def __init__(self, stored: Tensor, bias: Tensor | None = None, *, kind: HostKind = "linear") -> None:
        rows, columns = stored.shape
        self._stored = stored
        self._transposed = kind in ("conv1d", "embedding")
        self.bias = bias
        out_features, in_features = (columns, rows) if self._transposed else (rows, columns)
        self.shape = HostShape(kind, in_features, out_features, bias is not None)

    @property
    def dtype(self) -> torch.dtype:
        return self._stored.dtype

    @property
    def device(self) -> torch.device:
        return self._stored.device

    def weight(self) -> Tensor:
        return self._stored.t() if self._transposed else self._stored
