"""Whether autograd is listening. Decoding asks for nothing else, and an autograd.Function costs more than a small kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def recorded(*tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors has to be differentiable."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
