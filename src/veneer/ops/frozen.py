"""A product with a weight that never changes, and the dense kind.

The surprise: which library multiplies decides half of the time. In fp32 torch asks MKL, which takes a narrower path on CPUs of
other makers: 2.1x slower where we measured it (AMD, AVX-512), so fp32 goes through oneDNN by hand. In bf16 torch uses oneDNN by
itself, which copies the weight into a layout of its own at each call: nothing for many rows, half of the time for the few rows of
a decoding step and for the dozens of a step with a prompt in it, so those have kernels of their own (`native/few.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.native import few
from veneer.ops.native.shortlist import Sketch, sketch
from veneer.ops.recording import unrecorded


@runtime_checkable
class Frozen(Protocol):
    """A frozen product. Neither method records a gradient; both return new tensors."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def apply(self, x: Float[Tensor, "n inp"]) -> Float[Tensor, "n out"]:
        """x W^T."""

    def apply_transposed(self, dy: Float[Tensor, "n out"]) -> Float[Tensor, "n inp"]:
        """dy W."""


@runtime_checkable
class StoredRows(Protocol):
    """A frozen product whose weight is not dense, but may be one that products of few rows read where it lies."""

    def stored_rows(self) -> tuple[few.Rows, ...] | None:
        """Its parts `[out_i, in]` under each other; None where some part has to be made dense first."""


@dataclass(frozen=True, eq=False)
class DenseFrozen:
    """A 16- or 32-bit weight `[out, in]`, in any stride order."""

    weight: Tensor

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def apply(self, x: Float[Tensor, "n inp"]) -> Float[Tensor, "n out"]:
        return product(x, self.weight.t())

    def apply_transposed(self, dy: Float[Tensor, "n out"]) -> Float[Tensor, "n inp"]:
        return product(dy, self.weight)

    @unrecorded
    def scores(self, x: Float[Tensor, "n inp"]) -> Float[Tensor, "n out"]:
        """`apply` in fp32, for scores over a vocabulary: two tokens may differ by less than bf16 can say.

        With the kernels the sums are kept as they are; without them a 16-bit product is rounded first, as everywhere.
        """
        found = few.scores(x, self.weight)
        return self.apply(x).to(torch.promote_types(x.dtype, torch.float32)) if found is None else found

    @cached_property
    def sketch(self) -> Sketch | None:
        """Finds the largest of `scores` without reading the whole weight. Half of its bytes more, made when first asked for."""
        return sketch(self.weight)


@unrecorded
def product(x: Float[Tensor, "n k"], w: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """x w, by the library that is fastest at it. No gradient is recorded."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and len(x) >= 16 and _onednn():
        return torch.ops.mkldnn._linear_pointwise(x, w.t(), None, "none", [], "")  # type: ignore[no-any-return]
    found = few.product(x, w.t())
    return torch.mm(x, w) if found is None else found


@cache
def _onednn() -> bool:
    """Whether torch was built with oneDNN and its linear operator multiplies as it should here."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.arange(64, dtype=torch.float32).view(16, 4)
    found = torch.ops.mkldnn._linear_pointwise(x, x[:4], None, "none", [], "")
    return torch.equal(found, x @ x[:4].t())
