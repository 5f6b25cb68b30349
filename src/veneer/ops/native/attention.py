"""The C form of attention: same arguments and results as `blocks.forward` and `blocks.backward`.

fp32 scores and sums where the plain form rounds scores to bf16, so it is the more exact of the two as well.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from veneer.ops.blocks import Piece, Scores
from veneer.ops.native.build import library

STEP = 64
"""Keys of a sequence are padded to this in packed transposes."""
WIDEST = 256


class _Piece(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("q0", "n", "k0", "t", "packed")]


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_long) for name in ("q_row", "k_row", "v_row")),
        ("pieces", ctypes.POINTER(_Piece)),
        *((name, ctypes.c_long) for name in ("count", "heads", "kv", "d", "window")),
        ("scale", ctypes.c_float),
        ("padded", ctypes.c_long),
        ("threads", ctypes.c_int),
    ]


def fits(q: Tensor, k: Tensor, v: Tensor, how: Scores) -> bool:
    """Whether the C form computes this: bf16 on the CPU, heads side by side, no softcap."""
    kind = q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.device.type == "cpu" and how.softcap is None
    return kind and q.shape[2] % 16 == 0 and q.shape[2] <= WIDEST and library() is not None


def _rows(x: Tensor) -> Tensor:
    """x itself where heads stand side by side and rows start at even elements, else a copy."""
    side_by_side = x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.stride(0) % 2 == 0
    return x if side_by_side else x.contiguous()


def _problem(q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece], how: Scores) -> _Problem:
    table = (_Piece * len(pieces))()
    padded = 0
    for i, piece in enumerate(pieces):
        table[i] = _Piece(*piece, padded)
        padded += -(-piece.t // STEP) * STEP
    return _Problem(
        *(x.data_ptr() for x in (q, k, v)),
        *(x.stride(0) for x in (q, k, v)),
        table,
        *(len(pieces), q.shape[1], k.shape[1], q.shape[2], how.window or 0),
        how.scale,
        padded,
        torch.get_num_threads(),
    )


def forward(q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece], how: Scores) -> tuple[Tensor, Tensor]:
    """The output `[N, H, D]` and the log-sum-exp of each row and head `[N, H]`."""
    kernels = library()
    assert kernels is not None
    q, k, v = _rows(q), _rows(k), _rows(v)
    problem = _problem(q, k, v, pieces, how)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    packed = torch.empty(k.shape[1] * k.shape[2] * problem.padded, dtype=k.dtype)
    kernels.attention_forward(ctypes.byref(problem), *_pointers(packed, out, lse))
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, pieces: list[Piece], how: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    kernels = library()
    assert kernels is not None
    q, k, v, d_out = _rows(q), _rows(k), _rows(v), d_out.contiguous()
    problem = _problem(q, k, v, pieces, how)
    kv, d = k.shape[1:]
    group = q.shape[1] // kv
    splits = group if len(pieces) * kv < 4 * problem.threads else 1
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    inner = torch.empty_like(lse)
    packed = torch.empty(kv * d * problem.padded, dtype=k.dtype)
    sums = torch.empty(2 * splits * kv * d * problem.padded, dtype=torch.float32)
    status = kernels.attention_backward(
        ctypes.byref(problem),
        ctypes.c_long(len(q)),
        *_pointers(d_out, out, lse, inner, packed, sums),
        ctypes.c_long(splits),
        *_pointers(dq, dk, dv),
    )
    if status:
        raise MemoryError("attention: no memory for the work space of a thread")
    return dq, dk, dv


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]
