"""`load_base`: a name, a folder, a .gguf file or a hub id becomes a `Base`.

The first load converts the checkpoint into the cache; later ones map the converted file, so a start costs almost nothing and
two processes share one copy in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from veneer.base.quantized import QUANTISATIONS, QuantizedFrozen, quantize_parts
from veneer.errors import ConfigError, FormatError, Unsupported
from veneer.models import mapped
from veneer.models.base import Base
from veneer.models.catalog import CATALOG
from veneer.models.checkpoint import native_shapes
from veneer.models.config import Layout
from veneer.models.convert import Converted, converted, require_memory, verify, weight_bytes
from veneer.models.decoder import Decoder
from veneer.models.dtype import resolve
from veneer.models.families import decoder_config, layout
from veneer.models.sources import locate
from veneer.ops.low_rank import Frozen
from veneer.ops.scratch import Scratch
from veneer.registry import did_you_mean


def load_base(
    name: str | Path, dtype: str | torch.dtype = "auto", quantize: str | None = None, device: str | torch.device = "cpu"
) -> Base:
    """The base called `name`: a catalogue name, a folder, a .gguf file, or a hub id (`owner/name`).

    dtype     "float32", "bfloat16", or "auto": bfloat16 where this machine multiplies it faster
    quantize  a 4- or 8-bit format for the projections, or None
    Raises `NotFound`, `FormatError` (a damaged or incomplete checkpoint, everything wrong listed), `Unsupported` (a family
    outside the table) and `ResourceError` (no room in memory or on disk, said before loading).
    """
    where = torch.device(device)
    if quantize is not None:
        _require_quantisation(quantize, where)
    label = str(name)
    path = locate(label)
    pinned = CATALOG[label].sha256 if label in CATALOG else None
    found = converted(path, resolve(dtype, where), sha256=pinned)
    title = label if label in CATALOG else path.stem if path.is_file() else path.resolve().name
    return open_converted(found, title, where, quantize)


def open_converted(found: Converted, name: str, device: torch.device, quantize: str | None = None) -> Base:
    """A base out of the cache, mapped; with `quantize` its projections are packed and the mapping is given back."""
    raw, facts = found.config(), found.facts()
    config = decoder_config(raw)
    where = layout(config)
    sizes = native_shapes(config, where)
    require_memory(weight_bytes(sizes, found.dtype), f"the base '{name}'")
    verify(found)
    tensors = mapped.read(found.weights)
    wrong = [n for n, shape in sizes.items() if n not in tensors or tuple(tensors[n].shape) != shape]
    if wrong:
        raise FormatError(
            f"the converted weights {found.weights} lack {', '.join(wrong[:5])}",
            help=f"delete {found.folder}; the base is converted again at the next start",
        )
    if device.type != "cpu":
        tensors = {n: tensor.to(device) for n, tensor in tensors.items()}
    held: Mapping[str, Tensor | Frozen] = tensors if quantize is None else _quantized(where, tensors, quantize)
    samples = {target: tuple(values) for target, values in facts["samples"].items()}
    return Base(name, Decoder(config, where, held), facts["identity"], samples, raw, found.folder)


def _require_quantisation(quantize: str, device: torch.device) -> None:
    if quantize not in QUANTISATIONS:
        raise ConfigError(f"quantize is {quantize!r}", help=did_you_mean(quantize, list(QUANTISATIONS)))
    if device.type != "cpu":
        raise Unsupported(f"quantised bases run on the CPU, not on {device}", help='device="cpu", or quantize=None')


def _quantized(where: Layout, tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor | Frozen]:
    """The same tensors with every projection packed, part by part. Embedding, norms, biases and the head stay dense."""
    scratch = Scratch()
    found: dict[str, Tensor | Frozen] = {}
    for group in where.groups:
        if group.name != "head":
            rows = [tensors[group.name][part.start : part.stop] for part in group.parts]
            found[group.name] = QuantizedFrozen(quantize_parts(rows, name), rows[0].dtype, scratch)
    return found | {n: tensor.clone() for n, tensor in tensors.items() if n not in found}
