"""Whether every number of a large tensor is finite, asked on one thread.

The surprise: torch would sum on all cores, and the threads that it woke look for work for some 4 ms more. That is longer than the
sum took, and on cores that something else is using: a hash beside it, a step beside a load.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 18
"""Numbers that are looked at together: they stay in a core's cache."""
EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""The bits that are all set in infinities and NaNs, and in nothing else."""


def is_finite(flat: Tensor) -> bool:
    """Whether no value of a floating tensor `[n]` is infinite or NaN."""
    if flat.device.type != "cpu" or flat.dtype not in (*EXPONENT, torch.float32, torch.float64):
        return bool(flat.float().isfinite().all())
    mask = EXPONENT.get(flat.dtype)
    if mask is not None:
        blocks = np.array_split(flat.view(torch.int16).numpy(), 1 + flat.numel() // BLOCK)
        return not any(bool(((block & mask) == mask).any()) for block in blocks)
    with np.errstate(all="ignore"):
        total = np.add.reduce(flat.numpy())  # finite only if every term is; it may overflow without one that isn't
    return bool(np.isfinite(total)) or bool(np.isfinite(flat.numpy()).all())
