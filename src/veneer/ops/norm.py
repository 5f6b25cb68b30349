"""RMSNorm and LayerNorm over the last dimension, in fp32 inside whatever the input's dtype is (fp64 stays fp64).

RMSNorm (arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * (offset + weight). Gemma stores weight - 1, so its offset is 1.
Kept for the backward pass: x, and one number a row.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from veneer.ops.native import rows
from veneer.ops.recording import recorded, unrecorded


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm_reference(
    x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"], eps: float, *, offset: float = 0.0
) -> Float[Tensor, "*rows d"]:
    """The definition of `rms_norm`."""
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (_wide(weight) + offset)).to(x.dtype)


def rms_norm(
    x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"], eps: float, *, offset: float = 0.0
) -> Float[Tensor, "*rows d"]:
    """RMSNorm; `weight` may require a gradient. Keeps x and 1 / rms."""
    if not recorded(x, weight):
        return rms_norm_value(x, weight, eps, offset)[0]
    return _RMSNorm.apply(x, weight, eps, offset)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y, inverse = rms_norm_value(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        dx, dw = rms_norm_slope(x, weight, inverse, dy, ctx.offset, weight_gradient=ctx.needs_input_grad[1])
        return dx, dw, None, None


@unrecorded
def rms_norm_value(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """y, and 1 / rms of each row `[*rows, 1]`."""
    found = rows.rms_forward(x, weight, eps, offset)
    if found is not None:
        return found
    wide = _wide(x)
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse).mul_(_wide(weight) + offset).to(x.dtype), inverse


@torch.no_grad()
def rms_norm_slope(
    x: Tensor, weight: Tensor, inverse: Tensor, dy: Tensor, offset: float, *, weight_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """dx = (g - n mean(g n)) / rms with n = x / rms and g = dy (offset + weight); dw = sum of dy n over rows."""
    found = None if weight_gradient else rows.rms_backward(x, weight, inverse, dy, offset)
    if found is not None:
        return found, None
    normed = _wide(x) * inverse
    wide = _wide(dy)
    dw = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype) if weight_gradient else None
    g = wide * (_wide(weight) + offset)
    dot = (g * normed).mean(-1, keepdim=True)
    return g.sub_(normed.mul_(dot)).mul_(inverse).to(x.dtype), dw


def layer_norm_reference(
    x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"], bias: Float[Tensor, " d"] | None, eps: float
) -> Float[Tensor, "*rows d"]:
    """The definition of `layer_norm`."""
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * _wide(weight)
    return (normed if bias is None else normed + _wide(bias)).to(x.dtype)


def layer_norm(
    x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"], bias: Float[Tensor, " d"] | None, eps: float
) -> Float[Tensor, "*rows d"]:
    """LayerNorm: torch's own kernel, which is fp32 inside and keeps x, the mean and the inverse deviation."""
    return F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
