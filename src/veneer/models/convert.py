"""A checkpoint, converted once into the cache: native tensors in one mapped file per dtype, words and facts beside them.

A converted base is found by the digest of its source files. The surprise: identity and samples come from the source's own
precision while it streams by, so the bf16 and the fp32 copy know that they are one base.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.base.identity import Hasher, sampled
from veneer.base.memory import available_bytes
from veneer.errors import FormatError, ResourceError, listed
from veneer.files import cache_folder, sweep
from veneer.models import mapped
from veneer.models.cache import (
    digest_of_files,
    existing,
    locked,
    read_json,
    refusals,
    remember,
    replacing,
    write_json,
)
from veneer.models.checkpoint import RENAMED, canonical, native_shapes, native_tensors
from veneer.models.config import DecoderConfig, Layout
from veneer.models.dtype import DTYPES, NAMES
from veneer.models.families import decoder_config, layout
from veneer.models.packed import pack
from veneer.models.sources import Source, config_of, files_of, open_source

VERSION = 4  # of what is in a converted folder; a new number leaves older folders alone


@dataclass(frozen=True)
class Converted:
    """A base in the cache, dense or with its projections packed in the format `quantize`."""

    folder: Path
    dtype: torch.dtype
    quantize: str | None = None

    @property
    def format(self) -> str:
        """`bfloat16`, or `bfloat16.nf4`."""
        return ".".join(filter(None, (NAMES[self.dtype], self.quantize)))

    @property
    def weights(self) -> Path:
        return self.folder / f"weights.{self.format}.safetensors"

    @property
    def stamp(self) -> Path:
        """Size, time and SHA-256 of the weights file: written last, so its presence means that all is there."""
        return self.folder / f"weights.{self.format}.json"

    def facts(self) -> dict[str, Any]:
        return read_json(self.folder / "base.json")

    def config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    def is_complete(self) -> bool:
        return self.stamp.is_file() and self.weights.is_file() and (self.folder / "base.json").is_file()


def converted(path: Path, dtype: torch.dtype, quantize: str | None = None, *, sha256: str | None = None) -> Converted:
    """The cached form of the checkpoint at `path`, made now if there is none. `sha256` is what a single file must have.

    A quantised form is made from the dense one in `dtype`, so its numbers are those of whoever quantises that checkpoint.
    """
    if path.is_dir():
        decoder_config(config_of(path))  # a family that is not known is refused before gigabytes are hashed
    digests = digest_of_files(files_of(path))
    if sha256 is not None and sha256 not in digests.values():
        raise FormatError(
            f"{path} has the SHA-256 {next(iter(digests.values()))[:12]}, expected {sha256[:12]}",
            help="the file is damaged or another version; reinstall its package",
        )
    name = f"v{VERSION}-{hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:32]}"
    dense = Converted(cache_folder() / "bases" / name, dtype)
    found = replace(dense, quantize=quantize)
    if not found.is_complete():
        with locked(name), refusals(found.folder):
            sweep(found.folder.parent, name)
            sweep(found.folder)
            if not dense.is_complete():
                _convert(open_source(path), path, dense, need_whole=quantize is None)
            if quantize is not None and not found.is_complete():
                _quantize(dense, found, quantize)
    return found


def _quantize(dense: Converted, found: Converted, name: str) -> None:
    tensors = pack(layout(decoder_config(dense.config())), mapped.read(dense.weights), name)
    with replacing(found.weights) as part:
        digest = mapped.write(part, mapped.entries_of(tensors), tensors.items())
    _stamp(found, digest)


def verify(found: Converted) -> None:
    """Refuse a weights file that changed since it was written. Its bytes are hashed only where its size or time changed."""
    stamp = read_json(found.stamp)
    stat = found.weights.stat()
    if [stat.st_size, stat.st_mtime_ns] == [stamp["size"], stamp["mtime_ns"]]:
        return
    if stat.st_size != stamp["size"] or mapped.digest_of(found.weights) != stamp["sha256"]:
        raise FormatError(
            f"the converted weights {found.weights} were damaged since they were written",
            help=f"delete {found.folder}; the base is converted again at the next start",
        )
    remember(found.stamp, stamp | {"mtime_ns": stat.st_mtime_ns})


class _Recorder:
    """Reads a checkpoint by canonical names and takes down what identifies it as the tensors pass."""

    def __init__(self, source: Source, names: dict[str, str], where: Layout) -> None:
        self._source, self._names = source, names
        self._targets = {f"{part.path}.weight": (part.path, g.kind) for g in where.groups for part in g.parts}
        self._targets[where.tensors["embed"]] = (where.embed_path, "embedding")
        self.hasher = Hasher()
        self.samples: dict[str, tuple[float, ...]] = {}
        self.bad: list[str] = []

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(self._names[name])
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            self.bad.append(f"{name} has {int((~finite).sum())} values that are NaN or infinite")
        self.hasher.add(name, tensor)
        if name in self._targets:
            target, kind = self._targets[name]
            self.samples[target] = sampled(tensor.t() if kind == "conv1d" else tensor)
        return tensor


def _convert(source: Source, path: Path, found: Converted, *, need_whole: bool) -> None:
    raw = _untied(source)
    config = decoder_config(raw)
    where = layout(config)
    recorder = _Recorder(source, canonical(config, where, source.shapes, str(path)), where)
    sizes = native_shapes(config, where)
    _require_room(sizes, found, need_whole=need_whole)
    if (found.folder / "base.json").is_file():
        _write_weights(found, recorder, config, where, sizes)
        return
    with replacing(found.folder) as part:
        part.mkdir()
        _write_weights(Converted(part, found.dtype), recorder, config, where, sizes)
        source.tokenizer_files(part)
        facts = {
            "version": VERSION,
            "source": str(path),
            "identity": recorder.hasher.identity(),
            "samples": recorder.samples,
        }
        (part / "config.json").write_text(json.dumps(raw, indent=1), "utf-8")
        (part / "base.json").write_text(json.dumps(facts), "utf-8")


def _write_weights(
    into: Converted,
    recorder: _Recorder,
    config: DecoderConfig,
    where: Layout,
    sizes: dict[str, tuple[int, ...]],
) -> None:
    entries = {name: (into.dtype, shape) for name, shape in sizes.items()}
    with replacing(into.weights) as part:
        digest = mapped.write(part, entries, native_tensors(config, where, recorder.read))
        if recorder.bad:
            raise FormatError(
                f"the checkpoint holds values that are not finite:\n{listed(recorder.bad)}",
                help="use another copy of it: this one would answer nothing but NaN",
            )
    _stamp(into, digest)


def _stamp(written: Converted, digest: str) -> None:
    stat = written.weights.stat()
    write_json(written.stamp, {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest})


def weight_bytes(sizes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in sizes.values()) * dtype.itemsize


def require_memory(need: int, what: str) -> None:
    """Refuse before loading what would not fit."""
    available = available_bytes()
    if need > available:
        raise ResourceError(
            f"{what} needs {need / 1e9:.2f} GB of memory, {available / 1e9:.2f} GB are free",
            help='close other programs, use dtype "bfloat16" or a quantised base, or choose a smaller one',
        )


def _require_room(sizes: dict[str, tuple[int, ...]], found: Converted, *, need_whole: bool) -> None:
    """Memory for one tensor in full precision while it is joined and for what will be held, and disk for the file."""
    largest = max(torch.Size(shape).numel() for shape in sizes.values())
    whole = weight_bytes(sizes, found.dtype) if need_whole else 0
    require_memory(max(whole, 3 * 4 * largest), f"a base of this size in {NAMES[found.dtype]}")
    need, free = weight_bytes(sizes, found.dtype), shutil.disk_usage(existing(cache_folder())).free
    if need > free:
        raise ResourceError(
            f"the converted base takes {need / 1e9:.2f} GB, the disk of {cache_folder()} has {free / 1e9:.2f} GB free",
            help="make room, or set VENEER_CACHE to a folder on another disk",
        )


def _untied(source: Source) -> dict[str, Any]:
    """The checkpoint's config, with a head of its own where the file has one that differs from the embedding."""
    raw = dict(source.config)
    config = decoder_config(raw)
    where = layout(config)
    stored = source.shapes
    head = f"{where.head_path}.weight"
    called = {head, *(old for old, new in RENAMED.get(config.family, {}).items() if new == head)} & set(stored)
    if not config.tied_head or not called or where.tensors["embed"] not in stored:
        return raw
    same = torch.equal(source.read(min(called)), source.read(where.tensors["embed"]))
    return raw if same else raw | {"tie_word_embeddings": False}


def local_bases() -> Iterator[Converted]:
    """What the cache holds, one entry per base and format."""
    for stamp in sorted((cache_folder() / "bases").glob(f"v{VERSION}-*/weights.*.json")):
        _, dtype, *quantize = stamp.name.removesuffix(".json").split(".")
        found = Converted(stamp.parent, DTYPES[dtype], *quantize)
        if found.is_complete():
            yield found
