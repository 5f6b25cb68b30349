"""The C forms for decoding: products of a few rows, and one query a sequence. None where the plain form has to do it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from veneer.ops.blocks import Scores
from veneer.ops.native.build import library
from veneer.ops.threads import team

FEW = 32
"""Rows up to which our product is the faster one: it is bound by reading the weight, and a library copies that first."""


SOME = 384
"""Rows up to which another kernel of ours is: it lays out the rows once, where a library does so with the weight."""


def product(x: Tensor, weight: Tensor) -> Tensor | None:
    """x `[n, k]` times weight `[m, k]` transposed."""
    if not _suits(x, weight) or x.shape[0] > SOME:
        return None
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    if x.shape[0] <= FEW:
        return y if _run(x, weight, y, add=False) else None
    return y if _run_some(x, weight, y) else None


class Weight(ctypes.Structure):
    """Where the rows of a weight lie; see `few.h`."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("rows", "scale", "high", "first", "places", "values")]


BF16, TWELVE, INT8 = 64, 48, 32
"""How weights are stored: the bytes of 32 of them."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A weight `[out, in]` that a product of few rows reads where it lies.

    rows    bf16 `[out, in]`, int8 codes `[out, in]`, or bytes `[out, in * 3 / 2]` of `ops/twelve_bit.py`
    scale   of each row of int8 codes, fp32
    high    of twelve bits: what each row counts its high bytes from, uint8
    first, places, values  of twelve bits: the listed weights, from which on row by row (int64 `[out + 1]`), their places in the
            whole weight (int64) and themselves (bf16)
    """

    kind: int
    shape: tuple[int, int]
    rows: Tensor
    scale: Tensor | None = None
    high: Tensor | None = None
    first: Tensor | None = None
    places: Tensor | None = None
    values: Tensor | None = None

    @cached_property
    def structure(self) -> Weight:
        """Valid as long as this lives."""
        held = (self.rows, self.scale, self.high, self.first, self.places, self.values)
        return Weight(*(None if tensor is None else tensor.data_ptr() for tensor in held))

    def fits(self) -> bool:
        """Whether the kernels read it."""
        dtype = {BF16: torch.bfloat16, TWELVE: torch.uint8, INT8: torch.int8}[self.kind]
        whole = self.shape[1] % (64 if self.kind == TWELVE else 32) == 0
        return whole and self.rows.dtype == dtype and self.rows.is_contiguous() and self.rows.device.type == "cpu"


def product_stored(x: Tensor, weight: Rows) -> Tensor | None:
    """x `[n, in]` times a weight of another form than bf16, transposed."""
    here = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.stride(1) == 1
    suits = here and x.shape[0] <= FEW and x.shape[1] == weight.shape[1] and weight.fits()
    kernels = library() if suits else None
    if kernels is None:
        return None
    n, (m, k) = x.shape[0], weight.shape
    y = torch.empty(n, m, dtype=x.dtype)
    kernels.few_stored_rows(
        x.data_ptr(), x.stride(0), ctypes.addressof(weight.structure), weight.kind, n, m, k, y.data_ptr(), m, team()
    )
    return y


def unpack_twelve(weight: Rows, out: Tensor) -> bool:
    """Fill `out` `[out, in]` with the weight as it was. False: nothing was done."""
    here = out.dtype == torch.bfloat16 and out.device.type == "cpu" and out.is_contiguous()
    kernels = library() if here and out.shape == weight.shape and weight.fits() else None
    if kernels is None:
        return False
    m, k = weight.shape
    kernels.plain_rows(ctypes.addressof(weight.structure), m, k, out.data_ptr(), torch.get_num_threads())
    return True


MANY = 64
"""Rows up to which the scores of a whole step are one call."""


def scores(x: Tensor, weight: Tensor) -> Tensor | None:
    """x `[n, k]` times weight `[m, k]` transposed, fp32 as it was summed: for scores over a vocabulary."""
    if not _suits(x, weight) or x.shape[0] > MANY:
        return None
    kernels = library()
    if kernels is None:
        return None
    (n, k), m = x.shape, weight.shape[0]
    y = torch.empty(n, m, dtype=torch.float32)
    kernels.few_scores(x.data_ptr(), x.stride(0), weight.data_ptr(), n, m, k, y.data_ptr(), y.stride(0), team())
    return y


def largest(y: Tensor) -> tuple[list[int], list[float]] | None:
    """Where the first of the largest numbers of each row of fp32 `[n, m]` is, and that number. NaN is larger than any."""
    if y.dtype != torch.float32 or y.device.type != "cpu" or not y.is_contiguous() or 0 in y.shape:
        return None
    kernels = library()
    if kernels is None:
        return None
    n, m = y.shape
    places, values = (ctypes.c_int64 * n)(), (ctypes.c_float * n)()
    kernels.largest(y.data_ptr(), n, m, places, values, team())
    return list(places), list(values)


def add_product(y: Tensor, x: Tensor, weight: Tensor) -> bool:
    """y += x weight^T in place; y may be columns of a wider tensor. False: nothing was done."""
    return _fits(x, weight) and y.dtype == x.dtype and y.stride(1) == 1 and _run(x, weight, y, add=True)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return x.shape[0] <= FEW and _suits(x, weight)


def _suits(x: Tensor, weight: Tensor) -> bool:
    kind = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    return kind and x.shape[1] % 32 == 0 and x.stride(1) == 1 and weight.is_contiguous()


def _run(x: Tensor, weight: Tensor, y: Tensor, *, add: bool) -> bool:
    kernels = library()
    if kernels is None:
        return False
    (n, k), m = x.shape, weight.shape[0]
    kernels.few_rows(x.data_ptr(), x.stride(0), weight.data_ptr(), n, m, k, y.data_ptr(), y.stride(0), add, team())
    return True


def _run_some(x: Tensor, weight: Tensor, y: Tensor) -> bool:
    kernels = library()
    if kernels is None or x.stride(0) % 2 or x.data_ptr() % 4:  # pairs of numbers are read as one
        return False
    (n, k), m = x.shape, weight.shape[0]
    done = kernels.some_rows(
        x.data_ptr(), x.stride(0), weight.data_ptr(), n, m, k, y.data_ptr(), y.stride(0), torch.get_num_threads()
    )
    return bool(done)


def decodes(dtype: torch.dtype, device: torch.device, group: int, d: int, softcap: float | None) -> bool:
    """Whether the kernels attend for one query a sequence: `group` heads of width d to a key head.

    An engine asks when it starts, so that the kernels are built then, for any dtype, and not in somebody's first step.
    """
    if library() is None:
        return False
    covered = dtype == torch.bfloat16 and device.type == "cpu" and softcap is None
    return covered and d % 16 == 0 and d <= 256 and group <= 16


def decode(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], how: Scores) -> Tensor | None:
    """`blocks.decode`. Key stores are read in place: heads side by side, any distance between tokens and sequences."""
    (b, heads, d), kv = q.shape, k.shape[2]
    in_place = all(x.stride(3) == 1 and x.stride(2) == d for x in (k, v))
    kind = q.dtype == k.dtype == v.dtype and in_place and decodes(q.dtype, q.device, heads // kv, d, how.softcap)
    kernels = library() if kind else None
    if kernels is None:
        return None
    q, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype)
    kernels.decode_attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), k.stride(1), v.stride(1),
        (ctypes.c_int64 * b)(*lengths), b, heads, kv, d, how.window or 0, how.scale, out.data_ptr(), team(),
    )  # fmt: skip
    return out


class Place(ctypes.Structure):
    """Where one row's sequence keeps keys and values, and the position that the row takes; steps count elements."""

    _fields_ = [
        ("store", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("layer_step", "value_step", "position_step", "at")),
    ]


@dataclass(frozen=True, eq=False)
class InPlace:
    """Rows of a pass that read one token each, and where the sequence of each keeps what it has read."""

    rows: ctypes.Array[ctypes.c_int64]
    places: ctypes.Array[Place]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, scale: float, window: int | None
    ) -> None:
        """Store these rows of k and v `[n, kv, d]`; set those of out `[n, heads, d]`. Only where `decodes` said so."""
        kernels = library()
        assert kernels is not None
        heads, kv, d = q.shape[1], k.shape[1], q.shape[2]
        q, k, v = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (q, k, v))
        assert out.stride() == (heads * d, d, 1)
        kernels.attend_in_place(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k.stride(0), v.stride(0), self.rows, self.places,
            len(self.rows), layer, heads, kv, d, window or 0, scale, out.data_ptr(), out.stride(0), team(),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of rows of a pass, as pairs of the first row and their number, and where the sequence of each keeps what it reads."""

    rows: ctypes.Array[ctypes.c_int64]
    places: ctypes.Array[Place]

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep these rows of k and v `[n, kv, d]`. Only where `decodes` said so."""
        kernels = library()
        assert kernels is not None
        kv, d = k.shape[1:]
        k, v = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (k, v))
        kernels.store_runs(
            k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), self.rows, self.places, len(self.places), layer,
            kv * d, team(),
        )  # fmt: skip
