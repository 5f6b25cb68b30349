"""bf16 weights in twelve bits, with nothing lost; arXiv 2504.11651. The arithmetic is in `ops/twelve_bit.py`."""

from __future__ import annotations

from veneer.base.formats._abstract import QUANTISATIONS, Format
from veneer.ops import twelve_bit

QUANTISATIONS["bf12"] = Format(
    twelve_bit.quantise,
    twelve_bit.restored,
    twelve_bit.bytes_of,
    "bf16 exactly, its high byte in four bits, 12 + 8 / columns bits a weight",
    "2504.11651",
)
