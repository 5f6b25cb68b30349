"""Tensor files, read strictly: safetensors alone or in shards, mapped rather than copied. No pickle is ever opened.

A file from elsewhere is hostile until shown otherwise. The header is bounded before it is parsed, every offset is checked
against the file's size, tensors must tile the data exactly, and a link may not lead out of its folder. All problems are said in
one error.

The surprise: tensors come from a private copy-on-write mapping, so a careless write can't reach the file.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from veneer.errors import FormatError, NotFound, listed
from veneer.models.shards import INDEX, misplaced, refuse, strays, weight_map
from veneer.ops.finite import is_finite
from veneer.registry import did_you_mean

MAX_HEADER = 64 * 2**20
MAX_JSON = 32 * 2**20
COMMON = 2**20
"""Bytes of a header up to which it is remembered: adapters of one kind have one and the same."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its dtype as safetensors names it, and its bytes `[start, stop)` counted from the file's begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was checked. Tensors are views of a private mapping that lives as long as they do.

    header  its bytes as they stand in the file: files with one header differ in numbers alone
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    header: bytes

    @cached_property
    def _mapping(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, without a copy. Don't write to it."""
        if name not in self.tensors:
            raise NotFound(f"{self.path.name} has no tensor '{name}'", help=did_you_mean(name, list(self.tensors)))
        info = self.tensors[name]
        count = math.prod(info.shape)
        if count == 0:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype])
        flat = torch.frombuffer(self._mapping, dtype=DTYPES[info.dtype], count=count, offset=info.start)
        return flat.view(info.shape)

    def every(self) -> dict[str, Tensor]:
        """All tensors by name, in the order of their bytes: several times quicker than one by one."""
        found: dict[str, Tensor] = {}
        for dtype, infos, flat in self._runs():
            for name, info in infos:
                place = (info.start - infos[0][1].start) // dtype.itemsize
                found[name] = flat.as_strided(info.shape, _strides(info.shape), place)
        return found

    def is_finite(self) -> bool:
        """Whether no floating tensor holds a NaN or an infinity."""
        return all(is_finite(flat) for dtype, _, flat in self._runs() if dtype.is_floating_point)

    def _runs(self) -> Iterator[tuple[torch.dtype, list[tuple[str, TensorInfo]], Tensor]]:
        """Neighbours of one dtype, and all their numbers in one tensor."""
        ordered = sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].stop))
        for name, run in itertools.groupby(ordered, key=lambda item: item[1].dtype):
            dtype, infos = DTYPES[name], list(run)
            start, stop = infos[0][1].start, infos[-1][1].stop
            if start == stop:
                yield dtype, infos, torch.empty(0, dtype=dtype)
            else:
                count = (stop - start) // dtype.itemsize
                yield dtype, infos, torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=start)


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors by name, over one file or several."""

    files: tuple[TensorFile, ...]

    @cached_property
    def _home(self) -> dict[str, TensorFile]:
        return {name: file for file in self.files for name in file.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def file(self, name: str) -> TensorFile:
        """The file that holds `name`."""
        if name not in self._home:
            raise NotFound(f"this checkpoint has no tensor '{name}'", help=did_you_mean(name, list(self)))
        return self._home[name]

    def info(self, name: str) -> TensorInfo:
        return self.file(name).tensors[name]

    def tensor(self, name: str) -> Tensor:
        return self.file(name).tensor(name)


def plain_file(folder: Path, name: str) -> Path:
    """`folder/name` where that is an ordinary file of this folder; links may lead elsewhere only inside a hub cache."""
    path = folder / name
    if not path.exists():
        raise NotFound(f"{folder} has no {name}", help="give another folder, or copy the missing file into this one")
    real = path.resolve()
    if not stat.S_ISREG(os.stat(real).st_mode):
        raise FormatError(f"{path} is not an ordinary file")
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise FormatError(
            f"{path} is a link that leads out of its folder, to {real}", help="copy the file into the folder"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size."""
    size = path.stat().st_size
    if size > MAX_JSON:
        raise FormatError(f"{path} has {size} bytes, far more than such a file needs")
    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def open_tensors(path: Path) -> TensorFile:
    """Check the header of a safetensors file and map it."""
    if path.suffix in PICKLES:
        raise FormatError(f"{path} is a pickle, which can run code when it is read", help="convert it to safetensors")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or length > size - 8:
            raise FormatError(f"{path} is cut off: {size} bytes, and a header of {length} bytes was announced")
        if length > MAX_HEADER:
            raise FormatError(f"{path} announces a header of {length} bytes, more than the {MAX_HEADER} that are read")
        raw = file.read(length)
    understand = _understood if length <= COMMON else _understood.__wrapped__
    try:
        tensors, metadata, problems = understand(raw, size)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not JSON: {error}") from error
    if problems:
        raise FormatError(f"{path} is damaged:\n{listed(problems)}", help="fetch the file again")
    return TensorFile(path, tensors, metadata, raw)


@lru_cache(maxsize=32)
def _understood(raw: bytes, size: int) -> tuple[Mapping[str, TensorInfo], Mapping[str, str], list[str]]:
    """The tensors and the metadata that a header tells of in a file of `size` bytes, and what is wrong with it."""
    header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_twins)
    if not isinstance(header, dict):
        return {}, {}, ["the header is not an object"]
    metadata = header.pop("__metadata__", {})
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        metadata, problems = {}, ["__metadata__ must map names to texts"]
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        info = _entry(entry, 8 + len(raw))
        if isinstance(info, str):
            problems.append(f"'{name}' {info}")
        else:
            tensors[name] = info
    problems += _tiling(tensors, 8 + len(raw), size) if not problems else []
    return MappingProxyType(tensors), MappingProxyType(metadata), problems


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A `.safetensors` file, or a folder with `model.safetensors` or a sharded index."""
    place = Path(path)
    if place.is_file():
        return Checkpoint((open_tensors(place),))
    if not place.is_dir():
        raise NotFound(f"there is no checkpoint at {place}")
    if (place / "model.safetensors").exists():  # and an index beside it is not read, as in transformers
        return Checkpoint((open_tensors(plain_file(place, "model.safetensors")),))
    if (place / INDEX).exists():
        return _open_shards(place)
    pickles = sorted(p.name for p in place.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise FormatError(
            f"{place} has only pickles ({', '.join(pickles[:3])}), which can run code when they are read",
            help="convert them to safetensors",
        )
    raise NotFound(f"{place} has no model.safetensors and no {INDEX}")


def first_non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """A line for every floating tensor that holds a NaN or an infinity."""
    wrong = {n: t for n, t in tensors.items() if t.is_floating_point() and not is_finite(t.detach().reshape(-1))}
    counts = {name: int((~torch.isfinite(t.double())).sum()) for name, t in wrong.items()}
    return [f"'{name}' has {count} values that are not finite" for name, count in counts.items()]


def _open_shards(folder: Path) -> Checkpoint:
    where = weight_map(read_json(plain_file(folder, INDEX)), folder)
    gone = strays(where, folder)
    files = {name: open_tensors(plain_file(folder, name)) for name in sorted(set(where.values()) - gone.keys())}
    refuse(folder, [*gone.values(), *misplaced(where, {name: file.tensors for name, file in files.items()})])
    return Checkpoint(tuple(files.values()))


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _entry(entry: object, data_start: int) -> TensorInfo | str:
    """A checked header entry, or what is wrong with it."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "must have dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has a dtype that is not known: {dtype!r}"
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 8:
        return "has a shape or offsets that are not counts"
    start, stop = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != expected:
        return f"spans {stop - start} bytes, but {dtype} {shape} takes {expected}"
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + stop)


def _strides(shape: Sequence[int]) -> list[int]:
    """Of a tensor whose rows follow each other."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)


def _tiling(tensors: Mapping[str, TensorInfo], start: int, size: int) -> list[str]:
    """Tensors must follow each other without gap or overlap and end where the file ends."""
    at = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != at:
            return [f"'{name}' begins at byte {info.start}, expected {at}"]
        at = info.stop
    return [] if at == size else [f"the tensors end at byte {at}, the file at {size}"]
