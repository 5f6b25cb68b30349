"""One projection group applied to packed rows, with whatever each row's adapter does to it.

Three ways, from common to rare: the fused product with packed low-rank updates and scales; part by part, where a part scales its
own input; span by span, where an adapter replaces the weight itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.errors import Unsupported
from veneer.models.bank import Bank, Packed, one_of
from veneer.models.config import PartSpec
from veneer.models.group import Group
from veneer.ops.gated import activate
from veneer.ops.low_rank import Pack, adapted_linear
from veneer.ops.pack import Packs
from veneer.types import Bottleneck, Override, Span, Sublayer


def project(group: Group, x: Tensor, spans: Sequence[Span], bank: Bank, shared: str | None = None) -> Tensor:
    """The group's output `[N, out]`. `shared` names a tensor that the group reads too (a tied head's embedding)."""
    if is_overridden(group, spans, bank, shared):
        return _part_by_part(group, x, spans, bank, shared)
    if group.name in bank.split:
        return torch.cat([_fused(single, x, spans, bank) for single in group.split()], dim=1)
    return _fused(group, x, spans, bank)


def is_overridden(group: Group, spans: Sequence[Span], bank: Bank, shared: str | None = None) -> bool:
    """Whether any row's adapter replaces a weight or bias of this group."""
    if not any(bank.overrides):
        return False
    names = [f"{part.path}.{kind}" for part in group.parts for kind in ("weight", "bias")]
    names += [shared] if shared else []
    return any(s.index >= 0 and any(n in bank.overrides[s.index] for n in names) for s in spans)


def packs_of(packed: Packed | None, spans: Sequence[Span]) -> tuple[tuple[Pack, ...], tuple[Span, ...]]:
    """The packs of one group, and the spans with indices into them; neighbours alike become one span."""
    if packed is None:
        return (), (Span(spans[0].start, spans[-1].stop, -1),) if spans else ()
    if packed.is_whole and isinstance(spans, tuple):
        return packed.packs, spans
    if isinstance(packed.packs, Packs) and isinstance(spans, tuple):
        return packed.packs, packed.packs.placed(spans, lambda these: _placed(packed, these))
    return packed.packs, _placed(packed, spans)


def _placed(packed: Packed, spans: Sequence[Span]) -> tuple[Span, ...]:
    own: list[Span] = []
    for span in spans:
        index = packed.slot[span.index] if span.index >= 0 else -1
        if own and own[-1].index == index:
            own[-1] = Span(own[-1].start, span.stop, index)
        else:
            own.append(Span(span.start, span.stop, index))
    return tuple(own)


def spans_at(spans: Sequence[Span], rows: Tensor) -> tuple[Span, ...]:
    """The spans of the chosen, sorted rows, counted among the chosen."""
    if not spans:
        return ()
    if len(rows) == spans[-1].stop and isinstance(spans, tuple):
        return spans  # all of them
    edges = torch.tensor([s.start for s in spans] + [spans[-1].stop], device=rows.device)
    cuts: list[int] = torch.searchsorted(rows, edges).tolist()
    return one_of(tuple(Span(a, b, s.index) for a, b, s in zip(cuts[:-1], cuts[1:], spans, strict=True) if b > a))


def with_bottlenecks(
    out: Tensor, source: Tensor, place: tuple[int, Sublayer], spans: Sequence[Span], bank: Bank
) -> Tensor:
    """A sublayer's output `[N, hidden]` after its rows' bottleneck adapters; `source` is the sublayer's input."""
    if not any(bank.sublayers):
        return out
    pieces: list[Tensor] = []
    for span in spans:
        piece, rows = out[span.start : span.stop], source[span.start : span.stop]
        for bottleneck in bank.sublayers[span.index].get(place, ()) if span.index >= 0 else ():
            piece = apply_bottleneck(piece, rows, bottleneck)
        pieces.append(piece)
    return torch.cat(pieces)


def apply_bottleneck(out: Tensor, source: Tensor, b: Bottleneck) -> Tensor:
    """out + scale * (f(s D^T + d) U^T + u), s the output itself or, in parallel, the sublayer's input."""
    x = source if b.parallel else out
    inner = activate(F.linear(x, b.down.to(x.dtype), b.down_bias.to(x.dtype)), b.activation)
    return out + b.scale * F.linear(inner, b.up.to(x.dtype), b.up_bias.to(x.dtype))


def replace_rows(x: Tensor, ids: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x `[N, hidden]` with the rows whose id is in `rows` taken from `values`."""
    hit = ids[:, None] == rows[None, :]
    chosen = values.to(x.dtype)[hit.int().argmax(dim=1)]
    return torch.where(hit.any(dim=1, keepdim=True), chosen, x)


def _fused(group: Group, x: Tensor, spans: Sequence[Span], bank: Bank) -> Tensor:
    packs, own = packs_of(bank.groups.get(group.name), spans)
    if bank.dropout and packs:
        return _with_dropout(group, x, packs, own, bank)
    return adapted_linear(x, group.frozen, group.bias, packs, own)


def _part_by_part(group: Group, x: Tensor, spans: Sequence[Span], bank: Bank, shared: str | None) -> Tensor:
    columns = []
    for part, single in zip(group.parts, group.split(), strict=True):
        pieces = [_span_of_part(part, single, x, span, bank, shared) for span in spans]
        columns.append(torch.cat(pieces))
    return torch.cat(columns, dim=1)


def _span_of_part(part: PartSpec, single: Group, x: Tensor, span: Span, bank: Bank, shared: str | None) -> Tensor:
    """Rows of one span through one part, with the weight or bias that the span's adapter brings.

    A replaced bias is added last, outside the fused product: that one has no gradient for the base's bias.
    """
    rows = x[span.start : span.stop]
    own = bank.overrides[span.index] if span.index >= 0 else {}
    weight = own.get(f"{part.path}.weight") or (own.get(shared) if shared else None)
    bias = own.get(f"{part.path}.bias")
    packs = _packs_at(bank, single.name, span.index)
    if bias is not None and any(pack.bias is not None for pack in packs):
        raise Unsupported(
            f"the bias of '{part.path}' is replaced and changed by one adapter", help="leave one of them out"
        )
    if weight is not None:
        total = single.bias if bias is None else bias.value
        y = _replaced_weight(weight, single, rows)
        for pack in packs:
            if any(t is not None for t in (pack.in_scale, pack.out_scale, pack.bias)):
                raise Unsupported(
                    f"'{part.path}' is replaced and scaled by one adapter; only a low-rank update can follow"
                )
            y = y + _low_rank(pack, _dropped(rows, bank), single.out_features)
        return y if total is None else y + total.to(x.dtype)
    alone = Bank(size=1, groups={single.name: Packed(packs, (0,))}, dropout=bank.dropout)
    local = (Span(0, rows.shape[0], 0 if packs else -1),)
    if bias is None:
        return _fused(single, rows, local, alone)
    return _fused(replace(single, bias=None), rows, local, alone) + bias.value.to(x.dtype)


def _replaced_weight(weight: Override, single: Group, x: Tensor) -> Tensor:
    """x W^T with the whole weight replaced, or the rows that `weight.rows` names."""
    stored = weight.value.to(x.dtype)
    own = x @ (stored if single.transposed else stored.t())
    if weight.rows is None:
        return own
    return adapted_linear(x, single.frozen, None, (), (Span(0, x.shape[0], -1),)).index_copy(1, weight.rows, own)


def _packs_at(bank: Bank, name: str, adapter: int) -> tuple[Pack, ...]:
    packed = bank.groups.get(name)
    if packed is None or adapter < 0 or packed.slot[adapter] < 0:
        return ()
    return (packed.packs[packed.slot[adapter]],)


def _with_dropout(group: Group, x: Tensor, packs: Sequence[Pack], spans: Sequence[Span], bank: Bank) -> Tensor:
    """Base product plus low-rank updates of a dropped-out input d(x): the definition, with one mask per group.

    DoRA's whole change is of the dropped-out input, as in PEFT: x W^T + (m/c - 1) d(x) W^T + m/c d(x) A^T B^T.
    """
    assert bank.dropout is not None
    if any(p.in_scale is not None for p in packs):
        raise Unsupported("dropout is for low-rank updates; this adapter scales its input", help="set dropout: 0")
    dropped = _dropped(x, bank)
    outputs = []
    for span in spans:
        rows, index = x[span.start : span.stop], span.index
        plain = Pack(bias=packs[index].bias) if index >= 0 else Pack()
        y = adapted_linear(rows, group.frozen, group.bias, (plain,), (Span(0, rows.shape[0], 0),))
        if index >= 0:
            own, scale = dropped[span.start : span.stop], packs[index].out_scale
            update = _low_rank(packs[index], own, group.out_features)
            if scale is not None:
                again = adapted_linear(own, group.frozen, None, (), (Span(0, own.shape[0], -1),))
                update = (scale - 1).to(y.dtype) * again + scale.to(y.dtype) * update
            y = y + update
        outputs.append(y)
    return torch.cat(outputs)


def _dropped(x: Tensor, bank: Bank) -> Tensor:
    """x with the bank's dropout on it; x itself without."""
    if bank.dropout is None:
        return x
    keep = 1.0 - bank.dropout.rate
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(keep, generator=bank.dropout.generator)
    return x * (mask / keep)


def _low_rank(pack: Pack, x: Tensor, out_features: int) -> Tensor:
    """The pack's low-rank update alone, `[n, out_features]`; 0 without one."""
    if pack.A is None:
        return x.new_zeros(x.shape[0], out_features)
    shrunk = x @ pack.A.to(x.dtype).t()
    y = torch.zeros(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    rank = 0
    for b, (start, stop) in zip(pack.B, pack.columns, strict=True):
        width = b.shape[1]
        y = y + F.pad(shrunk[:, rank : rank + width] @ b.to(x.dtype).t(), (start, out_features - stop))
        rank += width
    return y
