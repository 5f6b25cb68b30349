"""The C forms for decoding: products of a few rows, and one query a sequence. None where the plain form has to do it."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from veneer.ops.blocks import Scores
from veneer.ops.native.build import library

FEW = 16
"""Rows up to which a product is bound by reading the weight."""


def product(x: Tensor, weight: Tensor) -> Tensor | None:
    """x `[n, k]` times weight `[m, k]` transposed."""
    if not _fits(x, weight):
        return None
    y = torch.empty(len(x), len(weight), dtype=x.dtype)
    return y if _run(x, weight, y, add=False) else None


MANY = 64
"""Rows up to which the scores of a whole step are one call."""


def scores(x: Tensor, weight: Tensor) -> Tensor | None:
    """x `[n, k]` times weight `[m, k]` transposed, fp32 as it was summed: for scores over a vocabulary."""
    if not _suits(x, weight) or len(x) > MANY:
        return None
    kernels = library()
    if kernels is None:
        return None
    y = torch.empty(len(x), len(weight), dtype=torch.float32)
    kernels.few_scores(
        c_void_p(x.data_ptr()), c_long(x.stride(0)), c_void_p(weight.data_ptr()), c_long(len(x)), c_long(len(weight)),
        c_long(x.shape[1]), c_void_p(y.data_ptr()), c_long(y.stride(0)), c_int(torch.get_num_threads()),
    )  # fmt: skip
    return y


def add_product(y: Tensor, x: Tensor, weight: Tensor) -> bool:
    """y += x weight^T in place; y may be columns of a wider tensor. False: nothing was done."""
    return _fits(x, weight) and y.dtype == x.dtype and y.stride(1) == 1 and _run(x, weight, y, add=True)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return len(x) <= FEW and _suits(x, weight)


def _suits(x: Tensor, weight: Tensor) -> bool:
    kind = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    return kind and x.shape[1] % 32 == 0 and x.stride(1) == 1 and weight.is_contiguous()


def _run(x: Tensor, weight: Tensor, y: Tensor, *, add: bool) -> bool:
    kernels = library()
    if kernels is None:
        return False
    kernels.few_rows(
        c_void_p(x.data_ptr()), c_long(x.stride(0)), c_void_p(weight.data_ptr()), c_long(len(x)), c_long(len(weight)),
        c_long(x.shape[1]), c_void_p(y.data_ptr()), c_long(y.stride(0)), c_int(add), c_int(torch.get_num_threads()),
    )  # fmt: skip
    return True


def decode(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], how: Scores) -> Tensor | None:
    """`blocks.decode`. Key stores are read in place: heads side by side, any distance between tokens and sequences."""
    (b, heads, d), kv = q.shape, k.shape[2]
    kind = q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.device.type == "cpu" and how.softcap is None
    in_place = all(x.stride(3) == 1 and x.stride(2) == d for x in (k, v))
    if not kind or not in_place or d % 16 or d > 256 or heads // kv > 16:
        return None
    kernels = library()
    if kernels is None:
        return None
    q, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype)
    kernels.decode_attention(
        *(c_void_p(x.data_ptr()) for x in (q, k, v)), *(c_long(x.stride(i)) for i in (0, 1) for x in (k, v)),
        (ctypes.c_int64 * b)(*lengths), *(c_long(size) for size in (b, heads, kv, d, how.window or 0)), c_float(how.scale),
        c_void_p(out.data_ptr()), c_int(torch.get_num_threads()),
    )  # fmt: skip
    return out
