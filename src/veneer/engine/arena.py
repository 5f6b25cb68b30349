"""Where keys and values live: one buffer per sequence, `[layers, 2, positions, kv_heads, head_dim]`.

Reading a prompt in chunks and copying a prefix are plain slices. Where there is a kernel that finds each row's keys by itself
(`in_place`), a sequence decodes in its buffer. Elsewhere it takes a seat in a table of sequences of about its length,
`[layers, 2, seats, positions, kv_heads, head_dim]`, when it starts to decode: all of a table attend in one call, with no
gathering and little padding. Seats are kept without holes; a sequence that outgrows its table moves to the next size.

The surprise: a seat is not a clean one, new or freed. What lies beyond a sequence's length is masked, but 0 * NaN is NaN, so
the rest of a seat is zeroed when somebody sits down: no other sequence, broken or not, can be seen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.models.state import Run
from veneer.ops.attention import attention, attention_over, decode_attention
from veneer.ops.native.few import InPlace, Place, Runs

_SPARE = 1 << 26
"""Bytes of free buffers that are kept: the kernel would clear each page of a new one."""
_GROWN = 1024
"""Positions up to which a buffer is made as large as its sequence may become: moving all keys and values at once holds up a step,
and pages that nobody has written to take no memory."""


def capacity(positions: int) -> int:
    """The size of buffer for so many positions: 64, 96, 128, 192, 256, 384, ...

    >>> capacity(1), capacity(65), capacity(97), capacity(1000)
    (64, 96, 128, 1024)
    """
    size = 64
    while size < positions:
        if size + size // 2 >= positions:
            return size + size // 2
        size *= 2
    return size


def whole_capacity(positions: int) -> int:
    """The largest size of buffer that is no larger than `positions`; 0 if there is none.

    >>> whole_capacity(100), whole_capacity(20)
    (96, 0)
    """
    size = 0
    while (larger := capacity(size + 1)) <= positions:
        size = larger
    return size


class Table:
    """Seats of one size. Seats `0 .. len(ids) - 1` are taken."""

    def __init__(self, store: Tensor) -> None:
        self.store = store
        self.ids: list[int] = []

    def sit(self, id: int, contents: Tensor) -> None:
        """Take the next seat for `contents` `[layers, 2, n, kv_heads, head_dim]`."""
        seats, seat = self.store.shape[2], len(self.ids)
        if seat == seats:
            wider = self.store.new_empty(*self.store.shape[:2], seats + min(seats, 8), *self.store.shape[3:])
            wider[:, :, :seats] = self.store
            self.store = wider
        length = contents.shape[2]
        self.store[:, :, seat, :length] = contents
        self.store[:, :, seat, length:] = 0
        self.ids.append(id)

    def leave(self, id: int) -> None:
        """Free a seat; the last one moves into it."""
        seat, last = self.ids.index(id), len(self.ids) - 1
        if seat != last:
            self.store[:, :, seat] = self.store[:, :, last]
            self.ids[seat] = self.ids[last]
        self.ids.pop()


@dataclass(frozen=True, eq=False)
class _Seated:
    """Rows of one call that decode in one table: their rows, seats and lengths, in seat order.

    whole     all of the table's sequences
    straight  and rows 0, 1, 2, ... of the call in this order
    """

    table: Table
    rows: Tensor
    seats: Tensor
    places: Tensor
    lengths: list[int]
    longest: int
    whole: bool
    straight: bool


@dataclass(frozen=True, eq=False)
class _Plan:
    """How the rows of a call attend.

    placed  rows that read one token each where their sequences lie
    stored  the rows of `alone`, where a kernel stores them all
    seated  rows that decode, by table
    alone   other runs, with what their sequences have stored: keys and values go there
    fresh   rows of neighbours among those that see nothing older than themselves, and the lengths of their runs
    """

    runs: tuple[Run, ...]
    placed: InPlace | None
    stored: Runs | None
    seated: tuple[_Seated, ...]
    alone: tuple[_Alone, ...]
    fresh: tuple[tuple[slice, list[int]], ...]


@dataclass(frozen=True, eq=False)
class _Alone:
    """A run from row `row` on.

    stored  of each layer: its sequence's keys and values up to its end
    own     and the places for its own, where no kernel stores them
    """

    row: int
    run: Run
    stored: tuple[tuple[Tensor, ...], ...]
    own: tuple[tuple[Tensor, ...], ...]


class Arena:
    """Keys and values of all sequences; the decoder's cache.

    in_place  sequences decode in their buffers: `few.decodes` said that the kernel can
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        in_place: bool = False,
    ) -> None:
        self._shape = (layers, 2, kv_heads, head_dim)
        self._dtype, self._device = dtype, device
        self._in_place = in_place
        self._buffers: dict[int, Tensor] = {}
        self._tables: dict[int, Table] = {}
        self._seat_of: dict[int, Table] = {}
        self._spare: dict[int, list[Tensor]] = {}
        self._plan: _Plan | None = None

    @property
    def position_bytes(self) -> int:
        """Bytes of one position over all layers."""
        layers, two, heads, dim = self._shape
        return layers * two * heads * dim * self._dtype.itemsize

    @property
    def allocated(self) -> int:
        """Bytes held now, spare buffers and free seats included."""
        tensors: list[Tensor] = [*self._buffers.values(), *(t.store for t in self._tables.values())]
        tensors += [b for spare in self._spare.values() for b in spare]
        return sum(t.nbytes for t in tensors)

    def open(self, id: int, positions: int, most: int = 0) -> None:
        """A buffer for a new sequence of `positions` before it decodes.

        `most` is how long it may become: all but a long answer gets room that it will not outgrow.
        """
        roomy = max(_roomy(positions, most), min(most, _GROWN)) if self._in_place else positions
        self._buffers[id] = self._take(capacity(roomy))

    def reserve(self, id: int, positions: int) -> None:
        """Make sure that `positions` fit, before a forward that writes up to there."""
        table = self._seat_of.get(id)
        held = self._buffers[id] if table is None else table.store[:, :, 0]
        if held.shape[2] >= positions:
            return
        if table is None:
            self._buffers[id] = self._take(capacity(positions))
            self._buffers[id][:, :, : held.shape[2]] = held
            self._give(held)
        else:
            contents = self._view(id).clone()
            self._stand(id)
            self._sit(id, contents, positions)

    def copy(self, source: int, target: int, positions: int) -> None:
        """Start `target` with the first positions of `source`."""
        self._buffers[target][:, :, :positions] = self._view(source)[:, :, :positions]

    def seat(self, id: int, stored: int, most: int = 0) -> None:
        """The sequence decodes from now on: from its buffer to a seat, where seats are used. Sitting down twice is once."""
        if self._in_place or id in self._seat_of:
            return
        buffer = self._buffers.pop(id)
        self._sit(id, buffer[:, :, :stored], max(stored + 1, _roomy(stored, most)))
        self._give(buffer)

    def remains(self, id: int, positions: int) -> int:
        """Positions that a sequence of so many would take if it were kept: a buffer that is not half empty stays as it is."""
        held = self._buffers.get(id)
        return positions if held is None or 2 * held.shape[2] > 3 * positions else held.shape[2]

    def keep(self, id: int, positions: int) -> None:
        """The sequence has ended; what it stored stays, in a buffer of the size that `remains` says."""
        if self.remains(id, positions) == positions:
            contents = self._view(id)[:, :, :positions].clone()
            self.close(id)
            self._buffers[id] = contents

    def close(self, id: int) -> None:
        """Free all that `id` holds."""
        if id in self._seat_of:
            self._stand(id)
        else:
            self._give(self._buffers.pop(id))

    def close_all(self, ids: Iterable[int]) -> None:
        for id in ids:
            self.close(id)

    # -- the decoder's cache protocol ----------------------------------------------------------------------------------

    def put_prefix(self, layer: int, sequence: int, key: Tensor, value: Tensor) -> None:
        """Keys and values `[p, kv_heads, head_dim]` at position 0."""
        self._buffers[sequence][layer, 0, : len(key)] = key
        self._buffers[sequence][layer, 1, : len(value)] = value

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        runs: Sequence[Run],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Store the rows of each run and attend over everything its sequence has stored."""
        plan = self._planned(runs)
        if not plan.alone and len(plan.seated) == 1 and plan.seated[0].straight:
            group = plan.seated[0]
            keys, values = _store(group, layer, k, v)
            return decode_attention(q, keys, values, group.lengths, scale=scale, window=window, softcap=softcap)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if plan.placed is not None:
            plan.placed.attend(layer, q, k, v, out, scale=scale, window=window)
        for group in plan.seated:
            keys, values = _store(group, layer, k[group.rows], v[group.rows])
            out[group.rows] = decode_attention(
                q[group.rows], keys, values, group.lengths, scale=scale, window=window, softcap=softcap
            )
        if plan.stored is not None:
            plan.stored.store(layer, k, v)
        for alone in plan.alone:
            rows = slice(alone.row, alone.row + alone.run.length)
            if plan.stored is None:
                keys, values = alone.own[layer]
                keys.copy_(k[rows])
                values.copy_(v[rows])
            if alone.run.start:
                keys, values = alone.stored[layer]
                out[rows] = attention_over(q[rows], keys, values, scale=scale, window=window, softcap=softcap)
        for rows, lengths in plan.fresh:
            found = attention(q[rows], k[rows], v[rows], lengths, scale=scale, window=window, softcap=softcap)
            if len(found) == len(q):
                return found
            out[rows] = found
        return out

    def places(self, runs: Sequence[Run]) -> ctypes.Array[Place] | None:
        """Where each row of runs of one token is kept; None where a run is longer."""
        if any(run.length != 1 for run in runs):
            return None
        return (Place * len(runs))(*(self._place(run) for run in runs))

    def _place(self, run: Run) -> Place:
        view = self._view(run.sequence)
        layer, value, position, *_ = view.stride()
        return Place(view.data_ptr(), layer, value, position, run.start)

    def _planned(self, runs: Sequence[Run]) -> _Plan:
        """Which rows attend together: the same for every layer of a pass."""
        if self._plan is not None and self._plan.runs == tuple(runs):
            return self._plan
        placed: list[tuple[int, Run]] = []
        alone: list[_Alone] = []
        members: dict[int, list[tuple[int, int, Run]]] = {}
        tables: dict[int, Table] = {}
        row = 0
        for run in runs:
            table = self._seat_of.get(run.sequence)
            if self._in_place and run.length == 1:
                placed.append((row, run))
            elif table is None or run.length > 1:
                alone.append(self._alone(row, run))
            else:
                tables[id(table)] = table
                members.setdefault(id(table), []).append((table.ids.index(run.sequence), row, run))
            row += run.length
        seated = tuple(self._group(tables[key], found) for key, found in members.items())
        stored = self._runs(alone) if self._in_place and alone else None
        self._plan = _Plan(tuple(runs), self._placed(placed), stored, seated, tuple(alone), tuple(_fresh(alone)))
        return self._plan

    def _placed(self, found: Sequence[tuple[int, Run]]) -> InPlace | None:
        rows = (ctypes.c_int64 * len(found))(*(row for row, _ in found))
        return InPlace(rows, (Place * len(found))(*(self._place(run) for _, run in found))) if found else None

    def _runs(self, found: Sequence[_Alone]) -> Runs:
        rows = [number for alone in found for number in (alone.row, alone.run.length)]
        return Runs(
            (ctypes.c_int64 * len(rows))(*rows), (Place * len(found))(*(self._place(alone.run) for alone in found))
        )

    def _alone(self, row: int, run: Run) -> _Alone:
        buffer, end = self._view(run.sequence), run.start + run.length
        stored = tuple(layer.unbind(0) for layer in buffer[:, :, :end].unbind(0)) if run.start else ()
        fresh = () if self._in_place else buffer[:, :, run.start : end].unbind(0)
        own = tuple(layer.unbind(0) for layer in fresh)
        return _Alone(row, run, stored, own)

    def _group(self, table: Table, found: list[tuple[int, int, Run]]) -> _Seated:
        found.sort(key=lambda member: member[0])
        whole = len(found) == len(table.ids)
        total = max(row for _, row, _ in found) + 1
        return _Seated(
            table,
            rows=torch.tensor([row for _, row, _ in found], device=self._device),
            seats=torch.tensor([seat for seat, _, _ in found], device=self._device),
            places=torch.tensor([run.start for _, _, run in found], device=self._device),
            lengths=[run.start + 1 for _, _, run in found],
            longest=max(run.start for _, _, run in found) + 1,
            whole=whole,
            straight=whole and [row for _, row, _ in found] == list(range(total)),
        )

    # -- seats and buffers ---------------------------------------------------------------------------------------------

    def _view(self, id: int) -> Tensor:
        table = self._seat_of.get(id)
        return self._buffers[id] if table is None else table.store[:, :, table.ids.index(id)]

    def _sit(self, id: int, contents: Tensor, positions: int) -> None:
        size = capacity(positions)
        if size not in self._tables:
            layers, two, heads, dim = self._shape
            store = torch.empty(layers, two, 1, size, heads, dim, dtype=self._dtype, device=self._device)
            self._tables[size] = Table(store)
        self._tables[size].sit(id, contents)
        self._seat_of[id] = self._tables[size]
        self._plan = None

    def _stand(self, id: int) -> None:
        table = self._seat_of.pop(id)
        table.leave(id)
        if not table.ids:
            del self._tables[table.store.shape[3]]
        self._plan = None

    def _take(self, size: int) -> Tensor:
        spare = self._spare.get(size)
        if spare:
            return spare.pop()
        layers, two, heads, dim = self._shape
        return torch.empty(layers, two, size, heads, dim, dtype=self._dtype, device=self._device)

    def _give(self, buffer: Tensor) -> None:
        self._plan = None
        held = sum(free.nbytes for spare in self._spare.values() for free in spare)
        if held + buffer.nbytes <= _SPARE and buffer.shape[2] == capacity(buffer.shape[2]):
            self._spare.setdefault(buffer.shape[2], []).append(buffer)


def _roomy(stored: int, most: int) -> int:
    """Positions to give a sequence that begins to decode and may come to hold `most`."""
    return max(stored, min(most, 2 * stored + 64))


def _fresh(alone: Sequence[_Alone]) -> Iterator[tuple[slice, list[int]]]:
    """Rows and lengths of neighbouring runs that start their sequences."""
    start, lengths = 0, list[int]()
    for own in alone:
        if own.run.start:
            continue
        if lengths and start + sum(lengths) != own.row:
            yield slice(start, start + sum(lengths)), lengths
            lengths = []
        start = start if lengths else own.row
        lengths.append(own.run.length)
    if lengths:
        yield slice(start, start + sum(lengths)), lengths


def _store(group: _Seated, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Put the new keys and values in their places; all keys and values of the group so far."""
    keys, values = group.table.store[layer, 0], group.table.store[layer, 1]
    keys[group.seats, group.places] = k
    values[group.seats, group.places] = v
    if group.whole:
        return keys[: len(group.lengths), : group.longest], values[: len(group.lengths), : group.longest]
    return keys[group.seats, : group.longest], values[group.seats, : group.longest]
