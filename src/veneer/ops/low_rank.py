"""A frozen product with adapters on it: y = (x W^T + (x A^T) B^T) * s + b, row by row the adapter that the row asks for.

LoRA: arXiv 2106.09685. `x` is `[N, in]`; a projection group (q|k|v) is one product with one A for all its parts and one B per
part. Rows are given as spans: `packs[span.index]` applies to rows start..stop, index -1 is the bare base.

Kept for the backward pass: what x was made from (x itself, or `gate_up`, or the residual stream before its norm), the r-wide
shrink x A^T, and y where an out_scale is trained. Never kept: the frozen weight in any form, the scaled or activated input.
Adapters may be fp32 on a bf16 base: they are cast (they are small), x is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from veneer.ops.adapted import Adapted, infer
from veneer.ops.frozen import DenseFrozen, Frozen, product
from veneer.ops.mixed import plan
from veneer.ops.native import few
from veneer.ops.pack import BARE, Pack, Packs, Stacked, places_of, stack
from veneer.ops.prologue import Gated, Identity, Normed, Prologue
from veneer.ops.recording import recorded, unrecorded
from veneer.types import Span

__all__ = [
    "DenseFrozen",
    "Frozen",
    "Pack",
    "Packs",
    "adapted_linear",
    "adapted_linear_reference",
    "gated_adapted_linear",
    "norm_adapted_linear",
]


def adapted_linear_reference(
    x: Float[Tensor, "n inp"],
    weight: Float[Tensor, "out inp"],
    bias: Float[Tensor, " out"] | None,
    packs: Sequence[Pack],
    spans: Sequence[Span],
) -> Float[Tensor, "n out"]:
    """The definition of `adapted_linear`, with the dense weight in place of a `Frozen`."""
    found = []
    for span in spans:
        rows = x[span.start : span.stop]
        pack = packs[span.index] if span.index >= 0 else BARE
        if pack.in_scale is not None:
            rows = rows * pack.in_scale.to(x.dtype)
        y = rows @ weight.t()
        if pack.A is not None:
            for b, (first, last), (start, stop) in zip(pack.B, pack.ranks(), pack.columns, strict=True):
                update = rows @ pack.A[first:last].to(x.dtype).t() @ b.to(x.dtype).t()
                y = y + F.pad(update, (start, y.shape[1] - stop))
        if pack.out_scale is not None:
            y = y * pack.out_scale.to(x.dtype)
        total = bias if pack.bias is None else pack.bias
        found.append(y if total is None else y + total.to(x.dtype))
    return torch.cat(found)


def adapted_linear(
    x: Float[Tensor, "n inp"],
    frozen: Frozen,
    bias: Float[Tensor, " out"] | None,
    packs: Sequence[Pack],
    spans: Sequence[Span],
) -> Float[Tensor, "n out"]:
    """y = (x W^T + (x A^T) B^T) * out_scale + bias. The spans cover all rows of x in order."""
    return _run(x, Identity(), frozen, bias, packs, spans)


def gated_adapted_linear(
    gate_up: Float[Tensor, "n twice"],
    activation: str,
    frozen: Frozen,
    bias: Float[Tensor, " out"] | None,
    packs: Sequence[Pack],
    spans: Sequence[Span],
) -> Float[Tensor, "n out"]:
    """`adapted_linear(act(gate) * up, ...)`, the last product of a gated MLP; keeps `gate_up` and not what it becomes."""
    return _run(gate_up, Gated(activation), frozen, bias, packs, spans)


def norm_adapted_linear(
    x: Float[Tensor, "n inp"],
    norm_weight: Float[Tensor, " inp"],
    eps: float,
    frozen: Frozen,
    bias: Float[Tensor, " out"] | None,
    packs: Sequence[Pack],
    spans: Sequence[Span],
    *,
    offset: float = 0.0,
) -> Float[Tensor, "n out"]:
    """`adapted_linear(rms_norm(x, norm_weight, eps, offset=offset), ...)`; keeps x, which the residual stream keeps anyway.

    For a frozen norm: `norm_weight` gets no gradient.
    """
    return _run(x, Normed(norm_weight, eps, offset), frozen, bias, packs, spans)


def _run(
    source: Tensor,
    prologue: Prologue,
    frozen: Frozen,
    bias: Tensor | None,
    packs: Sequence[Pack],
    spans: Sequence[Span],
) -> Tensor:
    if not packs and not recorded(source):
        y = frozen.apply(prologue.value(source))
        return y if bias is None else y.add_(bias.to(y.dtype))
    if not torch.is_grad_enabled() and isinstance(packs, Packs):
        planned = packs.remembered(tuple(spans), source.dtype, plan)
        found = None if planned is None else planned.run(prologue.value(source), frozen, bias)
        if found is not None:
            return found
    used = sorted({span.index for span in spans if span.index >= 0})
    ours = [packs[i] for i in used]
    rows = [(slice(span.start, span.stop), used.index(span.index)) for span in spans if span.index >= 0]
    tensors = [t for pack in ours for t in pack.tensors()]
    if recorded(source, *tensors):
        return Adapted.apply(source, prologue, frozen, bias, ours, rows, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    x = prologue.value(source)
    if not _short(spans, ours, frozen):
        return infer(x, frozen, bias, ours, rows)
    shape = x.dtype, frozen.in_features, frozen.out_features
    side_by_side = packs.stacked(tuple(used), *shape) if isinstance(packs, Packs) else stack(ours, *shape)
    if isinstance(packs, Packs):
        places = packs.places(tuple(spans), tuple(used), side_by_side)
    else:
        places = places_of(spans, used, side_by_side)
    return _infer_stacked(x, frozen, bias, side_by_side, *places)


SHORT = 4_000_000
"""Multiplications that cost about as much as the kernel calls of one span."""


def _short(spans: Sequence[Span], packs: list[Pack], frozen: Frozen) -> bool:
    """Whether the wasted products of the stacked form cost less than a loop over spans."""
    adapted = sum(span.index >= 0 for span in spans)
    ranks = sum(0 if pack.A is None else pack.A.shape[0] for pack in packs)
    waste = spans[-1].stop * ranks * (frozen.in_features + frozen.out_features) if spans else 0
    return adapted > 2 and waste <= SHORT * adapted


@unrecorded
def _infer_stacked(
    x: Tensor, frozen: Frozen, bias: Tensor | None, packs: Stacked, numbers: Tensor, foreign: Tensor
) -> Tensor:
    """`adapted_linear` over stacked packs: row n belongs to pack numbers[n], and its rank r to another where foreign[n, r]."""
    if packs.in_scales is not None:
        x = x * packs.in_scales[numbers]
    y = frozen.apply(x)
    if packs.A is not None:
        h = product(x, packs.A.t()).masked_fill_(foreign, 0)
        for columns, ranks, b in packs.parts:
            if not few.add_product(y[:, columns], h[:, ranks], b):
                y[:, columns].addmm_(h[:, ranks], b.t())
    if packs.out_scales is not None:
        y *= packs.out_scales[numbers]
    if packs.biases is not None:
        y += packs.biases[numbers]
    if bias is not None:
        y += bias.to(y.dtype) if packs.biases is None else bias.to(y.dtype) * (1 - packs.has_bias[numbers])
    return y
