"""Quantised projections as plain tensors, so that a base that was quantised once is mapped like any other.

A part `model.layers.0.self_attn.q_proj` becomes `model.layers.0.self_attn.q_proj:packed` and so on, one tensor for each field
of its storage. The embedding, the norms, the biases and the head stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.base.quantized import QuantizedFrozen, Storage, quantize_parts
from veneer.errors import Unsupported
from veneer.models.config import Layout, PartSpec
from veneer.ops.int8 import Int8Rows
from veneer.ops.low_rank import Frozen
from veneer.ops.nf4 import NF4, DoubleQuantised
from veneer.ops.scratch import Scratch


def pack(where: Layout, tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A base's native tensors with every projection but the head quantised, each part by itself."""
    found = dict(tensors)
    for group in where.groups:
        if group.name != "head":
            weight = found.pop(group.name)
            rows = [weight[part.start : part.stop] for part in group.parts]
            for part, storage in zip(group.parts, quantize_parts(rows, name), strict=True):
                found |= {f"{part.path}:{field}": tensor for field, tensor in _taken_apart(storage).items()}
    return found


def unpack(where: Layout, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor | Frozen]:
    """The decoder's tensors and products out of what `pack` made; nothing is copied."""
    scratch = Scratch()
    found: dict[str, Tensor | Frozen] = {name: tensor for name, tensor in tensors.items() if ":" not in name}
    for group in where.groups:
        if group.name != "head":
            parts = tuple(_put_together(tensors, part, group.in_features) for part in group.parts)
            found[group.name] = QuantizedFrozen(parts, dtype, scratch)
    return found


def _taken_apart(storage: Storage) -> dict[str, Tensor]:
    if isinstance(storage, Int8Rows):
        return {"codes": storage.codes, "absmax": storage.absmax}
    if not isinstance(storage, NF4):
        raise Unsupported(f"a {type(storage).__name__} cannot be kept in a file")
    scales = storage.absmax
    if isinstance(scales, DoubleQuantised):
        return {"packed": storage.packed, "codes": scales.codes, "absmax": scales.absmax, "offset": scales.offset}
    return {"packed": storage.packed, "absmax": scales}


def _put_together(tensors: Mapping[str, Tensor], part: PartSpec, in_features: int) -> Storage:
    path = part.path
    absmax = tensors[f"{path}:absmax"]
    if f"{path}:packed" not in tensors:
        return Int8Rows(tensors[f"{path}:codes"], absmax)
    double = f"{path}:offset" in tensors
    scales = DoubleQuantised(tensors[f"{path}:codes"], absmax, tensors[f"{path}:offset"]) if double else absmax
    return NF4(tensors[f"{path}:packed"], scales, (part.stop - part.start, in_features))
