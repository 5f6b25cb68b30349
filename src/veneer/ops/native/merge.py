"""The C forms of merging a low-rank update into a bf16 matrix. None where the plain form has to do it."""

from __future__ import annotations

import errno
import os

import torch
from torch import Tensor

from veneer.ops.native.build import library


def available(stored: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether there is a kernel for this matrix."""
    kinds = stored.dtype == torch.bfloat16 and left.dtype == right.dtype == torch.float32
    plain = stored.dim() == 2 and stored.device.type == "cpu" and stored.stride(1) == 1
    return kinds and plain and stored.shape[1] % 16 == 0 and library() is not None


def low_rank(stored: Tensor, left: Tensor, right: Tensor, value: Tensor) -> tuple[float, float] | None:
    """value = round(stored + left right), rounded to the nearest; the squares that rounding lost, and those of `stored`.

    stored, value  bf16 `[n, k]`; left `[n, rank]` and right `[rank, k]` fp32
    """
    if not available(stored, left, right) or value.dtype != stored.dtype or not value.is_contiguous():
        return None
    left, right = left.contiguous(), right.contiguous()
    sums = torch.zeros(2, len(stored), dtype=torch.float64)
    kernels = library()
    assert kernels is not None
    kernels.merge_low_rank(
        stored.data_ptr(), stored.stride(0), left.data_ptr(), right.data_ptr(), *stored.shape, left.shape[1],
        value.data_ptr(), sums[0].data_ptr(), sums[1].data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    lost, weight = sums.sum(dim=1).tolist()
    return lost, weight


def low_rank_file(source: int, begin: int, left: Tensor, right: Tensor, target: int, to: int) -> tuple[float, float]:
    """The same from file to file where it is `available`, through a buffer that stays in the cache.

    begin  where the matrix lies in the file `source`, row after row
    to     where in the file `target` the result goes
    """
    kernels = library()
    assert kernels is not None
    left, right = left.contiguous(), right.contiguous()
    sums = torch.zeros(2, len(left), dtype=torch.float64)
    problem = kernels.merge_low_rank_file(
        source, begin, target, to, left.data_ptr(), right.data_ptr(), len(left), right.shape[1], left.shape[1],
        sums[0].data_ptr(), sums[1].data_ptr(),
    )  # fmt: skip
    if problem == errno.ENODATA:
        raise EOFError("the file ends before the matrix does")
    if problem:
        raise OSError(problem, os.strerror(problem))
    lost, weight = sums.sum(dim=1).tolist()
    return lost, weight
