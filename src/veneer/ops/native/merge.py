"""The C form of merging a low-rank update into a bf16 matrix. None where the plain form has to do it."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.native.build import library


def low_rank(stored: Tensor, left: Tensor, right: Tensor, value: Tensor) -> tuple[float, float] | None:
    """value = round(stored + left right), rounded to the nearest; the squares that rounding lost, and those of `stored`.

    stored, value  bf16 `[n, k]`; left `[n, rank]` and right `[rank, k]` fp32
    """
    kinds = stored.dtype == value.dtype == torch.bfloat16 and left.dtype == right.dtype == torch.float32
    if not kinds or stored.dim() != 2 or stored.device.type != "cpu" or stored.shape[1] % 16 or stored.stride(1) != 1:
        return None
    kernels = library()
    if kernels is None or not value.is_contiguous():
        return None
    left, right = left.contiguous(), right.contiguous()
    sums = torch.zeros(2, len(stored), dtype=torch.float64)
    kernels.merge_low_rank(
        stored.data_ptr(), stored.stride(0), left.data_ptr(), right.data_ptr(), *stored.shape, left.shape[1],
        value.data_ptr(), sums[0].data_ptr(), sums[1].data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    lost, weight = sums.sum(dim=1).tolist()
    return lost, weight
