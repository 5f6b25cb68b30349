"""The converted weights: one safetensors file that is written tensor by tensor and read by mapping it.

Every tensor begins at a multiple of 64 bytes, as vector loads like it. The mapping is private and copy-on-write, so nothing
that happens to a tensor can reach the file. The surprise: safetensors forbids gaps, so padding is a tensor of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import FormatError

ALIGN = 64
PADDING = "_padding."
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
LARGEST_HEADER = 100_000_000


Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> dtype and shape, in file order."""


def entries_of(tensors: Mapping[str, Tensor]) -> Entries:
    """The entries of tensors at hand, as they are."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path: Path, entries: Entries, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Write `tensors`, which come in the order of `entries`, one at a time; return the SHA-256 of the file."""
    header, gaps = _header(entries)
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for (expected, (dtype, shape)), (name, tensor) in zip(entries.items(), tensors, strict=True):
            assert (name, tuple(tensor.shape)) == (expected, shape), f"{name} {list(tensor.shape)} for {expected}"
            raw = tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data
            for piece in (raw, bytes(gaps[name])):
                digest.update(piece)
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(layout: Entries) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, padded with spaces so that the data is aligned, and the gap after each tensor."""
    entries: dict[str, Any] = {}
    gaps: dict[str, int] = {}
    offset = 0
    for name, (dtype, shape) in layout.items():
        stop = offset + torch.Size(shape).numel() * dtype.itemsize
        gaps[name] = -stop % ALIGN
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        if gaps[name]:
            entries[f"{PADDING}{len(entries)}"] = {
                "dtype": "U8",
                "shape": [gaps[name]],
                "data_offsets": [stop, stop + gaps[name]],
            }
        offset = stop + gaps[name]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return struct.pack("<Q", len(text)) + text, gaps


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, sharing one private mapping of it. Nothing is read until it is used."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, LARGEST_HEADER):
                raise ValueError(f"its header claims {length} bytes of {size}")
            entries = json.loads(file.read(length))
    except (struct.error, ValueError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    start = 8 + length
    stop = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if start + stop != size:
        raise FormatError(f"{path} is damaged: {size} bytes, its header describes {start + stop}")
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    found: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if not name.startswith(PADDING):
            first, last = entry["data_offsets"]
            found[name] = whole[start + first : start + last].view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return found


def digest_of(path: Path) -> str:
    """SHA-256 of a file, a few megabytes at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
