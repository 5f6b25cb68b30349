"""Quantised projections as plain tensors, so that a base that was quantised once is mapped like any other.

A part `model.layers.0.self_attn.q_proj` becomes `model.layers.0.self_attn.q_proj:packed` and so on, one tensor for each field
of its storage. The embedding, the norms, the biases and the head stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.base.formats import load_all
from veneer.base.quantized import QuantizedFrozen, quantize_parts
from veneer.models.config import Layout
from veneer.ops.low_rank import Frozen
from veneer.ops.scratch import Scratch


def pack(where: Layout, tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A base's native tensors with every projection but the head quantised, each part by itself."""
    found = dict(tensors)
    for group in where.groups:
        if group.name != "head":
            weight = found.pop(group.name)
            rows = [weight[part.start : part.stop] for part in group.parts]
            for part, storage in zip(group.parts, quantize_parts(rows, name), strict=True):
                found |= {f"{part.path}:{field}": tensor for field, tensor in storage.tensors().items()}
    return found


def unpack(where: Layout, tensors: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> dict[str, Tensor | Frozen]:
    """The decoder's tensors and products out of what `pack` made in the format `name`; nothing is copied."""
    scratch, restore = Scratch(), load_all()[name].restore
    fields: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Tensor | Frozen] = {}
    for key, tensor in tensors.items():
        path, colon, field = key.partition(":")
        if colon:
            fields.setdefault(path, {})[field] = tensor
        else:
            found[key] = tensor
    for group in where.groups:
        if group.name != "head":
            sizes = {part.path: (part.stop - part.start, group.in_features) for part in group.parts}
            parts = tuple(restore(fields[path], size) for path, size in sizes.items())
            found[group.name] = QuantizedFrozen(parts, dtype, scratch)
    return found
