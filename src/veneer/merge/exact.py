"""The way back from a merged checkpoint, bit for bit.

    W'' = round(W' - delta);  kept: bits(W) - bits(W'') for every weight, mostly zero, and the SHA-256 of W

Floating-point subtraction does not undo addition: merging and unmerging leaves a few per cent of bf16 weights one step off. The
record holds those steps, a bitmap and small numbers, compressed, under one bit per weight for updates of up to a quarter of the
weight's size. It also holds the factors of delta, so the way back needs nothing but the merged folder. A tensor whose update is
not low-rank (DoRA, IA3) is kept whole.

The surprise: the steps are differences of bit patterns, taken as integers. They survive every rounding mode, sign flips included,
because nothing about them is arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from veneer.errors import Conflict, FormatError, NotFound
from veneer.formats.card import NAME as README
from veneer.formats.checkpoint import TensorFile, open_tensors, plain_file, read_json
from veneer.formats.folder import replace_folder
from veneer.merge.rounding import LowRankRows, blocks, rounded, working_dtype
from veneer.merge.store import Entry, FolderStore, Shard, raw_bytes, write_shards

RECORD = "veneer_unmerge.safetensors"
NOTE = "veneer_merge.json"
OWN = (README, NOTE, RECORD)
"""What a merge writes besides the model."""
BITS = {2: torch.int16, 4: torch.int32}
ESCAPE = -128
LEVEL = 6


def subtracted(value: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """round(value - left @ right) in value's dtype, in the same blocks as the merge used."""
    work = working_dtype(value.dtype)
    update = LowRankRows(left.to(work), right.to(work))
    back = torch.empty_like(value)
    for start, stop in blocks(value):
        back[start:stop] = rounded(value[start:stop].to(work) - update.rows(start, stop), value.dtype)
    return back


def steps(original: Tensor, back: Tensor) -> Tensor:
    """bits(original) - bits(back) as integers that wrap around, flat."""
    bits = BITS[original.element_size()]
    return (original.contiguous().view(bits) - back.view(bits)).reshape(-1)


def packed(difference: Tensor) -> dict[str, Tensor]:
    """Differences as three compressed streams: where they are not zero, the small ones as bytes, the large ones whole."""
    flat = difference.numpy()
    where = flat != 0
    values = flat[where]
    large = (values <= ESCAPE) | (values > 127)
    small = np.where(large, ESCAPE, values).astype(np.int8)
    streams = {"where": np.packbits(where).tobytes(), "small": small.tobytes(), "large": values[large].tobytes()}
    return {name: _compressed(raw) for name, raw in streams.items()}


def unpacked(streams: dict[str, Tensor], count: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `packed`."""
    kind = {torch.int16: np.int16, torch.int32: np.int32}[dtype]
    raw = {name: zlib.decompress(bytes(raw_bytes(stream))) for name, stream in streams.items()}
    where = np.unpackbits(np.frombuffer(raw["where"], np.uint8), count=count).astype(bool)
    values = np.frombuffer(raw["small"], np.int8).astype(kind)
    values[values == ESCAPE] = np.frombuffer(raw["large"], kind)
    flat = np.zeros(count, kind)
    flat[where] = values
    return torch.from_numpy(flat)


def _compressed(raw: bytes | memoryview) -> Tensor:
    """The shorter of two zlib streams: matching wins where almost all is zero, plain Huffman codes where little is."""
    huffman = zlib.compressobj(LEVEL, strategy=zlib.Z_HUFFMAN_ONLY)
    found = min(zlib.compress(raw, LEVEL), huffman.compress(raw) + huffman.flush(), key=len)
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


@dataclass(frozen=True)
class Way:
    """The way back of one tensor: the two SHA-256, what the correction takes, and its streams with the factors."""

    facts: Mapping[str, str]
    stored_bits: int
    weights: int
    tensors: Mapping[str, Tensor]


class Recorder:
    """Collects what the way back needs while a merge runs, from any thread."""

    def __init__(self) -> None:
        self.ways: dict[str, Way] = {}

    def add(self, name: str, original: Tensor, value: Tensor, factors: tuple[Tensor, Tensor] | None) -> None:
        """One tensor: `original` became `value`, by left @ right or by something that is not low-rank."""
        tensors: dict[str, Tensor] = {}
        if factors is None:
            kept = {"whole": _compressed(raw_bytes(original))}
        else:
            left, right = factors
            kept = packed(steps(original, subtracted(value, left, right)))
            tensors = {"left": left.contiguous(), "right": right.contiguous()}
        facts = {"original": digest(original), "merged": digest(value)}
        bits = 8 * sum(stream.numel() for stream in kept.values())
        self.ways[name] = Way(facts, bits, original.numel(), {**tensors, **kept})

    @property
    def bits_per_weight(self) -> float:
        """Size of the correction, without the factors."""
        return sum(w.stored_bits for w in self.ways.values()) / max(1, sum(w.weights for w in self.ways.values()))

    def write(self, path: Path) -> None:
        named = {f"{name}|{key}": t for name in sorted(self.ways) for key, t in self.ways[name].tensors.items()}
        entries = tuple(Entry(name, t.dtype, tuple(t.shape)) for name, t in named.items())
        facts = {name: dict(self.ways[name].facts) for name in sorted(self.ways)}
        shard = Shard(path.name, entries, {"veneer_unmerge": json.dumps(facts)})
        with path.open("wb") as file:
            file.write(shard.header())
            for tensor in named.values():
                file.write(raw_bytes(tensor))


def unmerge(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the checkpoint that `folder` was merged from to `out`, bit for bit, or refuse.

    Every restored tensor is checked against the SHA-256 of the original. `folder` must have been merged with `unmergeable=True`.
    """
    place, source = Path(out), Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise Conflict(f"{place} is already there", help="choose a new folder, or remove this one")
    if not (source / RECORD).is_file():
        raise NotFound(
            f"{source} has no record of what it was merged from",
            help="merge with --unmergeable next time; this time use the original base",
        )
    record = open_tensors(source / RECORD)
    facts = _facts(record)
    model = _Merged(source)

    def produce(name: str) -> Tensor:
        return model.tensor(name) if name not in facts else _original(name, model.tensor(name), record, facts[name])

    def write(target: Path) -> None:
        model.copy_words(target)
        write_shards(target, model.shards(), produce)

    replace_folder(place, frozenset(), write)
    return place


class _Merged(FolderStore):
    """A merged folder without what the merge added to it."""

    def copy_words(self, folder: Path) -> None:
        super().copy_words(folder)
        copy_records(self.path, folder, but=RECORD)
        carded = (folder / NOTE).exists() and read_json(folder / NOTE).get("card")
        for name in OWN if carded else (NOTE, RECORD):
            (folder / name).unlink(missing_ok=True)
            for file in _kept(folder, name):
                file.rename(folder / file.name.replace(".base", "", 1))


def set_aside(folder: Path) -> None:
    """Make room for what a merge writes: files of these names, the base's own, get a `.base` into theirs.

    A base that was merged itself has files that were set aside: each moves one further, unmerging takes one back.
    """
    for name in OWN:
        for file in reversed(_kept(folder, name)):
            file.rename(file.with_suffix(f".base{file.suffix}"))


def copy_records(source: Path, folder: Path, *, but: str = "") -> None:
    """Copy the ways back that a merged folder has, which are no words and no weights."""
    for file in (file for file in _kept(source, RECORD) if file.name != but):
        shutil.copyfile(plain_file(source, file.name), folder / file.name)


def _kept(folder: Path, name: str) -> list[Path]:
    """The file of this name and those set aside, the latest first."""
    stem, suffix = (re.escape(part) for part in os.path.splitext(name))
    return sorted(
        (f for f in folder.iterdir() if re.fullmatch(rf"{stem}(\.base)*{suffix}", f.name)), key=lambda f: len(f.name)
    )


def _facts(record: TensorFile) -> dict[str, dict[str, str]]:
    try:
        found: dict[str, dict[str, str]] = json.loads(record.metadata["veneer_unmerge"])
    except (KeyError, ValueError) as error:
        raise FormatError(f"{record.path} is not a record of a merge") from error
    return found


def _original(name: str, value: Tensor, record: TensorFile, facts: dict[str, str]) -> Tensor:
    if digest(value) != facts["merged"]:
        raise FormatError(
            f"'{name}' is not what the merge wrote, so there is no way back from it",
            help="unmerge the folder as it was merged, or use the original base",
        )
    if f"{name}|whole" in record.tensors:
        raw = bytearray(zlib.decompress(bytes(raw_bytes(record.tensor(f"{name}|whole")))))
        original = torch.frombuffer(raw, dtype=value.dtype).view(value.shape)
    else:
        back = subtracted(value, record.tensor(f"{name}|left"), record.tensor(f"{name}|right"))
        streams = {key: record.tensor(f"{name}|{key}") for key in ("where", "small", "large")}
        bits = BITS[value.element_size()]
        original = (
            (back.view(bits).reshape(-1) + unpacked(streams, back.numel(), bits)).view(value.dtype).view(value.shape)
        )
    if digest(original) != facts["original"]:
        raise FormatError(
            f"the way back of '{name}' did not give the original bits",
            help="unmerge on the machine that merged: the product of the factors must round the same way",
        )
    return original
