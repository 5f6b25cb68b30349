"""Merging into a 4-bit checkpoint (NF4 or FP4, arXiv 2305.14314), without losing the adapter on the grid.

    original     q(W + dW), from the unquantised weights W
    stochastic   each value of deq(q(W)) + dW goes to one of its two neighbouring levels with probabilities that keep the mean
    gain         <realised change, dW> / ||dW||^2; 1 keeps the update, 0 has lost it

Dequantised weights stand exactly on grid points, so merging a small update into them and rounding to the nearest again rounds all
of it back: a 1 % update has a gain of 0.016. That usual route isn't offered. Both others keep the update and add noise, and the
gain is measured before anything takes its place: below 0.9 the merge is refused. The files are bitsandbytes' own.

The surprise: the better route needs the weights from before quantisation, so keep the base and never only its 4-bit copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from veneer.adapter import Adapter
from veneer.base.formats import fp4, nf4
from veneer.base.identity import Verdict
from veneer.errors import Conflict, Unsupported
from veneer.formats.card import Story
from veneer.formats.folder import replace_folder
from veneer.merge.exact import set_aside
from veneer.merge.file import Merged, stream, write_card
from veneer.merge.rounding import overflow
from veneer.merge.store import BaseStore, Entry, FolderStore, Shard, store_of, write_shards
from veneer.models.base import Base
from veneer.models.families import decoder_config, layout
from veneer.ops import four_bit
from veneer.ops.four_bit import FourBit, Table

Route: TypeAlias = Literal["original", "stochastic"]
Levels: TypeAlias = Literal["nf4", "fp4"]
TABLES: Mapping[Levels, Table] = {"nf4": nf4.TABLE, "fp4": fp4.TABLE}
"""What bitsandbytes reads."""

ENOUGH = 0.9
STATE_BYTES = 256
"""The quantisation state is JSON in a tensor; padded with spaces, so that the header is known before the values."""


@dataclass(frozen=True)
class FourBitReport:
    """gain over all changed tensors together, and per tensor."""

    out: Path
    route: Route
    gain: float
    gains: Mapping[str, float]
    base_check: Verdict


def merge_four_bit(
    base: Base | str | os.PathLike[str],
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    route: Route = "original",
    levels: Levels = "nf4",
    double: bool = True,
    seed: int = 0,
    untie: bool = False,
    allow_base_mismatch: str | None = None,
    story: Story | None = None,
) -> FourBitReport:
    """Write base + adapter to `out` with its projections in 4 bits; refused where the measured gain is below 0.9.

    base    the *unquantised* base: both routes start from its weights (`stochastic` quantises them first)
    levels  the 16 levels: NF4's, or bitsandbytes' floats of 4 bits
    double  quantise the blocks' scales too (4.13 bits a weight in place of 4.5)
    story   what the model card (README.md) is to say besides
    """
    place = Path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise Conflict(f"{place} is already there", help="choose a new folder, or remove this one")
    if isinstance(base, Base) and base.quantize is not None:
        raise Unsupported(
            f"'{base.name}' is loaded in {base.quantize}; its own weights are what a 4-bit merge starts from",
            help="load it with quantize=None, or merge to bf16, which keeps the trained function exactly",
        )
    whole = base if isinstance(base, Base) else str(base)
    store = store_of(whole)
    merged = Merged(whole, adapter, untie=untie, allow_base_mismatch=allow_base_mismatch)
    job = _Job(store, merged, route, levels, double, seed)

    def write(folder: Path) -> None:
        job.write(folder)
        facts = {"format": f"{levels.upper()}, as bitsandbytes stores it", "route": route, "gain": f"{job.gain:.3f}"}
        told = story or Story(name=place.name)
        write_card(folder, adapter, replace(told, facts={**told.facts, **facts}), store)

    replace_folder(place, frozenset(), write)
    return FourBitReport(place, route, job.gain, job.gains, merged.base_check)


class _Job:
    def __init__(
        self, store: BaseStore | FolderStore, merged: Merged, route: Route, levels: Levels, double: bool, seed: int
    ) -> None:
        self.store, self.merged, self.route, self.double, self.seed = store, merged, route, double, seed
        self.levels: Levels = levels
        config = decoder_config(dict(store.config))
        groups = [g for g in layout(config).groups if g.name != "head" and g.kind == "linear"]
        if not groups:
            raise Unsupported("this family's projections are not linear layers", help="merge to bf16")
        self.chosen = {f"{part.path}.weight" for group in groups for part in group.parts}
        self.dots: dict[str, tuple[float, float]] = {}
        self._now: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def gains(self) -> dict[str, float]:
        return {name: dot / square for name, (dot, square) in self.dots.items() if square > 0}

    @property
    def gain(self) -> float:
        total = sum(square for _, square in self.dots.values())
        return sum(dot for dot, _ in self.dots.values()) / total if total > 0 else 1.0

    def write(self, folder: Path) -> None:
        self.store.copy_words(folder)
        set_aside(folder)
        write_shards(folder, self._shards(), self._produce)
        if self.gain < ENOUGH:
            raise Unsupported(
                f"only {self.gain:.1%} of the update would survive in 4 bits (route {self.route}), less than {ENOUGH:.0%}",
                help="merge to bf16 (no --quantize), or try --route stochastic",
            )
        (folder / "config.json").write_text(json.dumps(self._config(), indent=2), "utf-8")

    def _config(self) -> dict[str, object]:
        compute = str(self.store.tensor(next(iter(self.chosen))).dtype).removeprefix("torch.")
        quantisation = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.levels,
            "bnb_4bit_use_double_quant": self.double,
            "bnb_4bit_compute_dtype": compute,
            "bnb_4bit_quant_storage": "uint8",
        }
        return {**self.merged.config, "quantization_config": quantisation}

    def _shards(self) -> tuple[Shard, ...]:
        found = []
        for shard in self.store.shards():
            entries: list[Entry] = []
            for entry in shard.entries:
                entries += self._entries(entry) if entry.name in self.chosen else [entry]
            found.append(Shard(shard.file, tuple(entries), shard.metadata))
        present = {entry.name for shard in found for entry in shard.entries}
        extra = tuple(
            Entry(n, self.merged.dtype(n), self.merged.shape(n)) for n in self.merged.extra if n not in present
        )
        last = found[-1]
        return (*found[:-1], Shard(last.file, last.entries + extra, last.metadata))

    def _entries(self, entry: Entry) -> list[Entry]:
        count = entry.shape[0] * entry.shape[1]
        blocks = -(-count // four_bit.BLOCK)
        name = entry.name
        made = [Entry(name, torch.uint8, (-(-count // 2), 1))]
        scales = torch.uint8 if self.double else torch.float32
        made += [Entry(f"{name}.absmax", scales, (blocks,)), Entry(f"{name}.quant_map", torch.float32, (16,))]
        if self.double:
            made.append(Entry(f"{name}.nested_absmax", torch.float32, (-(-blocks // four_bit.SCALE_BLOCK),)))
            made.append(Entry(f"{name}.nested_quant_map", torch.float32, (256,)))
        return [*made, Entry(f"{name}.quant_state.bitsandbytes__{self.levels}", torch.uint8, (STATE_BYTES,))]

    def _produce(self, name: str) -> Tensor:
        weight = next((w for w in (name, name.rpartition(".")[0], name.rsplit(".", 2)[0]) if w in self.chosen), None)
        if weight is None:
            return self._held(name)
        if self._now[0] != weight:
            self._now = (weight, self._quantised(weight))
        return self._now[1][name]

    def _held(self, name: str) -> Tensor:
        """A tensor that stays in the checkpoint's dtype."""
        value, dtype = self.merged.tensor(name), self.merged.dtype(name)
        _refuse_overflow(name, value, dtype)
        return value.to(dtype)

    def _quantised(self, name: str) -> dict[str, Tensor]:
        original, table = self.store.tensor(name), TABLES[self.levels]
        sum_, before = self.merged.tensor(name).float(), original.float()
        _refuse_overflow(name, sum_, original.dtype)
        if self.route == "original":
            stored = four_bit.quantise(sum_, table, double=self.double)
        else:
            held = four_bit.quantise(original, table, double=self.double)
            delta, before = sum_ - before, held.dequantise(torch.empty(held.shape))
            sum_ = before + delta
            stored = stochastic(sum_, table, stream(self.seed, name), double=self.double)
        realised = stored.dequantise(torch.empty(stored.shape)) - before
        delta = sum_ - before
        self.dots[name] = (
            float((realised * delta).sum(dtype=torch.float64)),
            float(delta.square().sum(dtype=torch.float64)),
        )
        return _tensors(name, stored, self.levels, str(original.dtype).removeprefix("torch."))


def _refuse_overflow(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Values that are stored in fp16, or that bitsandbytes gives back in it: the checkpoint's dtype."""
    if dtype == torch.float16 and value.dtype != dtype and not value.half().isfinite().all():
        raise overflow(name, dtype)


def stochastic(weight: Tensor, table: Table, generator: torch.Generator, *, double: bool) -> FourBit:
    """Codes whose expected value is `weight`, within each block's range. With `double` the scales are rounded first."""
    nearest = four_bit.quantise(weight, table, double=double)
    flat = weight.reshape(-1).float()
    scale = nearest.scales().repeat_interleave(nearest.block)[: flat.numel()]
    value = (flat / scale.clamp_min(four_bit.TINY)).clamp(-1, 1)
    levels = table.values[table.codes]
    low = (torch.bucketize(value, levels, right=True) - 1).clamp(0, len(levels) - 2)
    share = (value - levels[low]) / (levels[low + 1] - levels[low])
    codes = table.codes[low + (torch.rand(flat.shape, generator=generator) < share)]
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    packed = ((codes[::2] << 4) | codes[1::2]).to(torch.uint8)
    return replace(nearest, packed=packed)


def _tensors(name: str, stored: FourBit, levels: Levels, dtype: str) -> dict[str, Tensor]:
    """The tensors of one weight, as bitsandbytes names them."""
    state: dict[str, object] = {
        "quant_type": levels,
        "blocksize": stored.block,
        "dtype": dtype,
        "shape": list(stored.shape),
    }
    found = {name: stored.packed[:, None], f"{name}.quant_map": stored.table.values}
    if isinstance(stored.absmax, Tensor):
        found[f"{name}.absmax"] = stored.absmax
    else:
        second = stored.absmax
        state |= {
            "nested_blocksize": four_bit.SCALE_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(second.offset),
        }
        found |= {
            f"{name}.absmax": second.codes,
            f"{name}.nested_absmax": second.absmax,
            f"{name}.nested_quant_map": four_bit.dynamic_code(),
        }
    text = json.dumps(state).encode().ljust(STATE_BYTES)
    found[f"{name}.quant_state.bitsandbytes__{levels}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return found
