"""Checkpoints as merge sees them: named tensors in files that can be written one tensor at a time.

`FolderStore` is a folder of safetensors files as transformers keeps it, shards and index included. `BaseStore` is a base that
came from elsewhere (a catalogue name, a .gguf file): its native tensors under the names and in the orientation that transformers
gives them, with config.json and the tokenizer's files.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from veneer.errors import FormatError, NotFound, Unsupported, VeneerError
from veneer.formats.card import licence_in
from veneer.formats.checkpoint import DTYPES, PICKLES, Checkpoint, TensorFile, open_checkpoint, plain_file, read_json
from veneer.merge.plan import Places
from veneer.models.base import Base
from veneer.models.catalog import CATALOG, find, is_installed
from veneer.models.checkpoint import RENAMED, shapes
from veneer.models.shards import INDEX
from veneer.models.sources import locate
from veneer.models.tokenizer_import import copy_tokenizer
from veneer.ops.threads import side_by_side

SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
PIECE = 1 << 18
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Written(Protocol):
    """A tensor that knows how to write itself."""

    def write(self, handle: int, start: int) -> None:
        """Put every byte of it into the file `handle`, from `start` on."""


@dataclass(frozen=True)
class Span(Written):
    """Bytes `[start, stop)` of a file: a tensor that is copied as it is."""

    path: Path
    start: int
    stop: int

    def write(self, handle: int, start: int) -> None:
        """Through a small buffer: reading a mapping costs a page fault for every few pages."""
        with self.path.open("rb", buffering=0) as source:
            source.seek(self.start)
            for at in range(self.start, self.stop, PIECE):
                content = source.read(min(PIECE, self.stop - at))
                if not content:
                    raise cut_short(self.path)
                start = _put(handle, start, memoryview(content))


def cut_short(path: Path) -> FormatError:
    return FormatError(f"{path} was cut short while it was read", help="fetch it again")


@dataclass(frozen=True)
class Shard:
    """One file: its tensors in order. `head` is its first bytes where they can be kept as they are."""

    file: str
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    head: bytes | None = None

    def header(self) -> bytes:
        if self.head is not None:
            return self.head
        fields: dict[str, Any] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        at = 0
        for entry in self.entries:
            offsets = [at, at + entry.nbytes]
            fields[entry.name] = {"dtype": NAME_OF[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
            at += entry.nbytes
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


class Store(ABC):
    """A checkpoint to merge into: it is read, never written."""

    name: str
    config: dict[str, Any]

    @abstractmethod
    def __contains__(self, name: object, /) -> bool: ...

    @abstractmethod
    def names(self) -> Sequence[str]: ...

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The tensor as stored; a view of a mapping where that is possible."""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).shape)

    def verbatim(self, name: str) -> Tensor | Span:
        """The same, to be written as it is."""
        return self.tensor(name)

    @abstractmethod
    def shards(self) -> tuple[Shard, ...]: ...

    @abstractmethod
    def copy_words(self, folder: Path) -> None:
        """Write everything that is no weight, config.json included."""


class FolderStore(Store):
    """A folder with config.json and safetensors files."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._checkpoint: Checkpoint = open_checkpoint(path)
        self.config = read_json(plain_file(path, "config.json"))
        if self.config.get("quantization_config"):
            method = self.config["quantization_config"].get("quant_method", "unknown")
            raise Unsupported(
                f"{path} is a quantised checkpoint ({method}): an update would be rounded away on its grid",
                help="merge into the unquantised checkpoint and quantise the result",
            )
        if self.config.get("tie_word_embeddings") and not Places(self).tied:
            self.config["tie_word_embeddings"] = False  # it stores another head, which counts for transformers too

    def __contains__(self, name: object, /) -> bool:
        return isinstance(name, str) and name in self._checkpoint

    def names(self) -> Sequence[str]:
        return list(self._checkpoint)

    def tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name)

    def verbatim(self, name: str) -> Span:
        file = self._checkpoint.file(name)
        return Span(file.path, file.tensors[name].start, file.tensors[name].stop)

    def shards(self) -> tuple[Shard, ...]:
        return tuple(_shard(file) for file in self._checkpoint.files)

    def copy_words(self, folder: Path) -> None:
        for entry in sorted(self.path.iterdir()):
            weights = entry.suffix in (".safetensors", ".gguf", *PICKLES) or entry.name.endswith(".index.json")
            if entry.is_file() and not weights and not entry.name.startswith("."):
                shutil.copyfile(plain_file(self.path, entry.name), folder / entry.name)


def _shard(file: TensorFile) -> Shard:
    order = sorted(file.tensors.items(), key=lambda item: item[1].start)
    with file.path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        handle.seek(0)
        head = handle.read(8 + length)
    return Shard(file.path.name, tuple(Entry(n, DTYPES[i.dtype], i.shape) for n, i in order), file.metadata, head)


class BaseStore(Store):
    """A loaded base, written as the checkpoint that transformers would have."""

    def __init__(self, base: Base) -> None:
        self.base, self.name = base, base.name
        dtype = str(base.dtype).removeprefix("torch.")
        self.config = {k: v for k, v in base.hf_config.items() if k not in ("quantization_config", "torch_dtype")}
        self.config["dtype"] = dtype
        if not base.hf_config:
            raise NotFound(
                f"the base '{base.name}' has no config.json, so no checkpoint can be written",
                help="load it from a folder or a .gguf file",
            )

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes(self.base.config, self.base.layout)

    @cached_property
    def _native(self) -> dict[str, str]:
        return {name: native for native, name in self.base.layout.tensors.items()}

    @cached_property
    def _kinds(self) -> dict[str, str]:
        return {part.path: group.kind for group in self.base.layout.groups for part in group.parts}

    def _canonical(self, name: str) -> str:
        return RENAMED.get(self.base.config.family, {}).get(name, name)

    def _public(self, name: str) -> str:
        back = {new: old for old, new in RENAMED.get(self.base.config.family, {}).items()}
        return back.get(name, name)

    def __contains__(self, name: object, /) -> bool:
        return (
            isinstance(name, str)
            and self._canonical(name) in self._shapes
            and self._public(self._canonical(name)) == name
        )

    def names(self) -> Sequence[str]:
        return [self._public(name) for name in self._shapes]

    def tensor(self, name: str) -> Tensor:
        name = self._canonical(name)
        if name in self._native:
            return self.base.decoder.tensors[self._native[name]]
        path, _, what = name.rpartition(".")
        host = self.base.host(path)
        if what == "bias":
            assert host.bias is not None
            return host.bias
        weight = host.weight()
        return (weight.t() if self._kinds[path] == "conv1d" else weight).contiguous()

    def shards(self) -> tuple[Shard, ...]:
        entries = [Entry(self._public(n), self.base.dtype, s) for n, s in self._shapes.items()]
        files: list[list[Entry]] = [[]]
        for entry in entries:
            if files[-1] and sum(e.nbytes for e in files[-1]) + entry.nbytes > SHARD_BYTES:
                files.append([])
            files[-1].append(entry)
        if len(files) == 1:
            return (Shard(SINGLE, tuple(files[0]), {"format": "pt"}),)
        count = len(files)
        return tuple(
            Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(file), {"format": "pt"})
            for i, file in enumerate(files, 1)
        )

    def copy_words(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(self.config, indent=2), "utf-8")
        if self.base.folder is not None:
            copy_tokenizer(self.base.folder, folder)


def with_extra(shards: Sequence[Shard], extra: Sequence[tuple[str, Entry]]) -> tuple[Shard, ...]:
    """`shards` with further tensors, each in the file that holds the tensor named beside it."""
    found = []
    for shard in shards:
        names = {entry.name for entry in shard.entries}
        mine = tuple(entry for neighbour, entry in extra if neighbour in names)
        grown = Shard(shard.file, shard.entries + mine, shard.metadata)
        found.append(grown if mine else shard)
    return tuple(found)


Produce: TypeAlias = Callable[[str], Tensor | Written]
Job: TypeAlias = tuple[int, int, Entry, Produce]
"""A file's handle, where the tensor begins in it, what it is, and what produces it."""


def write_shards(folder: Path, shards: Sequence[Shard], produce: Produce, workers: int = 1) -> None:
    """Write every file, and the index where there are several. Each worker holds one tensor at a time.

    produce  the tensor of a name, or what writes it. With several workers it is called from their threads, in any order
    workers  threads; they share the cores, so one computes while another writes
    """
    with side_by_side(workers) as pool:
        for shard in shards:
            head = shard.header()
            starts = itertools.accumulate((entry.nbytes for entry in shard.entries), initial=len(head))
            with (folder / shard.file).open("wb", buffering=0) as file:
                file.write(head)
                named = zip(starts, shard.entries, strict=False)
                _write_all([(file.fileno(), start, entry, produce) for start, entry in named], pool)
    if len(shards) > 1 or shards[0].file != SINGLE:
        entries = [(shard.file, entry) for shard in shards for entry in shard.entries]
        index = {
            "metadata": {
                "total_size": sum(entry.nbytes for _, entry in entries),
                "total_parameters": sum(math.prod(entry.shape) for _, entry in entries),
            },
            "weight_map": {entry.name: file for file, entry in sorted(entries, key=lambda pair: pair[1].name)},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2), "utf-8")


def _write_all(jobs: Sequence[Job], pool: Executor) -> None:
    """Do every job, or stop at the first that fails."""
    running = [pool.submit(_write_entry, *job) for job in jobs]
    try:
        for future in running:
            future.result()
    finally:
        for future in running:
            future.cancel()
        wait(running)


def _write_entry(handle: int, start: int, entry: Entry, produce: Produce) -> None:
    made = produce(entry.name)
    if isinstance(made, Tensor):
        _put(handle, start, raw_bytes(made))
    else:
        made.write(handle, start)
    if sys.platform == "linux":  # begin to write to the disk, and wait for nothing
        os.posix_fadvise(handle, start, entry.nbytes, os.POSIX_FADV_DONTNEED)


def _put(handle: int, start: int, content: memoryview) -> int:
    while len(content):
        done = os.pwrite(handle, content, start)
        start, content = start + done, content[done:]
    return start


def write_checkpoint(base: Base, folder: Path) -> None:
    """The bare base as a checkpoint folder that transformers loads, in the dtype that the base is held in."""
    store = BaseStore(base)
    folder.mkdir(parents=True, exist_ok=True)
    store.copy_words(folder)
    write_shards(folder, store.shards(), store.tensor)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def store_of(base: Base | str | Path) -> BaseStore | FolderStore:
    """The checkpoint behind a base: its own folder where it is one, else the base itself."""
    if isinstance(base, Base):
        folder = _source_folder(base)
        return BaseStore(base) if folder is None else FolderStore(folder)
    from veneer.models.load import load_base

    place = locate(str(base))
    if place.is_dir():
        return FolderStore(place)
    return BaseStore(load_base(base))


def licence(store: BaseStore | FolderStore) -> tuple[str, str] | None:
    """The base's licence and who states it: veneer's catalogue, or the card in the folder that the base came from."""
    return licence_at(store.path if isinstance(store, FolderStore) else _source(store.base))


def licence_at(place: Path | None) -> tuple[str, str] | None:
    """The same for the file or folder of a base."""
    if place is None or place.is_dir():
        return licence_in(place)
    named = next((name for name in CATALOG if is_installed(name) and find(name) == place), None)
    return None if named is None else (CATALOG[named].licence, "veneer's catalogue")


def _source(base: Base) -> Path | None:
    """The file or folder that `base` was loaded from, where it is still there."""
    if base.folder is None:
        return None
    try:
        return locate(base.source)
    except VeneerError:
        return None


def _source_folder(base: Base) -> Path | None:
    """The checkpoint folder that `base` was converted from, where it is still there, the same, and what `base` computes with."""
    source = _source(base)
    if base.quantize is not None or base.folder is None or source is None:
        return None
    if not (source / "config.json").is_file() or not list(source.glob("*.safetensors")):
        return None
    from veneer.models.convert import converted

    try:
        return source if converted(source, base.dtype).folder == base.folder else None
    except VeneerError:  # it was changed since into what cannot be loaded
        return None
