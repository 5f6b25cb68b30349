"""Merging an adapter into a checkpoint: file to file, one tensor at a time, no model class.

    W' = round(W + scale B A), for every tensor that the adapter changes; every other byte is copied

The new folder has the files of the old one: the same shards, the same index, the tokenizer. It appears whole or not at all, and
the base is only read. The surprise: what is lost is printed, because it can be everything. In bf16 an update of a two-thousandth
of the weight's size is rounded away almost entirely.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from veneer.adapter import Adapter
from veneer.base.identity import Verdict, compare, same_weights, sampled
from veneer.errors import BaseMismatch, Conflict, Unsupported
from veneer.formats.card import NAME as README
from veneer.formats.card import Story, card
from veneer.formats.folder import replace_folder
from veneer.merge.exact import NOTE, RECORD, Recorder, copy_records, set_aside
from veneer.merge.plan import Edit, Places, edits
from veneer.merge.rounding import LowRankRows, Rounded, Update, blocks, merged, overflow, share_lost
from veneer.merge.store import (
    BaseStore,
    Entry,
    FolderStore,
    Shard,
    Span,
    Written,
    cut_short,
    licence,
    store_of,
    with_extra,
    write_shards,
)
from veneer.models.base import Base
from veneer.ops.native import merge as native
from veneer.ops.scratch import keep_freed_memory

NOTICEABLE = 0.05
"""A share of the update lost to rounding that a user should know about."""

WORKERS = 2
"""Threads that merge, one tensor each: one computes while the other writes. What a merge holds besides is two tensors."""


@dataclass(frozen=True)
class Fidelity:
    """What became of the update of one tensor.

    lost      ||round(W + dW) - W - dW|| / ||dW||
    relative  ||dW|| / ||W||
    """

    tensor: str
    lost: float
    relative: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    base_check  how adapter and base were found to belong together
    lost        over all tensors together
    untied      the head became a tensor of its own
    unmerge     bits per changed weight that the record for a bit-exact way back takes, or None
    """

    out: Path
    tensors: tuple[Fidelity, ...]
    base_check: Verdict
    lost: float
    untied: bool = False
    unmerge: float | None = None

    @property
    def worst(self) -> Fidelity:
        return max(self.tensors, key=lambda t: t.lost)

    def warnings(self) -> list[str]:
        """One line where a noticeable part of the update was lost, with the way out."""
        bad = [t for t in self.tensors if t.lost > NOTICEABLE]
        if not bad:
            return []
        return [
            f"rounding lost more than {NOTICEABLE:.0%} of the update in {len(bad)} of {len(self.tensors)} tensors "
            f"(worst {self.worst.tensor}: {self.worst.lost:.1%}); --stochastic keeps it on average, "
            "and an fp32 base or the adapter itself loses nothing"
        ]


def merge(
    base: Base | str | os.PathLike[str],
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    untie: bool = False,
    stochastic: int | None = None,
    unmergeable: bool = False,
    allow_base_mismatch: str | None = None,
    story: Story | None = None,
) -> MergeReport:
    """Write the base with the adapter in it to the folder `out`, as a checkpoint that transformers loads.

    base         a loaded base, a checkpoint folder, or a catalogue name
    untie        give a tied head a tensor of its own where the adapter is on the head or on the embedding
    stochastic   seed: round at random without bias, in place of to the nearest
    unmergeable  keep a record, so that `unmerge` gets the base back bit for bit
    allow_base_mismatch  the reason for merging into another base than the adapter's; it is recorded
    story        what the model card (README.md) is to say besides: metrics, data, licence
    """
    place = Path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise Conflict(f"{place} is already there", help="choose a new folder, or remove this one")
    store = store_of(base if isinstance(base, Base) else str(base))
    verdict = belongs(store, adapter, allow_base_mismatch)
    changes = edits(adapter, store, untie=untie)
    keep_freed_memory()  # a tensor's room serves the next one: the kernel would clear every page anew
    job = _Job(store, changes, stochastic, Recorder() if unmergeable else None)
    told = story or Story(name=place.name)
    replace_folder(place, frozenset(), lambda folder: job.write(folder, adapter, verdict, told))
    return job.report(place, verdict)


class Merged:
    """A base with an adapter in it, as named fp32 tensors that are not rounded yet: what exports to other formats read.

    `base_check` says how the two were found to belong together; the arguments are those of `merge`.
    """

    def __init__(
        self,
        base: Base | str | os.PathLike[str],
        adapter: Adapter,
        *,
        untie: bool = False,
        allow_base_mismatch: str | None = None,
    ) -> None:
        self._store = store_of(base if isinstance(base, Base) else str(base))
        self.base_check = belongs(self._store, adapter, allow_base_mismatch)
        self._edits = {edit.name: edit for edit in edits(adapter, self._store, untie=untie)}
        self.extra = [name for name in self._edits if name not in self._store]
        self.config = _config(self._store, list(self._edits.values()))

    def names(self) -> list[str]:
        return [*self._store.names(), *self.extra]

    def shape(self, name: str) -> tuple[int, ...]:
        edit = self._edits.get(name)
        return self._store.shape(name if edit is None else edit.source)

    def dtype(self, name: str) -> torch.dtype:
        """What the tensor is stored in."""
        edit = self._edits.get(name)
        return self._store.tensor(name if edit is None else edit.source).dtype

    def tensor(self, name: str) -> Tensor:
        """The merged tensor in fp32, or the base's as stored."""
        edit = self._edits.get(name)
        if edit is None:
            return self._store.tensor(name)
        stored = self._store.tensor(edit.source)
        update = edit.update(self._store)
        return torch.cat([(stored[i:j].float() + update.rows(i, j)).float() for i, j in blocks(stored)])


def _config(store: BaseStore | FolderStore, changes: Sequence[Edit]) -> dict[str, Any]:
    """The model's config.json after the changes: a head that is made from the embedding's table is tied no more."""
    untied = any(edit.name != edit.source for edit in changes)
    return {**store.config, "tie_word_embeddings": False} if untied else dict(store.config)


class _Job:
    """One merge: the tensors that change, and what was measured while they passed."""

    def __init__(
        self, store: BaseStore | FolderStore, changes: Sequence[Edit], seed: int | None, recorder: Recorder | None
    ) -> None:
        self.store, self.seed, self.recorder = store, seed, recorder
        self.edits = {edit.name: edit for edit in changes}
        self.extra = [(e.source, self._entry(e)) for e in changes if e.name not in store]
        self.results: dict[str, Rounded] = {}
        self.config = _config(store, changes)
        if recorder is not None and self.config != store.config:
            raise Unsupported(
                "a head that is untied is a tensor of its own, and a record for unmerging keeps the tensors that there are",
                help="merge without --unmergeable and keep the base to go back to",
            )

    def _entry(self, edit: Edit) -> Entry:
        like = self.store.tensor(edit.source)
        return Entry(edit.name, like.dtype, tuple(like.shape))

    def write(self, folder: Path, adapter: Adapter, verdict: Verdict, story: Story) -> None:
        self.store.copy_words(folder)
        if self.recorder is not None and isinstance(self.store, FolderStore):
            copy_records(self.store.path, folder)
        set_aside(folder)
        shards: tuple[Shard, ...] = with_extra(self.store.shards(), self.extra)
        write_shards(folder, shards, self.produce, WORKERS)
        if self.config != self.store.config:
            (folder / "config.json").write_text(json.dumps(self.config, indent=2), "utf-8")
        note = {
            "adapter": adapter.digest,
            "base": adapter.provenance.base,
            "base_check": asdict(verdict),
            "stochastic_seed": self.seed,
            "lost": self.lost(),
            "card": True,
        }
        (folder / NOTE).write_text(json.dumps(note, indent=2), "utf-8")
        facts = {"share of the update lost to rounding": f"{self.lost():.3g}", "base check": verdict.detail}
        write_card(folder, adapter, replace(story, facts={**story.facts, **facts}), self.store)
        if self.recorder is not None:
            self.recorder.write(folder / RECORD)

    def produce(self, name: str) -> Tensor | Written:
        """The tensor called `name` in the merged checkpoint. Called from several threads."""
        edit = self.edits.get(name)
        if edit is None:
            return self.store.verbatim(name)
        stored, where = self.store.tensor(edit.source), self.store.verbatim(edit.source)
        update = edit.update(self.store)
        if self.seed is None and self.recorder is None and isinstance(where, Span) and _has_kernel(update, stored):
            return _Merging(self, name, where, update)
        result = merged(stored, update, None if self.seed is None else stream(self.seed, name))
        if self.recorder is not None:
            self.recorder.add(name, stored, result.value, edit.factors())
        self.keep(name, replace(result, value=torch.empty(0)))
        return result.value

    def keep(self, name: str, result: Rounded) -> None:
        """File what was measured of a tensor; refuse one that its dtype can't hold."""
        if not math.isfinite(result.lost_square):
            raise overflow(name, self.store.tensor(self.edits[name].source).dtype)
        self.results[name] = result

    def found(self) -> tuple[Fidelity, ...]:
        """In the order of the edits, whichever thread was first."""
        return tuple(
            Fidelity(
                name,
                share_lost(made.lost_square, made.delta_square),
                (made.delta_square / made.weight_square) ** 0.5 if made.weight_square > 0 else 0.0,
            )
            for name, made in ((name, self.results[name]) for name in self.edits)
        )

    def lost(self) -> float:
        """Over all tensors together."""
        made = [self.results[name] for name in self.edits]
        return share_lost(sum(m.lost_square for m in made), sum(m.delta_square for m in made))

    def report(self, out: Path, verdict: Verdict) -> MergeReport:
        bits = None if self.recorder is None else self.recorder.bits_per_weight
        return MergeReport(out, self.found(), verdict, self.lost(), self.config != self.store.config, bits)


def _has_kernel(update: Update, stored: Tensor) -> TypeGuard[LowRankRows]:
    return isinstance(update, LowRankRows) and native.available(stored, update.left, update.right)


@dataclass(frozen=True, eq=False)
class _Merging(Written):
    """A merged tensor that goes from file to file, a few rows at a time."""

    job: _Job
    name: str
    source: Span
    update: LowRankRows

    def write(self, handle: int, start: int) -> None:
        left, right = self.update.left, self.update.right
        with self.source.path.open("rb", buffering=0) as file:
            try:
                lost, weight = native.low_rank_file(file.fileno(), self.source.start, left, right, handle, start)
            except EOFError as error:
                raise cut_short(self.source.path) from error
        self.job.keep(self.name, Rounded(torch.empty(0), lost, self.update.square(0, len(left)), weight))


def write_card(folder: Path, adapter: Adapter, story: Story, store: BaseStore | FolderStore) -> None:
    """Put the model card into a merged folder."""
    told = story if story.base_licence else replace(story, base_licence=licence(store))
    (folder / README).write_text(card(adapter, told, "merged", store.name), "utf-8")


def stream(seed: int, name: str) -> torch.Generator:
    """A random stream per tensor, so that the order of the files plays no part."""
    key = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))


def belongs(store: BaseStore | FolderStore, adapter: Adapter, allow: str | None) -> Verdict:
    """Refuse an adapter of another base; the same decision as when it is attached."""
    if isinstance(store, BaseStore):
        return compare(adapter, store.base, allow=allow)
    return _compare_folder(store, adapter, allow)


def _compare_folder(store: FolderStore, adapter: Adapter, allow: str | None) -> Verdict:
    """By the sampled weights: a full identity would read the whole checkpoint once more."""
    samples: Mapping[str, tuple[float, ...]] = adapter.provenance.base_samples
    if not samples:
        if adapter.provenance.base is None:
            return Verdict("unverified", "the adapter does not say which base it was made for; names and shapes fit")
        return _compare_identity(store, adapter, allow)
    places = Places(store)
    differing, compared = [], 0
    for target, theirs in samples.items():
        name = places.stored(target, "weight", required=False)
        if name is None:
            differing.append(f"{target} is not there")
            continue
        compared += 1
        weight = store.tensor(name)
        if not same_weights(sampled(weight.t() if places.kind(target, ()) == "conv1d" else weight), theirs):
            differing.append(f"{target} differs")
    if not differing:
        return Verdict("equal", f"the weights are the adapter's own base ({compared} layers sampled)")
    return _mismatch(
        store, adapter, f"{len(differing)} of {len(samples)} sampled layers differ, first: {differing[0]}", allow
    )


def _compare_identity(store: FolderStore, adapter: Adapter, allow: str | None) -> Verdict:
    from veneer.models.load import load_base

    return compare(adapter, load_base(store.path), allow=allow)


def _mismatch(store: FolderStore, adapter: Adapter, difference: str, allow: str | None) -> Verdict:
    if allow is not None:
        return Verdict("allowed", f"{difference}; allowed: {allow}")
    made_for: Any = adapter.provenance.base_name or (adapter.provenance.base or "an unnamed base")[:12]
    raise BaseMismatch(
        f"this adapter was made for {made_for}, and {store.name} is another: {difference}",
        help='use the base it was trained on, or --allow-base-mismatch "why this is right"',
    )
