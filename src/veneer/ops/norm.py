"""RMSNorm and LayerNorm over the last dimension, in fp32 inside whatever the input's dtype is (fp64 stays fp64).

RMSNorm (arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * (offset + weight). Gemma stores weight - 1, so its offset is 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


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
    """RMSNorm; `weight` may require a gradient."""
    return rms_norm_reference(x, weight, eps, offset=offset)


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
