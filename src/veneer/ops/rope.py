"""Rotary positions (arXiv 2104.09864), in the rotate-half pairing of checkpoints: dimension i turns with i + dim/2.

y_i = x_i cos - x_j sin,  y_j = x_j cos + x_i sin,  j = i + dim/2. Dimensions from `dim` on are passed through (NeoX).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rotary_reference(
    x: Float[Tensor, "n heads d"], cos: Float[Tensor, "n half"], sin: Float[Tensor, "n half"]
) -> Float[Tensor, "n heads d"]:
    """The definition of `rotary`."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1)


def rotary(
    x: Float[Tensor, "n heads d"], cos: Float[Tensor, "n half"], sin: Float[Tensor, "n half"]
) -> Float[Tensor, "n heads d"]:
    """Turn every head of row n by its angles. cos and sin are tables: they get no gradient."""
    return rotary_reference(x, cos, sin)
