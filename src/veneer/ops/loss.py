"""Cross-entropy straight from hidden states, for a frozen head: no `[n, vocabulary]` tensor outlives a chunk.

sum_i w_i * -log softmax(cap(h_i W^T + b))[label_i], with cap(z) = c tanh(z / c) where a softcap is given (Gemma 2).
The gradient of the hidden states is formed in the forward pass, chunk by chunk, while the logits are at hand: that costs 4dV
a token where computing them again would cost 6dV (the idea is Liger's; the chunks here are large, as small ones starve a CPU).
Kept for the backward pass: d loss / d hidden. Callers pass labelled rows only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from veneer.ops.frozen import product
from veneer.ops.native import rows

CHUNK = 1024
"""Rows whose logits exist at one time, at most (half as many in fp32)."""
BYTES = 1 << 27
"""Bytes of logits that exist at one time, at most, unless that would be fewer than 64 rows."""


class Head(NamedTuple):
    """logits = cap(h W^T + b)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    def chunk(self, asked: int | None) -> int:
        return asked or chunk_rows(len(self.weight), self.weight.element_size())


def chunk_rows(vocab: int, itemsize: int) -> int:
    """Rows whose logits exist at one time, for a head of that vocabulary and bytes a weight.

    >>> chunk_rows(49_152, 2), chunk_rows(49_152, 4), chunk_rows(262_144, 2)
    (1024, 512, 256)
    """
    return min(2 * CHUNK // itemsize, max(64, BYTES // (itemsize * vocab)))


def _logits(hidden: Tensor, head: Head) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden, head.weight, head.bias).to(wide)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def token_nll_reference(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, " n"],
    *,
    softcap: float | None = None,
    bias: Float[Tensor, " v"] | None = None,
) -> Float[Tensor, " n"]:
    """The definition: the negative log-probability of each label."""
    logits = _logits(hidden, Head(weight, bias, softcap))
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
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """The weighted sum of the labels' negative log-probabilities, fp32. Only `hidden` gets a gradient: the head is frozen."""
    head = Head(weight.detach(), bias, softcap)
    return _LinearCrossEntropy.apply(hidden, head, labels, weights, chunk)  # type: ignore[no-any-return, no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, labels: Tensor, weights: Tensor | None, chunk: int | None
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        factors = torch.ones(len(hidden), dtype=wide, device=hidden.device) if weights is None else weights.to(wide)
        gradient = (
            torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if ctx.needs_input_grad[0] else None
        )
        total = torch.zeros((), dtype=wide, device=hidden.device)
        size = head.chunk(chunk)
        for part in (slice(start, start + size) for start in range(0, len(hidden), size)):
            nll, d_logits = _nll(hidden[part], head, labels[part], None if gradient is None else factors[part])
            total += (nll * factors[part]).sum()
            if gradient is not None and d_logits is not None:
                gradient[part] = product(d_logits, head.weight)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # The 0-dim factor stays fp32: rounded to bf16 first, 1 / tokens would scale every gradient by up to 0.4 %.
        return gradient * d_total, None, None, None, None


@torch.no_grad()
def _nll(hidden: Tensor, head: Head, labels: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """-log p(label) of each row; and with factors, factor * d nll / d (h W^T + b), in the dtype of hidden."""
    logits = product(hidden, head.weight.t())
    if head.bias is not None:
        logits += head.bias
    if head.softcap is None:
        nll = rows.cross_entropy(logits, labels, factors)
        if nll is not None:
            return nll, None if factors is None else logits
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.softcap is not None:
        scores = head.softcap * torch.tanh(scores / head.softcap)
    bend = None if head.softcap is None or factors is None else 1 - (scores / head.softcap).square_()
    ours, top = scores.gather(1, labels[:, None]), scores.amax(dim=-1, keepdim=True)
    total = scores.sub_(top).exp_().sum(dim=-1, keepdim=True)
    nll = (total.log() + top - ours).squeeze(1)
    if factors is None:
        return nll, None
    slope = scores.mul_(factors[:, None] / total).scatter_add_(1, labels[:, None], -factors[:, None])
    return nll, (slope if bend is None else slope.mul_(bend)).to(hidden.dtype)


@torch.no_grad()
def token_nll(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, " n"],
    *,
    softcap: float | None = None,
    bias: Float[Tensor, " v"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, " n"]:
    """The negative log-probability of each label, fp32, without a gradient."""
    head = Head(weight, bias, softcap)
    size = head.chunk(chunk)
    parts = [slice(start, start + size) for start in range(0, len(hidden), size)]
    found = [_nll(hidden[part], head, labels[part], None)[0] for part in parts]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)
