"""Cross-entropy straight from hidden states, for a frozen head: no `[n, vocabulary]` tensor outlives a chunk.

sum_i w_i * -log softmax(cap(h_i W^T + b))[label_i], with cap(z) = c tanh(z / c) where a softcap is given (Gemma 2).
The gradient of the hidden states is formed in the forward pass, chunk by chunk, while the logits are at hand: that costs 4dV
a token where computing them again would cost 6dV (the idea is Liger's; the chunks here are large, as small ones starve a CPU).
Callers pass labelled rows only.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1024
"""Rows whose logits exist at one time."""


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden, weight, bias).to(wide)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_nll_reference(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, " n"],
    *,
    softcap: float | None = None,
    bias: Float[Tensor, " v"] | None = None,
) -> Float[Tensor, " n"]:
    """The definition: the negative log-probability of each label."""
    logits = _logits(hidden, weight, bias, softcap)
    return torch.logsumexp(logits, dim=-1) - logits.gather(1, labels[:, None]).squeeze(1)


def linear_cross_entropy_reference(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"] | None,
    *,
    softcap: float | None = None,
    bias: Float[Tensor, " v"] | None = None,
) -> Float[Tensor, ""]:
    """The definition of `linear_cross_entropy`."""
    nll = token_nll_reference(hidden, weight, labels, softcap=softcap, bias=bias)
    return (nll if weights is None else nll * weights).sum()


def linear_cross_entropy(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"] | None = None,
    *,
    softcap: float | None = None,
    bias: Float[Tensor, " v"] | None = None,
    chunk: int = CHUNK,
) -> Float[Tensor, ""]:
    """The weighted sum of the labels' negative log-probabilities, fp32. Only `hidden` gets a gradient: the head is frozen."""
    return _LinearCrossEntropy.apply(hidden, weight, labels, weights, softcap, bias, chunk)  # type: ignore[no-any-return, no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves d loss / d hidden, nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        softcap: float | None,
        bias: Tensor | None,
        chunk: int,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, bias, softcap)
            rows = labels[part, None]
            label_logits = logits.gather(1, rows).squeeze(1)
            lse = torch.logsumexp(logits, dim=-1)
            factor = torch.ones_like(lse) if weights is None else weights[part].to(wide)
            total += ((lse - label_logits) * factor).sum()
            if gradient is None:
                continue
            slope = None if softcap is None else 1 - (logits / softcap).square_()
            d_logits = logits.sub_(lse[:, None]).exp_()
            d_logits.scatter_add_(1, rows, torch.full_like(label_logits, -1)[:, None])
            d_logits.mul_(factor[:, None])
            if slope is not None:
                d_logits.mul_(slope)
            torch.mm(d_logits.to(hidden.dtype), weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * d_total.to(gradient.dtype), *(None,) * 6)


@torch.no_grad()
def token_nll(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, " n"],
    *,
    softcap: float | None = None,
    bias: Float[Tensor, " v"] | None = None,
    chunk: int = CHUNK,
) -> Float[Tensor, " n"]:
    """The negative log-probability of each label, fp32, without a gradient."""
    parts = [slice(start, start + chunk) for start in range(0, len(hidden), chunk)]
    found = [token_nll_reference(hidden[p], weight, labels[p], softcap=softcap, bias=bias) for p in parts]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)
