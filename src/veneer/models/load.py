"""`load_base`: a name, a folder, a .gguf file or a hub id becomes a `Base`.

The first load converts the checkpoint into the cache; later ones map the converted file, so a start costs almost nothing and
two processes share one copy in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from veneer.base.formats import load_all
from veneer.errors import ConfigError, FormatError, Unsupported
from veneer.models import mapped
from veneer.models.base import Base
from veneer.models.catalog import CATALOG
from veneer.models.checkpoint import native_shapes
from veneer.models.convert import Converted, converted, require_memory, verify
from veneer.models.decoder import Decoder
from veneer.models.dtype import resolve
from veneer.models.families import decoder_config, layout
from veneer.models.packed import unpack
from veneer.models.sources import locate
from veneer.ops.low_rank import Frozen
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
    found = converted(path, resolve(dtype, where), quantize, sha256=pinned)
    title = label if label in CATALOG else path.stem if path.is_file() else path.resolve().name
    return open_converted(found, title, where, label)


def open_converted(found: Converted, name: str, device: torch.device, source: str = "") -> Base:
    """A base out of the cache, mapped."""
    raw, facts = found.config(), found.facts()
    config = decoder_config(raw)
    where = layout(config)
    require_memory(found.weights.stat().st_size, f"the base '{name}'")
    verify(found)
    tensors = mapped.read(found.weights)
    if device.type != "cpu":
        tensors = {n: tensor.to(device) for n, tensor in tensors.items()}
    held: Mapping[str, Tensor | Frozen] = tensors
    if found.quantize is not None:
        held = unpack(where, tensors, found.dtype, found.quantize)
    wrong = [n for n, shape in native_shapes(config, where).items() if n not in held or _shape(held[n]) != shape]
    if wrong:
        raise FormatError(
            f"the converted weights {found.weights} lack {', '.join(wrong[:5])}",
            help=f"delete {found.folder}; the base is converted again at the next start",
        )
    samples = {target: tuple(values) for target, values in facts["samples"].items()}
    decoder = Decoder(config, where, held)
    return Base(name, decoder, facts["identity"], samples, raw, found.folder, found.quantize, source)


def _shape(held: Tensor | Frozen) -> tuple[int, ...]:
    return tuple(held.shape) if isinstance(held, Tensor) else (held.out_features, held.in_features)


def _require_quantisation(quantize: str, device: torch.device) -> None:
    known = load_all()
    if quantize not in known:
        raise ConfigError(f"quantize is {quantize!r}", help=did_you_mean(quantize, list(known)))
    if device.type != "cpu":
        raise Unsupported(f"quantised bases run on the CPU, not on {device}", help='device="cpu", or quantize=None')
