"""Bytes, by formula. Decimal units throughout: 1 GB is 1e9 bytes.

    frozen weights   16-bit 2, fp32 4, NF4 0.5 + 4/64, NF4 + double quantisation 0.5 + 1/64 + 4/(64*256), int8 1 + 4/in,
                     bf12 1.5 + 1/in
    one trained number   4 (fp32 master) + 4 (gradient) + 8 (Adam's two moments) = 16 bytes

QLoRA (arXiv 2305.14314) for the quantised weights; Korthikanti et al. (arXiv 2205.05198) for activations of a plain
transformer block, kept here because everyone quotes it. What the native decoder keeps is in `activations.py`.
The surprise: 16 bytes a number is right for two different reasons; see `FULL_RECIPES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from veneer.base.formats import load_all
from veneer.plan.counts import Counted
from veneer.plan.sizes import Sizes
from veneer.registry import Registry

DENSE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number."""


def stored_bytes(format: str, rows: int, columns: int) -> int:
    """A frozen `[rows, columns]` weight in a dtype, or in a format of `base/formats/`."""
    return DENSE[format] * rows * columns if format in DENSE else load_all()[format].nbytes(rows, columns)


def linear_bytes(sizes: Sizes, format: str) -> int:
    """The projections in `format`, each tensor quantised by itself as in the file."""
    return sum(stored_bytes(format, rows, columns) for rows, columns in sizes.linear)


def base_bytes(sizes: Sizes, dtype: str, quantize: str | None = None) -> int:
    """A frozen base in memory: projections in `quantize` (or `dtype`), everything else in `dtype`."""
    rest = stored_bytes(dtype, 1, sizes.embedding + sizes.head + sizes.other)
    return linear_bytes(sizes, quantize or dtype) + rest


MASTER, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes for each trained number: fp32 value, fp32 gradient, Adam's two fp32 moments."""

TRAINED = MASTER + GRADIENT + MOMENTS


def two_moments(trained: Sequence[Counted]) -> int:
    """Adam's state for these tensors: two fp32 numbers each."""
    return MOMENTS * sum(tensor.numbers for tensor in trained)


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
