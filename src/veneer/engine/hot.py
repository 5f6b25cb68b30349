"""One adapter merged into tensors of its own beside the base, for as long as nearly everybody asks for it.

    W' = round(W + dW)      for every projection that the adapter changes

A step whose rows are all the hot adapter's runs on the merged tensors, at the speed of the bare base; a step with anybody else in
it runs on the base with packed factors, as always. So other adapters are served meanwhile, and the pass over the weights stays
one. Swapping is another reference for the next step. The base's tensors are only read: there is nothing to restore. Their
checksum is taken before the merge and compared after the merged set has been dropped.

The surprise: merged weights are rounded to the base's dtype, so in bf16 a part of the update is lost (`Heat.lost`), and the last
bits of an answer depend on whether it had company. That is why the reproducible mode refuses, and why prefixes stored by such an
adapter are forgotten when it cools.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from veneer.adapter import Adapter
from veneer.base.identity import compare
from veneer.engine.batch import Resident, check, lowered_for, resident_of
from veneer.engine.dense import beside
from veneer.engine.loader import Loader
from veneer.engine.slots import Slots
from veneer.engine.source import Found
from veneer.errors import Conflict, ResourceError, Unsupported
from veneer.methods import merged
from veneer.models.base import Base
from veneer.models.decoder import Decoder
from veneer.models.group import Group
from veneer.ops.low_rank import DenseFrozen
from veneer.types import Lowered

log = logging.getLogger(__name__)

MERGED = "merged:"
"""What the slot of a merged set begins with; the digest of its adapter follows."""

HotState: TypeAlias = Literal["cold", "merging", "hot", "checking", "failed"]


@dataclass(frozen=True)
class Heat:
    """Where the one merged adapter stands.

    name, digest  which adapter
    bytes         of the merged set, beside the base
    lost          share of the update that rounding took: ||round(W') - W'|| / ||W' - W||
    checksum      SHA-256 of the base's tensors that have a merged twin, taken before the merge
    intact        after cooling: whether the base still has that checksum
    reason        why it failed
    """

    state: HotState = "cold"
    name: str = ""
    digest: str = ""
    bytes: int = 0
    lost: float = 0.0
    checksum: str = ""
    intact: bool | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Merged:
    """An adapter's merged set: a decoder that reads it, and what no weight can hold (prompts, bottlenecks, norms) as a bank."""

    decoder: Decoder
    rest: Resident
    names: tuple[str, ...]
    bytes: int
    lost: float
    checksum: str


class Hot:
    """Merges on a thread of its own; `publish` makes the result visible between two steps. Belongs to the thread that steps.

    slots      whose budget the merged set is charged to, under a key of its own
    on_change  called on the worker when something has ended
    """

    def __init__(self, base: Base, decoder: Decoder, slots: Slots[Resident]) -> None:
        self._base, self._decoder, self._slots = base, decoder, slots
        self._merger: Loader[Merged] = Loader()
        self._checker: Loader[str] = Loader()
        self._merged: Merged | None = None
        self.heat = Heat()
        self.on_change: Callable[[], None] | None = None

    @property
    def adapter(self) -> str:
        """The digest of the adapter whose merged set steps may use now; "" without one."""
        return "" if self._merged is None else self.heat.digest

    @property
    def merged(self) -> Merged:
        assert self._merged is not None
        return self._merged

    def start(self, found: Found, now: float) -> Heat:
        """Begin to merge. Conflict while another adapter is hot."""
        if self.heat.state in ("merging", "hot", "checking") and self.heat.digest != found.digest:
            raise Conflict(f"the adapter '{self.heat.name}' is {self.heat.state}", help="cool it first")
        if self.heat.state in ("merging", "hot"):
            return self.heat
        if self.heat.state == "checking":
            raise Conflict("the base is being checked after the last one", help="try again in a moment")
        refuse_packed(self._decoder)
        key = _key(found.digest)
        self._slots.know(key, found.bytes)
        state = self._slots.want(key, now)
        if state != "loading":
            reason = self._slots.slot(key).reason or "adapters in use leave no room under the budget"
            self._slots.forget(key)
            self.heat = Heat("failed", found.version or found.name, found.digest, reason=reason)
            return self.heat
        self._slots.pin(key)
        self.heat = Heat("merging", found.version or found.name, found.digest)
        budget = self._slots.budget
        self._merger.start(key, lambda: self._load(found, budget), self._ended)
        return self.heat

    def publish(self, now: float) -> None:
        """What the worker has finished becomes visible."""
        for merging in self._merger.finished():
            done = merging.result
            if done is None:
                self._fail(merging.key, merging.error, now)
            elif not self._slots.loaded(merging.key, done.rest, done.bytes, now):
                self._fail_as_said(merging.key)
            else:
                self._merged = done
                self.heat = replace(
                    self.heat, state="hot", bytes=done.bytes, lost=done.lost, checksum=done.checksum, reason=""
                )
                log.info("adapter %s is hot: %s bytes beside the base", self.heat.name, f"{done.bytes:,}")
        for checked in self._checker.finished():
            intact = checked.result == self.heat.checksum
            reason = "" if intact else checked.error or "the base's tensors are not those that were there before"
            self.heat = replace(self.heat, state="cold" if intact else "failed", bytes=0, intact=intact, reason=reason)
            if not intact:
                log.critical("the base has changed while %s was hot: restart", self.heat.name)

    def drop(self) -> int:
        """No step uses the merged set from now on; its bytes. The check of the base runs on the worker."""
        if self.heat.state == "merging":
            raise Conflict(f"the adapter '{self.heat.name}' is being merged", help="cool it when that is done")
        if self._merged is None:
            return 0
        names, self._merged = self._merged.names, None
        key = _key(self.heat.digest)
        freed = self._slots.drain(key)
        self._slots.forget(key)
        self.heat = replace(self.heat, state="checking", bytes=0)
        self._checker.start(key, lambda: checksum(self._decoder, names), self._ended)
        return freed

    @property
    def working(self) -> bool:
        """Something is being merged or checked."""
        return bool(len(self._merger) or len(self._checker))

    def wait(self, timeout: float | None = None) -> None:
        """Until the worker has finished something."""
        (self._merger if len(self._merger) else self._checker).wait(timeout)

    def close(self) -> None:
        self._merger.close()
        self._checker.close()

    def _load(self, found: Found, budget: int) -> Merged:
        adapter = found.load()
        compare(adapter, self._base, allow=found.allow)
        return merge_beside(adapter, self._base, self._decoder, budget)

    def _ended(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def _fail(self, key: str, reason: str, now: float) -> None:
        self._slots.failed(key, reason, now)
        self._fail_as_said(key)

    def _fail_as_said(self, key: str) -> None:
        self.heat = replace(self.heat, state="failed", reason=self._slots.slot(key).reason)
        self._slots.forget(key)
        log.warning("adapter %s can't be merged: %s", self.heat.name, self.heat.reason)


def refuse_packed(decoder: Decoder) -> None:
    """Refuse a base whose projections are not dense."""
    if any(not isinstance(group.frozen, DenseFrozen) for group in decoder.groups.values()):
        raise Unsupported(
            "an adapter is not merged beside an int8 or bf12 base: the dense copy would cost more to read than it saves",
            help="serve the base in bf16, or leave the adapter as it is",
        )


@torch.no_grad()
def merge_beside(adapter: Adapter, base: Base, decoder: Decoder, budget: int) -> Merged:
    """The merged set of `adapter`, or ResourceError before anything of it is made that exceeds `budget` bytes.

    Projections are merged; the embedding, the head and whatever is no weight go on as primitives.
    """
    groups = {n: g for n, g in decoder.groups.items() if n != "head"}
    here = {part.path for group in groups.values() for part in group.parts} & set(adapter.targets)
    touched = {n: g for n, g in groups.items() if any(part.path in here for part in g.parts)}
    if not touched:
        raise Unsupported(
            f"{adapter.spec.kind} changes no projection, so there is nothing to merge", help="serve it as it is"
        )
    check(adapter)
    lowered = lowered_for([(adapter, 1.0)], base)
    if lowered.invocation is not None:
        raise Unsupported("an invoked adapter (aLoRA) can't be merged: before its invocation the base answers")
    names = tuple(name for group in touched for name in (group, f"{group}_bias") if name in _held(decoder))
    total = sum(g.out_features * g.frozen.in_features * decoder.dtype.itemsize for g in touched.values())
    if total > budget:
        raise ResourceError(f"its merged tensors take {total:,} bytes and the budget for adapters is {budget:,}")
    before = checksum(decoder, names)
    squares = [0.0, 0.0]
    tensors: dict[str, Tensor] = {}
    for name, group in touched.items():
        tensors |= _merged_group(name, group, adapter, base, here, squares)
    rest = resident_of(_without(lowered, here), base, adapter.digest)
    size = sum(t.nbytes for t in tensors.values()) + rest.bytes
    lost = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
    return Merged(beside(decoder, tensors), rest, names, size, lost, before)


def checksum(decoder: Decoder, names: tuple[str, ...]) -> str:
    """SHA-256 over the bytes of these tensors of the decoder."""
    held, digest = _held(decoder), hashlib.sha256()
    for name in names:
        digest.update(held[name].contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _held(decoder: Decoder) -> dict[str, Tensor]:
    """Weights and biases of the decoder's dense groups."""
    found = {n: g.frozen.weight for n, g in decoder.groups.items() if isinstance(g.frozen, DenseFrozen)}
    return found | {f"{n}_bias": g.bias for n, g in decoder.groups.items() if g.bias is not None}


def _merged_group(
    name: str, group: Group, adapter: Adapter, base: Base, here: set[str], squares: list[float]
) -> dict[str, Tensor]:
    """A new weight for the group, and a new bias where the adapter changes it. `squares`: what rounding took, and the update."""
    assert isinstance(group.frozen, DenseFrozen)
    old = group.frozen.weight
    weight = old.clone(memory_format=torch.contiguous_format)
    bias = None if group.bias is None else group.bias.clone()
    rebiased = False
    for part in group.parts:
        if part.path not in here:
            continue
        rows = slice(part.start, part.stop)
        exact, own = merged(adapter, part.path, base.host(part.path))
        weight[rows] = exact.to(weight.dtype)
        squares[0] += float((weight[rows].float() - exact).square().sum(dtype=torch.float64))
        squares[1] += float((exact - old[rows].float()).square().sum(dtype=torch.float64))
        if own is not None:
            rebiased = True
            bias = weight.new_zeros(group.out_features) if bias is None else bias
            bias[rows] = own.to(bias.dtype)
    return {name: weight, **({f"{name}_bias": bias} if bias is not None and rebiased else {})}


def _without(lowered: Lowered, here: set[str]) -> Lowered:
    """What is left when the projections `here` are merged."""
    gone = {f"{path}.{kind}" for path in here for kind in ("weight", "bias")}
    return replace(
        lowered,
        weights={t: p for t, p in lowered.weights.items() if t not in here},
        overrides={n: o for n, o in lowered.overrides.items() if n not in gone},
    )


def _key(digest: str) -> str:
    return f"{MERGED}{digest}"
