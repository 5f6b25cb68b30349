"""The C forms of row-wise operations. Each function returns None where the plain form has to do it.

One pass over memory in place of five or more, no fp32 copies: see `rows.c`.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from veneer.ops.native.build import library

GELU = 2 * math.sqrt(2 / math.pi)
SMOOTH = {"silu": (1.0, 0.0), "gelu_tanh": (GELU, 0.044715 * GELU)}
"""Activations of the form x sigmoid(k x + e x^3): their k and e."""


SHARE = 128
"""Rows of a column sum that are added up in one go, as in rows.c."""


def _kernels(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, where all tensors are bf16 on the CPU and their last dimension is whole vectors, side by side."""
    for x in tensors:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.shape[-1] % 16 or x.stride(-1) != 1:
            return None
    return library()


def _pointer(t: Tensor) -> c_void_p:
    return c_void_p(t.data_ptr())


def _threads() -> c_int:
    return c_int(torch.get_num_threads())


def _flat(x: Tensor) -> Tensor:
    """`[rows, d]`; rows may be further apart than they are wide."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _factor(weight: Tensor, offset: float) -> Tensor:
    wide = weight.to(torch.float32).contiguous()
    return wide.add(offset) if offset else wide


def rms_forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor] | None:
    """y and 1 / rms `[*rows, 1]`."""
    kernels = _kernels(x)
    if kernels is None:
        return None
    rows, w = _flat(x), _factor(weight, offset)
    y, inverse = torch.empty(x.shape, dtype=x.dtype), torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    n, d = rows.shape
    kernels.rms_forward(
        rows.data_ptr(),
        rows.stride(0),
        n,
        d,
        w.data_ptr(),
        eps,
        y.data_ptr(),
        inverse.data_ptr(),
        torch.get_num_threads(),
    )
    return y, inverse


def rms_backward(x: Tensor, weight: Tensor, inverse: Tensor, dy: Tensor, offset: float) -> Tensor | None:
    """dx, for a frozen weight."""
    kernels = _kernels(x, dy)
    if kernels is None:
        return None
    rows, w, dy = _flat(x), _factor(weight, offset), dy.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype)
    n, d = rows.shape
    kernels.rms_backward(
        _pointer(rows), c_long(rows.stride(0)), _pointer(dy), c_long(n), c_long(d), _pointer(w), _pointer(inverse), _pointer(dx),
        _threads(),
    )  # fmt: skip
    return dx


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor | None:
    """x `[n, heads, d]` turned, or turned back."""
    kernels = _kernels(x)
    half = cos.shape[-1]
    if kernels is None or half % 16 or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        return None
    x = x if x.stride(1) == x.shape[2] else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    n, heads, d = x.shape
    kernels.rotary(
        x.data_ptr(), x.stride(0), n, heads, d, half, cos.data_ptr(), sin.data_ptr(), -1.0 if back else 1.0, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def gated_forward(gate_up: Tensor, name: str) -> Tensor | None:
    """act(gate) * up."""
    kernels = _kernels(gate_up)
    n, f = gate_up.shape[0], gate_up.shape[1] // 2
    if kernels is None or name not in SMOOTH or f % 16 or not gate_up.is_contiguous():
        return None
    y = torch.empty(n, f, dtype=gate_up.dtype)
    k, e = SMOOTH[name]
    kernels.gated_forward(gate_up.data_ptr(), n, f, k, e, y.data_ptr(), torch.get_num_threads())
    return y


def gated_backward(gate_up: Tensor, dy: Tensor, name: str) -> Tensor | None:
    """The gradient of gate_up."""
    kernels = _kernels(gate_up, dy)
    n, f = gate_up.shape[0], gate_up.shape[1] // 2
    if kernels is None or name not in SMOOTH or f % 16 or not gate_up.is_contiguous():
        return None
    found, dy = torch.empty_like(gate_up), dy.contiguous()
    k, e = SMOOTH[name]
    kernels.gated_backward(
        _pointer(gate_up), _pointer(dy), c_long(n), c_long(f), c_float(k), c_float(e), _pointer(found), _threads()
    )
    return found


def scale_backward(dy: Tensor, y: Tensor, scale: Tensor, dx: Tensor) -> Tensor | None:
    """dx = dy * scale, and the column sums of dy * y, fp32 `[d]`."""
    kernels = _kernels(dy, y, scale, dx)
    if kernels is None or not (y.is_contiguous() and dx.is_contiguous()):
        return None
    n, d = y.shape
    sums = torch.empty(-(-n // SHARE), d, dtype=torch.float32)
    kernels.scale_backward(
        _pointer(dy), c_long(dy.stride(0)), _pointer(y), c_long(n), c_long(d), _pointer(scale), _pointer(dx), _pointer(sums),
        _threads(),
    )  # fmt: skip
    return sums.sum(0)


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor | None:
    """The negative log-probability of each label, fp32. With weights, `logits` becomes weights * (softmax - onehot)."""
    kernels = _kernels(logits)
    if kernels is None or not logits.is_contiguous():
        return None
    n, v = logits.shape
    labels = labels.to(torch.int64).contiguous()
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < v:  # the C form writes where they point
        raise IndexError(f"labels from {int(labels.min())} to {int(labels.max())}, expected 0 to {v - 1}")
    nll = torch.empty(n, dtype=torch.float32)
    factors = c_void_p() if weights is None else _pointer(weights)
    kernels.cross_entropy(_pointer(logits), c_long(n), c_long(v), _pointer(labels), factors, _pointer(nll), _threads())
    return nll


def dequantise_four_bit(packed: Tensor, scales: Tensor, block: int, levels: Tensor, out: Tensor) -> bool:
    """levels `[16]` by code. Fill `out` (flat, whole blocks); False where the plain form has to."""
    kernels = _kernels(out)
    if kernels is None or block % 32 or len(out) % block:
        return False
    kernels.dequantise_four_bit(
        _pointer(packed),
        _pointer(scales),
        c_long(len(out) // block),
        c_long(block),
        _pointer(levels),
        _pointer(out),
        _threads(),
    )
    return True


def dequantise_int8(codes: Tensor, scale: Tensor, out: Tensor) -> bool:
    """out = codes * scale `[rows]`, rounded once. False: nothing was done."""
    fits = codes.is_contiguous() and scale.is_contiguous() and out.is_contiguous() and scale.dtype == torch.float32
    kernels = _kernels(out) if fits else None
    if kernels is None or codes.dtype != torch.int8:
        return False
    rows, columns = codes.shape
    kernels.dequantise_int8(codes.data_ptr(), scale.data_ptr(), rows, columns, out.data_ptr(), torch.get_num_threads())
    return True
