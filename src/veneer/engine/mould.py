"""The second adapter of a form goes from its file to its resident form in one pass over its numbers.

Most of what it takes to prepare an adapter does not depend on a number in it: which layer a part belongs to, whether it fits,
where it lies in the packed form. A plain low-rank adapter that was prepared leaves a mould: for each of its matrices the place,
the factor and the direction. Another of the same form is cast from it, the same to the bit.

The surprise: a mould is made from what `prepare` gave and is not a second way to know what a pack looks like.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.adapter import Adapter
from veneer.base.identity import compare
from veneer.engine.batch import Resident, prepare
from veneer.methods import method_of
from veneer.models.bank import Bank, Packed
from veneer.models.base import Base
from veneer.ops.native.cast import Cast, Casts
from veneer.ops.native.mixed import Factors
from veneer.ops.pack import Pack, Packs
from veneer.registry import Latest

MOST = 64
"""Moulds that are kept."""


@dataclass(frozen=True)
class _View:
    """A matrix in the room of an adapter."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    place: int

    @staticmethod
    def of(tensor: Tensor) -> _View:
        return _View(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def on(self, room: Tensor) -> Tensor:
        return room.as_strided(self.shape, self.strides, self.place)


@dataclass(frozen=True, eq=False)
class _Packing:
    """The pack of one projection group: where its tensors lie, and its factors as if the room began at address 0."""

    group: str
    A: _View
    B: tuple[_View, ...]
    columns: tuple[tuple[int, int], ...]
    factors: Factors | None

    def on(self, room: Tensor) -> Packed:
        pack = Pack(self.A.on(room), tuple(view.on(room) for view in self.B), self.columns)
        vars(pack)["factors"] = None if self.factors is None else self.factors.moved(room.data_ptr(), (room,))
        return Packed(Packs((pack,)), (0,))


@dataclass(frozen=True, eq=False)
class Mould:
    """How adapters of one form become resident.

    size      elements of an adapter's room, filled by `casts` from the tensors that `sources` names (part, name)
    packings  of every projection group that has a pack
    bank      everything that has no numbers
    dtype     of the room: the decoder's
    """

    size: int
    sources: tuple[tuple[int, str], ...]
    casts: Casts
    packings: tuple[_Packing, ...]
    bank: Bank
    dtype: torch.dtype

    def cast(self, adapter: Adapter) -> Resident | None:
        """The resident form of an adapter of this form; None where `prepare` has to say what is wrong with it."""
        tensors = [adapter.parts[at].tensors[name] for at, name in self.sources]
        if not all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors):
            return None
        room = torch.empty(self.size, dtype=self.dtype)
        if not self.casts.into(room, tensors):
            return None
        groups = {packing.group: packing.on(room) for packing in self.packings}
        return Resident(replace(self.bank, groups=groups), adapter.digest, None, room.nbytes)


def mould_of(adapter: Adapter, resident: Resident, base: Base) -> Mould | None:
    """The mould of the adapter that `resident` was prepared from, or None where it has more to it than plain factors."""
    bank, decoder = resident.bank, base.decoder
    plain = {p.target: (at, method_of(adapter, p).plain_scale(p)) for at, p in enumerate(adapter.parts)}
    numbers = sum(1 for packed in bank.groups.values() for pack in packed.packs for _ in (pack.A, *pack.B))
    if decoder.device.type != "cpu" or any(scale is None for _, scale in plain.values()):
        return None
    if bank.split or len(plain) != len(adapter.parts) or numbers != len(list(bank.tensors())):
        return None
    sources: list[tuple[int, str]] = []
    casts: list[Cast] = []
    packings: list[_Packing] = []
    size = 0
    for name, packed in bank.groups.items():
        (pack,), columns = packed.packs, {part.start: part.path for part in decoder.groups[name].parts}
        assert pack.A is not None
        for (first, last), b, (start, _) in zip(pack.ranks(), pack.B, pack.columns, strict=True):
            at, scale = plain[columns[start]]
            a, tensors = pack.A[first:last], adapter.parts[at].tensors
            assert scale is not None
            casts.append(Cast(a.shape[0], a.shape[1], tensors["A"].dtype, int(a.storage_offset())))
            casts.append(Cast(b.shape[0], b.shape[1], tensors["B"].dtype, int(b.storage_offset()), scale, turned=True))
            sources += [(at, "A"), (at, "B")]
        room = pack.A.untyped_storage()
        size = room.nbytes() // decoder.dtype.itemsize
        factors = None if pack.factors is None else pack.factors.moved(-room.data_ptr(), ())
        packings.append(_Packing(name, _View.of(pack.A), tuple(_View.of(b) for b in pack.B), pack.columns, factors))
    return Mould(size, tuple(sources), Casts(casts), tuple(packings), replace(bank, groups={}), decoder.dtype)


class Moulds:
    """Prepares adapters for one base, those of a known form by its mould. For the thread that loads."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._known: Latest[Hashable, Mould | None] = Latest(MOST)

    def prepared(self, adapter: Adapter, *, allow: str | None) -> Resident:
        """`compare` and `prepare`; one of a form that was prepared before is known to fit."""
        mould = self._known.get(adapter.form)
        compare(adapter, self._base, allow=allow, fits=mould is not None)
        resident = None if mould is None else mould.cast(adapter)
        if resident is None:
            resident = prepare([(adapter, 1.0)], self._base)
            self._known[adapter.form] = mould_of(adapter, resident, self._base)
        return resident
