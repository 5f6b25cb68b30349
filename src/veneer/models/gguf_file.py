"""The container of a .gguf file: metadata fields and where each tensor's bytes are.

The layout is ggml's specification (version 2 and 3, little-endian): counts, then typed key-value pairs, then tensor records, then
the data. `gguf` dequantises; its own reader makes a numpy view for every string of the vocabulary and takes seconds for that.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import FormatError, Unsupported

MAGIC = b"GGUF"
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Record:
    """One tensor: `[out, in]` shape, ggml's type number, first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


def _file_under(found: dict[str, Any], name: str, value: Any) -> None:
    if name in found:
        raise ValueError(f"{name} stands in it twice")
    found[name] = value


class Container:
    """An open .gguf file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._at = 0
            self.fields, self.tensors = self._parse()
        except Unsupported:
            raise
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError, RecursionError) as error:
            raise FormatError(
                f"{path} is not a complete GGUF file: {error or type(error).__name__}", help="copy or download it again"
            ) from error

    def _parse(self) -> tuple[dict[str, Any], dict[str, Record]]:
        if self._bytes[:4] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3 (little-endian)")
        count, pairs = self._scalar("<Q"), self._scalar("<Q")
        fields: dict[str, Any] = {}
        for _ in range(pairs):
            _file_under(fields, self._string(), self._value(self._scalar("<I")))
        alignment = fields.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its tensors are aligned to {alignment!r}, expected a power of two")
        records: dict[str, Record] = {}
        for _ in range(count):
            name, dimensions = self._string(), self._scalar("<I")
            if dimensions > MOST_DIMENSIONS:
                raise ValueError(f"{name} has {dimensions} dimensions, expected at most {MOST_DIMENSIONS}")
            shape = tuple(reversed([self._scalar("<Q") for _ in range(dimensions)]))
            _file_under(records, name, Record(shape, self._scalar("<I"), self._scalar("<Q")))
        begin = self._at + -self._at % alignment
        placed = {name: Record(r.shape, r.kind, begin + r.start) for name, r in records.items()}
        last = max((r.start + self.size_of(r) for r in placed.values()), default=0)
        if last > len(self._bytes):
            raise ValueError(f"{len(self._bytes)} bytes, its tensors end at {last}")
        return fields, placed

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self._bytes, self._at)
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        if self._at + length > len(self._bytes):
            raise ValueError(f"a text of {length} bytes does not fit")
        text = self._bytes[self._at : self._at + length].decode("utf-8", "replace")
        self._at += length
        return text

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(SCALARS[kind])
        inner, length = self._scalar("<I"), self._scalar("<Q")
        if length > len(self._bytes):
            raise ValueError(f"a list of {length} entries does not fit")
        if inner not in SCALARS:
            return [self._value(inner) for _ in range(length)]
        code = f"<{length}{SCALARS[inner][1]}"
        values = struct.unpack_from(code, self._bytes, self._at)
        self._at += struct.calcsize(code)
        return list(values)

    def size_of(self, record: Record) -> int:
        """Bytes of one tensor."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if record.kind not in {int(kind) for kind in GGML_QUANT_SIZES}:
            raise Unsupported(
                f"{self.path} stores tensors as the unknown ggml type {record.kind}",
                help="use a file in another quantisation, Q4_K_M or Q8_0 for example",
            )
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(record.kind)]
        if record.shape and record.shape[-1] % block:
            raise ValueError(f"rows of {record.shape[-1]} numbers are no whole blocks of {block}")
        return math.prod(record.shape) // block * int(size)

    def dense(self, name: str) -> Tensor:
        """One tensor, dequantised to fp32, in its stored order."""
        import numpy as np
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        record = self.tensors[name]
        kind = GGMLQuantizationType(record.kind)
        raw = np.frombuffer(self._bytes, np.uint8, self.size_of(record), record.start)
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind)
        shaped = (
            raw.view(plain).reshape(record.shape)
            if plain
            else raw.reshape(quant_shape_to_byte_shape(record.shape, kind))
        )
        try:
            values = dequantize(shaped, kind)
        except NotImplementedError as error:
            raise Unsupported(
                f"{self.path} stores {name} as {kind.name}, which cannot be dequantised here",
                help="use a file in another quantisation, Q4_K_M or Q8_0 for example",
            ) from error
        return torch.from_numpy(values.astype(np.float32, copy=True))
