"""What a quantised base format is, and what its storage can do.

A format is one file in this folder: it files itself under the name that users write as `quantize: NAME`. Loading, training, the
planner, the cache of converted bases and the law suite follow from the declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from veneer.registry import Registry


@runtime_checkable
class Storage(Protocol):
    """A quantised weight `[out, in]`."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a file has to keep, by field: uint8, int8, bf16 or fp32."""

    def dequantise(self, out: Tensor) -> Tensor:
        """Write the dense weight into `out`, contiguous `[out, in]` of any float dtype, and return it."""

    def few_rows(self, x: Tensor) -> Tensor | None:
        """x W^T without the dense weight, or None where a dense copy is made first."""


@dataclass(frozen=True)
class Format:
    """One way to hold a base's projections. Calling it quantises a dense weight `[out, in]`.

    quantise  dense weight -> storage
    restore   the tensors of a storage, and its shape -> the storage
    nbytes    (rows, columns) -> bytes, before there is a tensor
    summary   one line for the reference page
    paper     arXiv number
    """

    quantise: Callable[[Tensor], Storage]
    restore: Callable[[Mapping[str, Tensor], tuple[int, int]], Storage]
    nbytes: Callable[[int, int], int]
    summary: str
    paper: str = ""

    def __call__(self, weight: Tensor) -> Storage:
        return self.quantise(weight)


QUANTISATIONS: Registry[Format] = Registry("quantisation")
