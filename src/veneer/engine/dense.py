"""A base whose format has no product of its own (4 bits) is served from a dense copy, made once when the engine starts.

Decoding reads every weight in every step. A 4-bit weight would have to be unpacked each time, which costs more than reading it in
16 bits, so its projections are dequantised once to the dtype that products are computed in, and the cost is said in bytes. Dense
bases, int8 and bf12 (whose products of few rows read the codes where they lie) are served as they are.
"""

from __future__ import annotations

import logging

import psutil
import torch
from torch import Tensor

from veneer.base.quantized import QuantizedFrozen
from veneer.errors import ResourceError
from veneer.models.base import Base
from veneer.models.decoder import Decoder
from veneer.ops.low_rank import Frozen

log = logging.getLogger(__name__)


def servable(base: Base) -> tuple[Decoder, int]:
    """The decoder to serve `base` with, and the bytes that it takes beside the base: 0 where that is the base's own."""
    decoder = base.decoder
    packed = {n: g.frozen for n, g in decoder.groups.items() if isinstance(g.frozen, QuantizedFrozen)}
    packed = {n: f for n, f in packed.items() if not _multiplies(f)}
    if not packed:
        return decoder, 0
    size = sum(f.out_features * f.in_features * decoder.dtype.itemsize for f in packed.values())
    free = psutil.virtual_memory().available
    if size > free:
        raise ResourceError(
            f"this {base.quantize} base is served dequantised, which takes {size:,} bytes; {free:,} are free",
            help="load it with quantize='int8' or 'bf12', which are served from their codes",
        )
    dense = {name: _dense(frozen) for name, frozen in packed.items()}
    kind, short = base.quantize or "4-bit", str(decoder.dtype).removeprefix("torch.")
    log.info("the %s base is served in %s: dequantised once, %s bytes beside it", kind, short, f"{size:,}")
    return beside(decoder, dense), size


def beside(decoder: Decoder, tensors: dict[str, Tensor]) -> Decoder:
    """A decoder that reads these tensors (by their native names) in place of its model's; everything else is shared."""
    held: dict[str, Tensor | Frozen] = {spec.name: decoder.groups[spec.name].frozen for spec in decoder.layout.groups}
    held |= decoder.tensors
    made = Decoder(decoder.config, decoder.layout, {**held, **tensors})
    if not {"embed", "head"} & tensors.keys():
        made.groups["head"] = decoder.groups["head"]  # with its sketch
    return made


def _multiplies(frozen: QuantizedFrozen) -> bool:
    """Whether a product of a few rows reads the codes."""
    row = torch.zeros(1, frozen.in_features, dtype=torch.bfloat16)
    return all(part.few_rows(row) is not None for part in frozen.parts)


def _dense(frozen: QuantizedFrozen) -> Tensor:
    whole = torch.empty(frozen.out_features, frozen.in_features, dtype=frozen.dtype)
    start = 0
    for part in frozen.parts:
        part.dequantise(whole[start : start + part.shape[0]])
        start += part.shape[0]
    return whole
