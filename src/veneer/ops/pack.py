"""What adapters put on a projection group, as tensors: one `Pack` an adapter, and many of them side by side.

Decoding sends single rows of different adapters through one product. A loop would call a few small kernels for each row;
`Stacked` lays the A's of all adapters in use under each other and the B's side by side, so it is one shrink for all rows, the
ranks of foreign adapters set to zero, one expand per part. (Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285, do it with
gathers on GPUs; on a CPU the wasted products are cheaper than the gathers, as every byte of A and B is read once either way.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from veneer.ops.native import mixed
from veneer.types import Span

P = TypeVar("P")
Planner: TypeAlias = Callable[[Sequence["Pack"], tuple[Span, ...], torch.dtype], P | None]


@dataclass(frozen=True, eq=False)
class Pack:
    """What one adapter puts on one projection group.

    A          `[R, in]`, stacked over the group's parts; None without a low-rank update
    B          per part `[out_p, r_p]`, the scale folded in; the r_p sum to R, in the order of A's rows
    columns    the output columns of each B
    in_scale   `[in]`   x <- x * in_scale first
    out_scale  `[out]`  y <- y * out_scale after the product and the low-rank update, before the bias
    bias       `[out]`  the whole effective bias; None keeps the base's as it is
    """

    A: Tensor | None = None
    B: tuple[Tensor, ...] = ()
    columns: tuple[tuple[int, int], ...] = ()
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    bias: Tensor | None = None

    @cached_property
    def dtypes(self) -> frozenset[torch.dtype]:
        return frozenset(t.dtype for t in self.tensors() if t is not None)

    @cached_property
    def has_vectors(self) -> bool:
        """Whether it scales or has a bias."""
        return any(t is not None for t in (self.in_scale, self.out_scale, self.bias))

    @cached_property
    def factors(self) -> mixed.Factors | None:
        """The low-rank update as the kernel for few rows reads it, or None where it can't."""
        assert self.A is not None
        ranks = zip(self.B, self.ranks(), self.columns, strict=True)
        return mixed.factors((self.A[first:last], b, start) for b, (first, last), (start, _) in ranks)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.A, self.in_scale, self.out_scale, self.bias, *self.B)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Pack:
        """The same pack over other tensors, in the order of `tensors()`: cast copies, or gradients."""
        A, in_scale, out_scale, bias, *B = tensors
        return Pack(A, tuple(B), self.columns, in_scale, out_scale, bias)  # type: ignore[arg-type]

    def ranks(self) -> list[tuple[int, int]]:
        """The columns of x A^T that belong to each B."""
        stops = [sum(b.shape[1] for b in self.B[: i + 1]) for i in range(len(self.B))]
        return list(zip([0, *stops], stops, strict=False))


BARE = Pack()


class Packs(tuple[Pack, ...]):
    """Packs of a bank that stays for many steps: remembers how those last used were stacked.

    The tensors must not change while the bank is in use (training passes a plain list).
    """

    _last: tuple[tuple[int, ...], torch.dtype, Stacked] | None = None
    _plan: tuple[tuple[Span, ...], torch.dtype, Any] | None = None
    _rows: tuple[Stacked, tuple[Span, ...], tuple[Tensor, Tensor]] | None = None
    _placed: tuple[tuple[Span, ...], tuple[Span, ...]] | None = None

    def placed(self, spans: tuple[Span, ...], place: Callable[[Sequence[Span]], tuple[Span, ...]]) -> tuple[Span, ...]:
        """What `place` made of these very spans the last time: the layers of a pass ask with one and the same tuple."""
        if self._placed is None or self._placed[0] is not spans:
            found = place(spans)
            if self._placed is not None and self._placed[1] == found:
                found = self._placed[1]
            self._placed = (spans, found)
        return self._placed[1]

    def remembered(self, spans: tuple[Span, ...], dtype: torch.dtype, make: Planner[P]) -> P | None:
        """What `make` gave for these spans the last time they were asked for."""
        known = self._plan
        if known is None or (known[0] is not spans and known[0] != spans) or known[1] != dtype:
            self._plan = (spans, dtype, make(self, spans, dtype))
            known = self._plan
        found: P | None = known[2]
        return found

    def places(self, spans: tuple[Span, ...], used: tuple[int, ...], stacked: Stacked) -> tuple[Tensor, Tensor]:
        """`places_of`, remembered for the spans last asked for."""
        if self._rows is None or self._rows[0] is not stacked or self._rows[1] != spans:
            self._rows = (stacked, spans, places_of(spans, used, stacked))
        return self._rows[2]

    def stacked(self, used: tuple[int, ...], dtype: torch.dtype, in_features: int, out_features: int) -> Stacked:
        if self._last is None or self._last[:2] != (used, dtype):
            self._last = (used, dtype, stack([self[i] for i in used], dtype, in_features, out_features))
        return self._last[2]


@dataclass(frozen=True, eq=False)
class Stacked:
    """Several packs side by side. Row p of each table is pack p, the last row is the bare base.

    A          `[R, in]`: all ranks, part by part and within a part adapter by adapter
    owners     `[R]`: the pack of each rank
    parts      output columns, ranks, and all B's of the part `[out_p, ranks of the part]`
    in_scales  `[packs + 1, in]` or None, out_scales `[packs + 1, out]` or None
    biases     `[packs + 1, out]` or None; `has_bias` `[packs + 1, 1]` is 0 where the base's bias stays
    """

    A: Tensor | None
    owners: Tensor
    parts: tuple[tuple[slice, slice, Tensor], ...]
    in_scales: Tensor | None
    out_scales: Tensor | None
    biases: Tensor | None
    has_bias: Tensor


@torch.no_grad()
def stack(packs: Sequence[Pack], dtype: torch.dtype, in_features: int, out_features: int) -> Stacked:
    """Lay packs side by side, cast to `dtype`."""
    edges = sorted({edge for pack in packs for edge in pack.columns})
    A, owners, parts, first = [], [], [], 0
    for edge in edges:
        found = [(i, *entry) for i, pack in enumerate(packs) for entry in _entries(pack) if entry[0] == edge]
        ranks = [b.shape[1] for _, _, _, b in found]
        A += [a for _, _, a, _ in found]
        owners += [i for (i, *_), rank in zip(found, ranks, strict=True) for _ in range(rank)]
        B = torch.cat([b.to(dtype) for *_, b in found], dim=1)
        parts.append((slice(*edge), slice(first, first + sum(ranks)), B))
        first += sum(ranks)
    device = next((t.device for pack in packs for t in pack.tensors() if t is not None), None)
    return Stacked(
        A=torch.cat(A).to(dtype) if A else None,
        owners=torch.tensor(owners, device=device),
        parts=tuple(parts),
        in_scales=_table([p.in_scale for p in packs], in_features, 1.0, dtype),
        out_scales=_table([p.out_scale for p in packs], out_features, 1.0, dtype),
        biases=_table([p.bias for p in packs], out_features, 0.0, dtype),
        has_bias=torch.tensor([[float(p.bias is not None)] for p in (*packs, BARE)], dtype=dtype, device=device),
    )


def _entries(pack: Pack) -> Iterable[tuple[tuple[int, int], Tensor, Tensor]]:
    """Columns, A and B of each part."""
    if pack.A is not None:
        for edge, (first, last), b in zip(pack.columns, pack.ranks(), pack.B, strict=True):
            yield edge, pack.A[first:last], b


def _table(vectors: list[Tensor | None], width: int, neutral: float, dtype: torch.dtype) -> Tensor | None:
    given = [v for v in vectors if v is not None]
    if not given:
        return None
    plain = torch.full((width,), neutral, dtype=dtype, device=given[0].device)
    return torch.stack([plain if v is None else v.to(dtype) for v in (*vectors, None)])


def places_of(spans: Sequence[Span], used: Sequence[int], stacked: Stacked) -> tuple[Tensor, Tensor]:
    """For each row the place of its pack in `used` `[n]` (len(used): none), and which ranks are not its own `[n, R]`."""
    place = {index: i for i, index in enumerate(used)}
    device = stacked.owners.device
    numbers = torch.tensor([place.get(span.index, len(used)) for span in spans], device=device)
    lengths = torch.tensor([span.stop - span.start for span in spans], device=device)
    numbers = numbers.repeat_interleave(lengths)
    return numbers, numbers[:, None] != stacked.owners
