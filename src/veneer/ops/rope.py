"""Rotary positions (arXiv 2104.09864), in the rotate-half pairing of checkpoints: dimension i turns with i + dim/2.

y_i = x_i cos - x_j sin,  y_j = x_j cos + x_i sin,  j = i + dim/2. Dimensions from `dim` on are passed through (NeoX).
Nothing but the tables is kept: the gradient is turned back by the same angles.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.native import rows
from veneer.ops.recording import recorded, unrecorded


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
    if not recorded(x):
        return turned(x, cos, sin, back=False)
    return _Rotary.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turned(dy, cos, sin, back=True), None, None


@unrecorded
def turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """`rotary` by the angles, or back by them, without a gradient: a new, contiguous tensor."""
    found = rows.rotary(x, cos, sin, back=back)
    if found is not None:
        return found
    sin = -sin if back else sin
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    cos, sin = cos[:, None], sin[:, None]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    y[..., half : 2 * half] = (second * cos).addcmul_(first, sin)
    if 2 * half < x.shape[-1]:
        y[..., 2 * half :] = x[..., 2 * half :]
    return y
