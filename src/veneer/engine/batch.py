"""Adapters in their resident form, and the bank of one step.

An adapter is lowered, checked and packed once, on a worker thread, in the dtype that the decoder computes in. A step's
bank is then a matter of putting references side by side: nothing is copied when a sequence with another adapter joins.

The surprise: a part that scales its own input (IA3) splits its group for the whole step, so every other adapter of
that step needs its packs in parts too. They are slices of the packed ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.adapter import Adapter, HostSource
from veneer.errors import FormatError, Unsupported, VeneerError, listed
from veneer.methods import lower
from veneer.models.bank import Bank, Packed, compose
from veneer.models.base import Base
from veneer.models.decoder import Decoder
from veneer.models.group import Group
from veneer.ops.finite import is_finite
from veneer.ops.pack import Pack, Packs
from veneer.types import Bias, InScale, Lowered, LowRank, OutScale, Primitive


@dataclass(frozen=True, eq=False)
class Resident:
    """One adapter (or one weighted sum of adapters) ready to run.

    bank        its packs, alone in a bank
    digest      what answered: the content digest, or those of the sum
    invocation  token ids that switch it on, or None for always on
    bytes       what it takes in memory
    finite      every number is one
    """

    bank: Bank
    digest: str
    invocation: tuple[int, ...] | None
    bytes: int
    finite: bool = True

    @property
    def virtual(self) -> int:
        """Rows it puts before a prompt."""
        return self.bank.virtual_tokens(0)


def prepare(parts: Sequence[tuple[Adapter, float]], base: Base) -> Resident:
    """Check, lower and pack adapters with their factors for this base. Every problem found is in the one error."""
    digest = "+".join(a.digest if f == 1.0 else f"{a.digest}*{f:g}" for a, f in parts)
    with torch.no_grad():
        resident = resident_of(lowered_for(parts, base), base, digest)
    if not resident.finite:
        for adapter, _ in parts:
            check(adapter)
        raise FormatError(
            f"this adapter's values are too large for {str(base.decoder.dtype).removeprefix('torch.')}",
            help="serve the base with --dtype float32, or scale the adapter down",
        )
    return resident


def lowered_for(parts: Sequence[tuple[Adapter, float]], base: Base) -> Lowered:
    """Adapters with their factors as primitives that fit this base."""
    lowered = compose([_weighted(adapter, factor, base) for adapter, factor in parts])
    _check_shapes(lowered, base)
    _check_prefix(lowered, base.decoder)
    return lowered


def resident_of(lowered: Lowered, base: Base, digest: str) -> Resident:
    """Primitives in the dtype and layout that steps read."""
    bank, room = _in_one_piece(base.bank([lowered]), base.decoder)
    return Resident(bank, digest, lowered.invocation, room.nbytes, is_finite(room))


def _in_one_piece(bank: Bank, decoder: Decoder) -> tuple[Bank, Tensor]:
    """The same bank and its numbers, every tensor copied into one allocation in the decoder's dtype.

    So that nothing keeps the file mapped that it was read from, and memory is given back whole when the adapter goes. Every B is
    stored rank by rank, which is how the kernel for decoding reads it.
    """
    tensors = {id(tensor): tensor for tensor in bank.tensors()}  # one that several groups share is shared in here, too
    by_rank = {id(b) for packed in bank.groups.values() for pack in packed.packs for b in pack.B}
    step = 64 // decoder.dtype.itemsize  # elements of a cache line
    sizes = [-(-t.numel() // step) * step for t in tensors.values()]
    room = torch.zeros(sum(sizes), dtype=decoder.dtype, device=decoder.device)
    places: dict[int, Tensor] = {}
    for (key, tensor), part in zip(tensors.items(), room.split(sizes), strict=True):
        flat = part[: tensor.numel()]
        places[key] = flat.view(tensor.shape[1], -1).t() if key in by_rank else flat.view(tensor.shape)
        places[key].copy_(tensor.detach())
    moved = bank.map_tensors(lambda tensor: places[id(tensor)])
    groups = {name: replace(packed, packs=Packs(packed.packs)) for name, packed in moved.groups.items()}
    return replace(moved, groups=groups), room


def check(adapter: Adapter) -> None:
    """Refuse numbers that would spread: anything not finite."""
    problems = [
        f"{name} at {part.target or 'the model'} holds values that are not finite"
        for part in adapter.parts
        for name, tensor in part.tensors.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if problems:
        raise FormatError(
            f"this adapter can't be run:\n{listed(problems)}", help="its training diverged, or the file is damaged"
        )


def _weighted(adapter: Adapter, factor: float, base: HostSource) -> Lowered:
    """The adapter at `factor` times its scale.

    Where the method has none, a negative factor needs a plain low-rank update.
    """
    if factor > 0:
        return lower(adapter if factor == 1.0 else adapter.scaled(factor), base, digest=adapter.digest)
    lowered = lower(adapter, base, digest=adapter.digest)
    others = {type(p).__name__ for ps in lowered.weights.values() for p in ps} - {"LowRank"}
    if others or lowered.tokens or lowered.kv or lowered.sublayers or lowered.overrides:
        raise Unsupported(
            f"{adapter.spec.kind} can't be subtracted: it does more than add a low-rank update",
            help="use a positive scale",
        )
    weights = {t: tuple(_times(p, factor) for p in ps) for t, ps in lowered.weights.items()}
    return replace(lowered, weights=weights)


def _times(primitive: Primitive, factor: float) -> Primitive:
    assert isinstance(primitive, LowRank)
    return LowRank(primitive.A, primitive.B * factor)


def _check_shapes(lowered: Lowered, base: HostSource) -> None:
    problems = []
    for target, primitives in lowered.weights.items():
        try:
            shape = base.host(target).shape
        except VeneerError as error:
            problems.append(f"{target}: {error.message}")
            continue
        for primitive in primitives:
            problems += [f"{target}: {p}" for p in _misfit(primitive, shape.in_features, shape.out_features)]
    if problems:
        raise FormatError(
            f"this adapter does not fit the base:\n{listed(problems)}", help="was it made for another base?"
        )


def _misfit(primitive: Primitive, wide: int, out: int) -> Iterator[str]:
    if isinstance(primitive, LowRank):
        a, b = tuple(primitive.A.shape), tuple(primitive.B.shape)
        if len(a) != 2 or len(b) != 2 or a[1] != wide or b[0] != out or a[0] != b[1]:
            yield f"A is {a} and B {b}; this layer takes A [rank, {wide}] and B [{out}, rank]"
    elif isinstance(primitive, InScale | OutScale | Bias):
        expected = wide if isinstance(primitive, InScale) else out
        if tuple(primitive.vector.shape) != (expected,):
            yield f"the vector is {tuple(primitive.vector.shape)}; this layer takes ({expected},)"


def _check_prefix(lowered: Lowered, decoder: Decoder) -> None:
    config = decoder.config
    problems = []
    if lowered.tokens is not None and lowered.tokens.rows.shape[-1] != config.hidden:
        problems.append(f"prompt rows are {tuple(lowered.tokens.rows.shape)}; this base takes [rows, {config.hidden}]")
    if lowered.kv and sorted(lowered.kv) != list(range(config.layers)):
        problems.append(f"it has a prefix for {len(lowered.kv)} layers; this base has {config.layers}")
    rows = {kv.key.shape[0] for kv in lowered.kv.values()}
    if len(rows) > 1:
        problems.append(f"its prefixes have different lengths: {sorted(rows)}")
    place = (config.kv_heads, config.head_dim)
    for layer, kv in lowered.kv.items():
        if tuple(kv.key.shape[1:]) != place or kv.key.shape != kv.value.shape:
            problems.append(
                f"the prefix of layer {layer} is {tuple(kv.key.shape)}; this base takes [rows, {place[0]}, {place[1]}]"
            )
    if problems:
        raise FormatError(
            f"this adapter does not fit the base:\n{listed(problems)}", help="was it made for another base?"
        )


def join(residents: Sequence[Resident], groups: Mapping[str, Group]) -> Bank:
    """The bank of a step: entry i is `residents[i]`."""
    banks = [resident.bank for resident in residents]
    if len(banks) == 1:
        return banks[0]
    split = frozenset().union(*(bank.split for bank in banks)) | _replaced(banks, groups)
    whole = {name for bank in banks for name in bank.groups if name in groups} - split
    packed = {name: _side_by_side([_pack_of(bank, name) for bank in banks]) for name in sorted(whole)}
    for name in sorted(split):
        for single in groups[name].split():
            packs = [_part_pack(bank, groups[name], single) for bank in banks]
            packed[single.name] = _side_by_side(packs)
    return Bank(
        size=len(banks),
        groups=packed,
        split=split,
        sublayers=tuple(s for bank in banks for s in bank.sublayers),
        tokens=tuple(t for bank in banks for t in bank.tokens),
        kv=tuple(kv for bank in banks for kv in bank.kv),
        overrides=tuple(o for bank in banks for o in bank.overrides),
        embedding=tuple(e for bank in banks for e in bank.embedding),
        invocations=tuple(i for bank in banks for i in bank.invocations),
    )


def _replaced(banks: Sequence[Bank], groups: Mapping[str, Group]) -> frozenset[str]:
    """Groups of several parts of which an adapter replaces one: they run part by part, also for the other adapters."""
    names = {name.rpartition(".")[0] for bank in banks for own in bank.overrides for name in own}
    return frozenset(g.name for g in groups.values() if len(g.parts) > 1 and any(p.path in names for p in g.parts))


def _pack_of(bank: Bank, name: str) -> Pack | None:
    packed = bank.groups.get(name)
    return packed.packs[packed.slot[0]] if packed is not None and packed.slot[0] >= 0 else None


def _part_pack(bank: Bank, group: Group, single: Group) -> Pack | None:
    if group.name in bank.split:
        return _pack_of(bank, single.name)
    pack = _pack_of(bank, group.name)
    if pack is None:
        return None
    place = next(part for part in group.parts if part.path == single.parts[0].path)
    return _slice(pack, place.start, place.stop)


def _slice(pack: Pack, start: int, stop: int) -> Pack:
    """The pack of one part of a group, from that of the group."""
    rank, a, b = 0, None, None
    for factor, columns in zip(pack.B, pack.columns, strict=True):
        if columns == (start, stop):
            assert pack.A is not None
            a, b = pack.A[rank : rank + factor.shape[1]], factor
        rank += factor.shape[1]
    return Pack(
        A=a,
        B=() if b is None else (b,),
        columns=() if b is None else ((0, stop - start),),
        in_scale=pack.in_scale,
        out_scale=None if pack.out_scale is None else pack.out_scale[start:stop],
        bias=None if pack.bias is None else pack.bias[start:stop],
    )


def _side_by_side(packs: Sequence[Pack | None]) -> Packed:
    kept = Packs(pack for pack in packs if pack is not None)
    slots, taken = [], 0
    for pack in packs:
        slots.append(-1 if pack is None else taken)
        taken += pack is not None
    return Packed(kept, tuple(slots))
