"""The fused forward of `adapted_linear` and its gradients, written by hand.

Forward, per span of rows:  h = x A^T;  y += h B^T in place;  y = y s + b in place.
Backward, g = dy s:  dx = g W + (g B) A in place;  dB = g^T h;  dA = (g B)^T x;  ds = sum of dy (y before s);  db = sum of dy.

Kept: the source of x, h (r wide), and y where an out_scale is trained. Everything wide is read once and written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.ops.frozen import Frozen, product
from veneer.ops.native import few
from veneer.ops.native import rows as native_rows
from veneer.ops.pack import Pack
from veneer.ops.prologue import Prologue
from veneer.ops.recording import unrecorded

Rows = list[tuple[slice, int]]
"""Row ranges, and which of the packs in use applies to each."""


class Adapted(torch.autograd.Function):
    """The packs' tensors are passed once more, flat, so that autograd sees them."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        prologue: Prologue,
        frozen: Frozen,
        bias: Tensor | None,
        packs: list[Pack],
        rows: Rows,
        *tensors: Tensor | None,
    ) -> Tensor:
        cast = _cast(packs, source.dtype)
        x = scaled(prologue.value(source), cast, rows)
        y = frozen.apply(x)
        shrunk = [add_low_rank(y[part], x[part], cast[i]) for part, i in rows]
        wants_scale = any(ctx.needs_input_grad[6:]) and any(True for _ in _vectors("out_scale", cast, rows))
        unscaled = y.clone() if wants_scale and not _invertible(bias, cast, rows) else None
        finish(y, bias, cast, rows)
        wants_x = any(t is not None for pack in packs for t in (pack.A, pack.in_scale))
        kept = unscaled if unscaled is not None else y if wants_scale else None
        ctx.save_for_backward(source if wants_x or prologue.keeps else None, kept, *shrunk)
        dtypes = [tuple(None if t is None else t.dtype for t in pack.tensors()) for pack in packs]
        ctx.rest = prologue, frozen, dtypes, cast, rows
        ctx.divide = unscaled is None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        source, kept, *shrunk = ctx.saved_tensors
        prologue, frozen, dtypes, cast, rows = ctx.rest
        wants_source = ctx.needs_input_grad[0]
        grads = Gradients(dtypes, ctx.needs_input_grad[6:])
        dy = grads.finish(dy, kept, cast, rows, divide=ctx.divide)
        dx = frozen.apply_transposed(dy) if wants_source or grads.wants("in_scale") else None
        plain = prologue.value(source) if grads.wants("A") or grads.wants("in_scale") else None
        x = None if plain is None else scaled(plain, cast, rows)
        for (part, i), h in zip(rows, shrunk, strict=True):
            if h is not None:
                grads.low_rank(
                    i, cast[i], dy[part], None if x is None else x[part], h, None if dx is None else dx[part]
                )
        if dx is not None:
            grads.in_scale(dx, plain, cast, rows)
        d_source = prologue.slope(source, dx) if wants_source else None
        return (d_source, None, None, None, None, None, *grads.flat())


@unrecorded
def infer(x: Tensor, frozen: Frozen, bias: Tensor | None, packs: list[Pack], rows: Rows) -> Tensor:
    """The forward pass alone."""
    cast = _cast(packs, x.dtype)
    x = scaled(x, cast, rows)
    y = frozen.apply(x)
    for part, i in rows:
        add_low_rank(y[part], x[part], cast[i])
    finish(y, bias, cast, rows)
    return y


def _cast(packs: list[Pack], dtype: torch.dtype) -> list[Pack]:
    """Adapters in the dtype of the products. They are small; x is not, so it is never cast."""
    return [pack.with_tensors([None if t is None else t.detach().to(dtype) for t in pack.tensors()]) for pack in packs]


def _vectors(name: str, packs: list[Pack], rows: Rows) -> Iterator[tuple[slice, int, Tensor]]:
    """Row ranges with that vector, the pack's number, and the vector."""
    slot = SLOTS[name]
    for part, i in rows:
        vector = packs[i].tensors()[slot]
        if vector is not None:
            yield part, i, vector


def scaled(x: Tensor, packs: list[Pack], rows: Rows) -> Tensor:
    """x with the in_scales on: x itself where there are none, else a copy."""
    found = x
    for part, _, vector in _vectors("in_scale", packs, rows):
        found = x.clone() if found is x else found
        found[part] *= vector
    return found


def add_low_rank(y: Tensor, x: Tensor, pack: Pack) -> Tensor | None:
    """y += (x A^T) B^T in place, each part on its own columns; returns x A^T."""
    if pack.A is None:
        return None
    h = product(x, pack.A.t())
    for b, (first, last), (start, stop) in zip(pack.B, pack.ranks(), pack.columns, strict=True):
        if not few.add_product(y[:, start:stop], h[:, first:last], b):
            y[:, start:stop].addmm_(h[:, first:last], b.t())
    return h


def _invertible(bias: Tensor | None, packs: list[Pack], rows: Rows) -> bool:
    """Whether y / out_scale is what y was before its scales: no bias in the way, no zero among them.

    Then y itself is kept, which most consumers keep as well, so that DoRA costs no activation memory of its own.
    """
    biased = bias is not None or any(True for _ in _vectors("bias", packs, rows))
    return not biased and all(bool(vector.all()) for _, _, vector in _vectors("out_scale", packs, rows))


def finish(y: Tensor, bias: Tensor | None, packs: list[Pack], rows: Rows) -> None:
    """y = y * out_scale + bias, in place. Rows without a bias of their own get the base's."""
    for part, _, vector in _vectors("out_scale", packs, rows):
        y[part] *= vector
    own = list(_vectors("bias", packs, rows))
    if bias is not None and not own:
        y += bias.to(y.dtype)
    elif bias is not None:
        plain = torch.ones(len(y), 1, dtype=y.dtype, device=y.device)
        for part, _, _ in own:
            plain[part] = 0
        y.addcmul_(plain, bias.to(y.dtype))
    for part, _, vector in own:
        y[part] += vector


class Gradients:
    """The gradients of the packs' tensors, summed over spans, each in its tensor's own dtype."""

    def __init__(self, dtypes: list[tuple[torch.dtype | None, ...]], needed: Sequence[bool]) -> None:
        flags = iter(needed)
        self._dtypes = dtypes
        self._needed = [[next(flags) for _ in pack] for pack in dtypes]
        self._sums: list[list[Tensor | None]] = [[None] * len(pack) for pack in dtypes]

    def wants(self, name: str) -> bool:
        return any(flags[SLOTS[name]] for flags in self._needed)

    def _add(self, i: int, slot: int, value: Tensor) -> None:
        have = self._sums[i][slot]
        self._sums[i][slot] = value.to(self._dtypes[i][slot]) if have is None else have.add_(value)

    def finish(self, dy: Tensor, kept: Tensor | None, packs: list[Pack], rows: Rows, *, divide: bool) -> Tensor:
        """Gradients of biases and out_scales; returns the gradient of y as it was before them."""
        for part, i, _ in _vectors("bias", packs, rows):
            if self._needed[i][SLOTS["bias"]]:
                self._add(i, SLOTS["bias"], _row_sum(dy[part]))
        scaled = list(_vectors("out_scale", packs, rows))
        if not scaled:
            return dy
        unscaled = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        if sum(part.stop - part.start for part, _, _ in scaled) < len(dy):
            unscaled.copy_(dy)
        for part, i, vector in scaled:
            y = kept[part] if kept is not None and self._needed[i][SLOTS["out_scale"]] else None
            total = None if y is None else native_rows.scale_backward(dy[part], y, vector, unscaled[part])
            if total is None:
                torch.mul(dy[part], vector, out=unscaled[part])
                total = None if y is None else _row_sum(dy[part] * y)
            if total is not None:
                self._add(i, SLOTS["out_scale"], total / vector if divide else total)
        return unscaled

    def low_rank(self, i: int, pack: Pack, dy: Tensor, x: Tensor | None, h: Tensor, dx: Tensor | None) -> None:
        """dB = dy^T h and dA = (dy B)^T x for one span; dx += (dy B) A in place."""
        assert pack.A is not None
        dh = torch.empty_like(h)
        for p, (b, (first, last), (start, stop)) in enumerate(zip(pack.B, pack.ranks(), pack.columns, strict=True)):
            ours = dy[:, start:stop]
            torch.mm(ours, b, out=dh[:, first:last])
            if self._needed[i][FIRST_B + p]:
                self._add(i, FIRST_B + p, torch.mm(h[:, first:last].t(), ours).t())
        if self._needed[i][SLOTS["A"]]:
            assert x is not None
            self._add(i, SLOTS["A"], torch.mm(dh.t(), x))
        if dx is not None:
            dx.addmm_(dh, pack.A)

    def in_scale(self, dx: Tensor, x: Tensor | None, packs: list[Pack], rows: Rows) -> None:
        """Gradients of in_scales; dx becomes the gradient of the unscaled x, in place."""
        for part, i, vector in _vectors("in_scale", packs, rows):
            if self._needed[i][SLOTS["in_scale"]]:
                assert x is not None
                self._add(i, SLOTS["in_scale"], _row_sum(dx[part] * x[part]))
            dx[part] *= vector

    def flat(self) -> list[Tensor | None]:
        return [value for sums in self._sums for value in sums]


SLOTS = {"A": 0, "in_scale": 1, "out_scale": 2, "bias": 3}
"""Places in `Pack.tensors()`; the B of each part follow."""
FIRST_B = 4


def _row_sum(t: Tensor) -> Tensor:
    """The sum over rows in fp32 or wider; in pieces, as torch copies what it sums to that dtype first."""
    pieces = [piece.sum(0, dtype=torch.promote_types(t.dtype, torch.float32)) for piece in t.split(256)]
    return torch.stack(pieces).sum(0)
