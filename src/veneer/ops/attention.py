"""Causal attention over packed sequences, grouped-query, without padding and without an S x S mask.

softmax(scale * q k^T) v inside each sequence. H query heads share K key heads (arXiv 2305.13245): query head h reads key head
h // (H / K). With a softcap the scores become cap * tanh(scores / cap) before the mask (Gemma 2). With a window w, query i
sees keys j with i - w < j <= i. Prefix keys stand before position 0, so every query sees them, the window permitting.

What is kept for the backward pass is written in `blocks.py`, where the arithmetic is; `native/` has the same in C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops import blocks
from veneer.ops.blocks import Piece, Scores
from veneer.ops.native import attention as native
from veneer.ops.native import few
from veneer.ops.recording import unrecorded

Prefix: TypeAlias = Sequence[tuple[Tensor, Tensor] | None]
"""Per sequence: keys and values `[p, K, D]` that stand before it, or None."""


def attention_over_reference(
    q: Float[Tensor, "n heads d"],
    k: Float[Tensor, "t kv d"],
    v: Float[Tensor, "t kv d"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "n heads d"]:
    """The last n of t positions of one sequence attend over all that is theirs to see. The definition of `attention_over`."""
    n, heads, _ = q.shape
    t, kv, _ = k.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(heads // kv, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.to(wide), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(t - n, t, device=q.device)[:, None]
    j = torch.arange(t, device=q.device)
    hidden = (j > i) if window is None else (j > i) | (j <= i - window)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return torch.einsum("hij,jhd->ihd", weights, v).to(q.dtype)


def attention_over(
    q: Float[Tensor, "n heads d"],
    k: Float[Tensor, "t kv d"],
    v: Float[Tensor, "t kv d"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "n heads d"]:
    """Queries at the end of a longer key sequence: the n queries are positions t - n .. t - 1 of t keys (chunked prefill)."""
    pieces = [Piece(0, len(q), 0, len(k))]
    return _Attention.apply(q, k, v, pieces, Scores(scale, window, softcap))  # type: ignore[no-any-return, no-untyped-call]


@unrecorded
def decode_attention(
    q: Float[Tensor, "b heads d"],
    k: Float[Tensor, "b t kv d"],
    v: Float[Tensor, "b t kv d"],
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b heads d"]:
    """One query for each of b sequences, at position lengths[b] - 1 of its own key store. No gradient.

    Rows of a store from lengths[b] on count for nothing, but must be finite.
    """
    how = Scores(scale, window, softcap)
    found = few.decode(q, k, v, list(lengths), how)
    return blocks.decode(q, k, v, list(lengths), how) if found is None else found


def attention_reference(
    q: Float[Tensor, "n heads d"],
    k: Float[Tensor, "n kv d"],
    v: Float[Tensor, "n kv d"],
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    prefix: Prefix | None = None,
) -> Float[Tensor, "n heads d"]:
    """The definition of `attention`: one sequence after the other."""
    sizes = list(lengths)
    found = []
    for s, (qs, ks, vs) in enumerate(zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)):
        before = prefix[s] if prefix is not None else None
        if before is not None:
            ks, vs = torch.cat((before[0].to(ks.dtype), ks)), torch.cat((before[1].to(vs.dtype), vs))
        found.append(attention_over_reference(qs, ks, vs, scale=scale, window=window, softcap=softcap))
    return torch.cat(found)


def attention(
    q: Float[Tensor, "n heads d"],
    k: Float[Tensor, "n kv d"],
    v: Float[Tensor, "n kv d"],
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    prefix: Prefix | None = None,
) -> Float[Tensor, "n heads d"]:
    """Causal attention inside each of the consecutive sequences of `lengths` (which sum to n)."""
    before = [0] * len(lengths)
    if prefix is not None:
        before = [0 if pair is None else len(pair[0]) for pair in prefix]
        k, v = (_with_prefix(x, lengths, prefix, which) for which, x in enumerate((k, v)))
    pieces, q0, k0 = [], 0, 0
    for n, p in zip(lengths, before, strict=True):
        pieces.append(Piece(q0, n, k0, n + p))
        q0, k0 = q0 + n, k0 + n + p
    return _Attention.apply(q, k, v, pieces, Scores(scale, window, softcap))  # type: ignore[no-any-return, no-untyped-call]


def _with_prefix(x: Tensor, lengths: Sequence[int], prefix: Prefix, which: int) -> Tensor:
    rows = zip(prefix, x.split(list(lengths)), strict=True)
    return torch.cat(
        [part for pair, own in rows for part in (own[:0] if pair is None else pair[which].to(x.dtype), own)]
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece], how: Scores) -> Tensor:
        forward = native.forward if native.fits(q, k, v, how) else blocks.forward
        out, lse = forward(q, k, v, pieces, how)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = pieces, how
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        pieces, how = ctx.rest
        q, k, v, out, lse = ctx.saved_tensors
        backward = native.backward if native.fits(q, k, v, how) else blocks.backward
        return (*backward(q, k, v, out, lse, d_out, pieces, how), None, None)
