"""Bytes, by formula. Decimal units throughout: 1 GB is 1e9 bytes.

    frozen weights   16-bit 2, fp32 4, NF4 0.5 + 4/64, NF4 + double quantisation 0.5 + 1/64 + 4/(64*256), int8 1 + 4/in
    one trained number   4 (fp32 master) + 4 (gradient) + 8 (Adam's two moments) = 16 bytes

QLoRA (arXiv 2305.14314) for the quantised weights; Korthikanti et al. (arXiv 2205.05198) for activations of a plain
transformer block, kept here because everyone quotes it. What the native decoder keeps is in `activations.py`.
The surprise: 16 bytes a number is right for two different reasons; see `FULL_RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from veneer.plan.sizes import Sizes
from veneer.registry import Registry

BLOCK = 64
"""Weights that share one absmax in NF4."""
DQ_BLOCK = 256
"""Absmax values that share one scale in double quantisation."""

FORMATS: Registry[Callable[[int, int], int]] = Registry("weight format")
"""Name -> bytes of a frozen `[rows, columns]` weight."""
FORMATS["float32"] = lambda rows, columns: 4 * rows * columns
FORMATS["bfloat16"] = lambda rows, columns: 2 * rows * columns
FORMATS["float16"] = FORMATS["bfloat16"]


@FORMATS.register("nf4")
def _nf4(rows: int, columns: int) -> int:
    """Two numbers a byte, and one fp32 absmax for every 64."""
    numbers = rows * columns
    return _ceil(numbers, 2) + 4 * _ceil(numbers, BLOCK)


@FORMATS.register("nf4-dq")
def _nf4_dq(rows: int, columns: int) -> int:
    """The absmax values in 8 bits, one fp32 scale for 256 of them, and one fp32 mean."""
    numbers = rows * columns
    blocks = _ceil(numbers, BLOCK)
    return _ceil(numbers, 2) + blocks + 4 * _ceil(blocks, DQ_BLOCK) + 4


@FORMATS.register("int8")
def _int8(rows: int, columns: int) -> int:
    """One byte a number, and one fp32 scale a row."""
    return rows * columns + 4 * rows


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def linear_bytes(sizes: Sizes, format: str) -> int:
    """The projections in `format`, each tensor quantised by itself as in the file."""
    return sum(FORMATS[format](rows, columns) for rows, columns in sizes.linear)


def base_bytes(sizes: Sizes, dtype: str, quantize: str | None = None) -> int:
    """A frozen base in memory: projections in `quantize` (or `dtype`), everything else in `dtype`."""
    rest = FORMATS[dtype](1, sizes.embedding + sizes.head + sizes.other)
    return linear_bytes(sizes, quantize or dtype) + rest


MASTER, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes for each trained number: fp32 value, fp32 gradient, Adam's two fp32 moments."""

TRAINED = MASTER + GRADIENT + MOMENTS


def copies_bytes(trained: int, itemsize: int, *, packed: bool) -> int:
    """What a pass holds of the adapter beside its state.

    The gradient of the packed tensors, their copy in the compute dtype, and, where the tensors are stacked or scaled
    on the way to the decoder (`packed`: everything but an override), the packed tensors themselves.
    """
    return trained * (GRADIENT + (MASTER if packed else 0) + (itemsize if itemsize < 4 else 0))


FULL_RECIPES: Registry[int] = Registry("full fine-tuning recipe")
"""Bytes a parameter under the conventions that papers and tools use, weights included."""
FULL_RECIPES["mixed"] = 2 + 2 + 4 + 8  # 16-bit weights and gradients, fp32 master and moments
FULL_RECIPES["no-master"] = 2 + 2 + 8
FULL_RECIPES["16-bit"] = 2 + 2 + 4
FULL_RECIPES["fp32-gradients"] = 2 + 4 + 4 + 8  # what veneer does: the base stays, the override is trained in fp32


Policy = Literal["none", "selective", "full"]


def block_activations(
    hidden: int, heads: int, layers: int, tokens: int, *, batch: int = 1, policy: Policy = "none"
) -> int:
    """Activations of a plain GPT in fp16 (FFN 4h, dropout), arXiv 2205.05198.

    policy  "none": s b h (34 + 5 a s / h).  "selective": attention scores recomputed, 34 s b h (also flash attention).
            "full": the block inputs only, 2 s b h a layer and one live block.
    """
    size = tokens * batch * hidden
    scores = 5 * heads * tokens * tokens * batch
    return layers * {"none": 34 * size + scores, "selective": 34 * size, "full": 2 * size}[policy]
