"""Causal attention by blocks of queries, in plain torch: the arithmetic of `attention` on any device.

FlashAttention's bookkeeping (arXiv 2205.14135, 2307.08691) at the block size that suits large matrix products: for each block of
queries only the keys that some row of it may see are touched, so the upper triangle costs nothing beyond the diagonal blocks.
The group of query heads that share a key head is folded into the rows, so keys and values are read once and never repeated.

Kept for the backward pass: q, k, v, the output and one log-sum-exp a row and head. Probabilities are made again:
P = exp(S - lse), dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = dS K, dK = dS^T Q.
Products run in the inputs' dtype, the softmax in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Queries a block."""


class Piece(NamedTuple):
    """One sequence of a packed batch: its queries `[q0, q0 + n)`, its keys `[k0, k0 + t)`; both end at the same position."""

    q0: int
    n: int
    k0: int
    t: int


class Scores(NamedTuple):
    """How a product of a query and a key becomes a score, and which keys are seen."""

    scale: float
    window: int | None
    softcap: float | None


class _Block(NamedTuple):
    """Query rows and key columns of one block, and what is hidden inside it (None: nothing)."""

    rows: slice
    keys: slice
    hidden: Tensor | None


def _blocks(piece: Piece, group: int, window: int | None, device: torch.device) -> Iterator[_Block]:
    shift = piece.t - piece.n
    for start in range(0, piece.n, BLOCK):
        stop = min(start + BLOCK, piece.n)
        low = 0 if window is None else max(0, shift + start - window + 1)
        high = shift + stop
        i = torch.arange(shift + start, shift + stop, device=device).repeat_interleave(group)[:, None]
        j = torch.arange(low, high, device=device)
        hidden = (j > i) if window is None else (j > i) | (j <= i - window)
        yield _Block(slice(start * group, stop * group), slice(low, high), hidden if stop - start > 1 or low else None)


def _fold(x: Tensor, kv: int) -> Tensor:
    """`[n, H, D]` -> `[K, n * H / K, D]`: the rows of one key head, query by query."""
    n, heads, d = x.shape
    return x.reshape(n, kv, heads // kv, d).transpose(0, 1).reshape(kv, n * (heads // kv), d)


def _unfold(x: Tensor, heads: int) -> Tensor:
    kv, rows, d = x.shape
    group = heads // kv
    return x.view(kv, rows // group, group, d).transpose(0, 1).reshape(rows // group, heads, d)


def _capped(products: Tensor, how: Scores) -> Tensor:
    """Scores in fp32 or wider, before the mask."""
    scores = products.to(torch.promote_types(products.dtype, torch.float32)).mul_(how.scale)
    return scores if how.softcap is None else scores.div_(how.softcap).tanh_().mul_(how.softcap)


def forward(q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece], how: Scores) -> tuple[Tensor, Tensor]:
    """The output `[N, H, D]` and the log-sum-exp of each row and head `[N, H]`."""
    heads, kv = q.shape[1], k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for piece in pieces:
        queries = _fold(q[piece.q0 : piece.q0 + piece.n], kv)
        keys, values = (x[piece.k0 : piece.k0 + piece.t].transpose(0, 1) for x in (k, v))
        found, totals = torch.empty_like(queries), lse.new_empty(*queries.shape[:2], 1)
        for rows, columns, hidden in _blocks(piece, heads // kv, how.window, q.device):
            scores = _capped(queries[:, rows] @ keys[:, columns].transpose(1, 2), how)
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            top = scores.amax(-1, keepdim=True)
            total = scores.sub_(top).exp_().sum(-1, keepdim=True)
            found[:, rows] = (scores.div_(total).to(q.dtype)) @ values[:, columns]
            totals[:, rows] = total.log_().add_(top)
        out[piece.q0 : piece.q0 + piece.n] = _unfold(found, heads)
        lse[piece.q0 : piece.q0 + piece.n] = _unfold(totals, heads).squeeze(2)
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, pieces: list[Piece], how: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    heads, kv = q.shape[1], k.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    inner = (d_out * out).sum(-1, dtype=lse.dtype)[..., None]
    for piece in pieces:
        ours, theirs = slice(piece.q0, piece.q0 + piece.n), slice(piece.k0, piece.k0 + piece.t)
        queries, slopes = _fold(q[ours], kv), _fold(d_out[ours], kv)
        keys, values = (x[theirs].transpose(0, 1) for x in (k, v))
        totals, inners = _fold(lse[ours, :, None], kv), _fold(inner[ours], kv)
        d_queries = torch.empty_like(queries)
        d_keys, d_values = (torch.zeros(keys.shape, dtype=lse.dtype, device=q.device) for _ in range(2))
        for rows, columns, hidden in _blocks(piece, heads // kv, how.window, q.device):
            scores = _capped(queries[:, rows] @ keys[:, columns].transpose(1, 2), how)
            bend = None if how.softcap is None else 1 - (scores / how.softcap).square_()
            p = scores.sub_(totals[:, rows]).exp_()
            if hidden is not None:
                p.masked_fill_(hidden, 0)
            d_values[:, columns] += p.to(q.dtype).transpose(1, 2) @ slopes[:, rows]
            ds = (slopes[:, rows] @ values[:, columns].transpose(1, 2)).to(p.dtype).sub_(inners[:, rows]).mul_(p)
            ds = (ds if bend is None else ds.mul_(bend)).mul_(how.scale).to(q.dtype)
            d_queries[:, rows] = ds @ keys[:, columns]
            d_keys[:, columns] += ds.transpose(1, 2) @ queries[:, rows]
        dq[ours] = _unfold(d_queries, heads)
        dk[theirs], dv[theirs] = d_keys.transpose(0, 1), d_values.transpose(0, 1)
    return dq, dk, dv


def decode(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], how: Scores) -> Tensor:
    """One query a sequence. Loops over key heads: a batch over sequences reads the stores where they are."""
    batch, heads, d = q.shape
    kv, longest = k.shape[2], max(lengths)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    last = torch.tensor(lengths, device=q.device)[:, None, None]
    j = torch.arange(longest, device=q.device)
    hidden = (j >= last) if how.window is None else (j >= last) | (j < last - how.window)
    group = heads // kv
    for h in range(kv):
        ours = slice(h * group, (h + 1) * group)
        scores = _capped(torch.bmm(q[:, ours], k[:, :longest, h].transpose(1, 2)), how).masked_fill_(hidden, -torch.inf)
        out[:, ours] = torch.bmm(torch.softmax(scores, dim=-1).to(q.dtype), v[:, :longest, h])
    return out.view(batch, heads, d)
