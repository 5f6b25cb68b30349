"""The one seam between methods and base layers.

A `Host` is a view of a frozen layer: its shape, its dense weight, and products with it. Weight methods see hosts only, so a
method works on linear layers, GPT-2's Conv1D, embeddings and quantised weights without a line for any of them.

The surprise: every host speaks `[out, in]`, whatever the storage. For an embedding that is `[hidden, vocabulary]`, and `apply`
takes token ids; for a convolution it is `[channels out, channels in x cells of the kernel]`, and `apply` takes images.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
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
        return self.product(x, self.weight(), self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the layer would give with another weight `[m, in]` and bias `[m]` in its place."""
        if self.shape.kind == "embedding":
            return F.embedding(x, weight.t())
        return F.linear(x, weight, bias)

    def mix(self, y: Tensor, matrix: Tensor) -> Tensor:
        """`matrix` `[m, n]` on the n features of an output y: y M^T where they are the last axis."""
        return y @ matrix.t()

    def feature(self, vector: Tensor) -> Tensor:
        """A vector `[out]` so that it adds to, or scales, the features of an output."""
        return vector

    def apply_transposed(self, dy: Tensor) -> Tensor:
        """dy W, the gradient of the input, for dy `[..., out]`."""
        return dy @ self.weight()


class StoredHost(Host):
    """A host over one tensor of the checkpoint."""

    _stored: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self._stored.dtype

    @property
    def device(self) -> torch.device:
        return self._stored.device


class DenseHost(StoredHost):
    """A host over a 16- or 32-bit tensor as the checkpoint stores it: `[out, in]`, or `[in, out]` for conv1d and embedding."""

    def __init__(self, stored: Tensor, bias: Tensor | None = None, *, kind: HostKind = "linear") -> None:
        rows, columns = stored.shape
        self._stored = stored
        self._transposed = kind in ("conv1d", "embedding")
        self.bias = bias
        out_features, in_features = (columns, rows) if self._transposed else (rows, columns)
        self.shape = HostShape(kind, in_features, out_features, bias is not None)

    def weight(self) -> Tensor:
        return self._stored.t() if self._transposed else self._stored


class ConvHost(StoredHost):
    """A host over a convolution of 1 to 3 dimensions, whatever its stride, padding, dilation and padding mode."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self._module = module
        self._stored = module.weight.detach()
        self.bias = None if module.bias is None else module.bias.detach()
        out, into, *kernel = self._stored.shape
        self.shape = HostShape(
            "conv", into * math.prod(kernel), out, self.bias is not None, kernel=tuple(kernel), groups=module.groups
        )

    def weight(self) -> Tensor:
        return self._stored.flatten(1)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        own = {"weight": weight.reshape(weight.shape[0], -1, *self.shape.kernel)}
        if self.bias is not None:
            own["bias"] = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(weight.dtype)
        y: Tensor = torch.func.functional_call(self._module, own, (x,))
        return y if self.bias is not None or bias is None else y + self.feature(bias)

    def mix(self, y: Tensor, matrix: Tensor) -> Tensor:
        channels = -1 - len(self.shape.kernel)
        return (y.movedim(channels, -1) @ matrix.t()).movedim(-1, channels)

    def feature(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *(1 for _ in self.shape.kernel))


class NormHost(StoredHost):
    """A norm as a host: it has tensors that can be replaced, and no product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._stored, self.bias = weight, bias
        self.shape = HostShape("norm", len(weight), len(weight), bias is not None)

    def weight(self) -> Tensor:
        """The norm's own vector `[width]`, as the checkpoint stores it."""
        return self._stored
