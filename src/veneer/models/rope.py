"""Rotary frequencies and their scalings, arXiv 2104.09864.

angle(position, i) = position * inv_freq[i], with inv_freq[i] = theta^(-2i/dim). A scaling changes inv_freq, and for YaRN and
LongRoPE also the length of the rotated vector (`attention_factor`, folded into cos and sin).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.errors import Unsupported
from veneer.models.config import Rope


class RopeTable:
    """cos and sin by position, fp32 `[positions, dim/2]`, grown when a later position is asked for.

    short  the longest sequence that is turned by the ordinary frequencies
    """

    def __init__(self, rope: Rope, head_dim: int, max_positions: int, device: torch.device) -> None:
        self._rope, self._dim, self._max, self._device = rope, rope.dim or head_dim, max_positions, device
        self.short = _longest_short(rope, max_positions)
        self._tables: dict[bool, tuple[Tensor, Tensor]] = {}

    @property
    def half(self) -> int:
        """Pairs of dimensions that turn."""
        return self._dim // 2

    def at(self, positions: Tensor, runs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """cos, sin `[N, dim/2]` for `[N]` positions; `runs` are their (length, end position of the whole sequence).

        LongRoPE and dynamic scaling turn a long sequence by other frequencies than a short one.
        """
        longest = max((end for _, end in runs), default=0)
        if longest <= self.short:
            return self._lookup(positions, longest)
        parts = zip(positions.split([n for n, _ in runs]), runs, strict=True)
        pieces = [self._lookup(piece, end) for piece, (_, end) in parts]
        return torch.cat([cos for cos, _ in pieces]), torch.cat([sin for _, sin in pieces])

    def _lookup(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        long = end > self.short
        if long and self._rope.scaling["rope_type"] == "dynamic":  # other frequencies for every length
            return self._angles(positions, end)
        table = self._tables.get(long)
        if table is None or end > len(table[0]):
            grown = torch.arange(max(end, 512 if table is None else 2 * len(table[0])), device=self._device)
            table = self._tables[long] = self._angles(grown, end if long else 1)
        cos, sin = table
        return cos[positions], sin[positions]

    def _angles(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        frequencies, factor = scaled_frequencies(self._rope, self._dim, self._max, length)
        angles = positions[:, None].float() * frequencies.to(self._device)
        return angles.cos() * factor, angles.sin() * factor


def _longest_short(rope: Rope, max_positions: int) -> float:
    """The longest sequence that is turned by the ordinary frequencies."""
    kind = rope.scaling.get("rope_type")
    if kind == "longrope" and rope.scaling["short_factor"] != rope.scaling["long_factor"]:
        return float(rope.scaling.get("original_max_position_embeddings") or max_positions)
    return float(max_positions) if kind == "dynamic" else math.inf


def scaled_frequencies(rope: Rope, dim: int, max_positions: int, length: int) -> tuple[Tensor, float]:
    """inv_freq `[dim/2]` in fp32 and the attention factor, for a sequence of `length`."""
    scaling = rope.scaling
    kind = scaling.get("rope_type", "default")
    theta = _dynamic(rope, dim, max_positions, length) if kind == "dynamic" else rope.theta
    inverse = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    if kind in ("default", "dynamic"):
        return inverse, 1.0
    if kind == "linear":
        return inverse / float(scaling["factor"]), 1.0
    if kind == "llama3":
        return _llama3(inverse, scaling), 1.0
    if kind == "yarn":
        return _yarn(inverse, scaling, rope.theta, dim, max_positions)
    if kind == "longrope":
        return _longrope(inverse, scaling, max_positions, length)
    raise Unsupported(
        f"RoPE scaling '{kind}' is not known",
        help="attach the adapter to the transformers model instead; known: default, linear, dynamic, llama3, yarn, longrope",
    )


def _dynamic(rope: Rope, dim: int, max_positions: int, length: int) -> float:
    """NTK-aware: the base grows with the sequence once it is longer than the training length."""
    factor, longest = float(rope.scaling["factor"]), max(length, max_positions)
    stretch: float = factor * longest / max_positions - (factor - 1)
    return float(rope.theta * stretch ** (dim / (dim - 2)))


def _llama3(inverse: Tensor, scaling: dict[str, Any]) -> Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    result = torch.where(wavelength > original / low, inverse / factor, inverse)
    middle = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(middle, blended, result)


def _yarn(inverse: Tensor, scaling: dict[str, Any], theta: float, dim: int, max_positions: int) -> tuple[Tensor, float]:
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or max_positions
    fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction(fast), correction(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = inverse / factor * ramp + inverse * (1 - ramp)
    return frequencies, _yarn_attention_factor(scaling, factor)


def _yarn_attention_factor(scaling: dict[str, Any], factor: float) -> float:
    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(factor, scaling["mscale"]) / mscale(factor, scaling["mscale_all_dim"])
    return mscale(factor)


def _longrope(inverse: Tensor, scaling: dict[str, Any], max_positions: int, length: int) -> tuple[Tensor, float]:
    original = scaling.get("original_max_position_embeddings") or max_positions
    factors = torch.tensor(scaling["long_factor" if length > original else "short_factor"], dtype=torch.float32)
    given = scaling.get("attention_factor")
    if given is not None:
        return inverse / factors, float(given)
    ratio = scaling.get("factor") or max_positions / original
    return inverse / factors, 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
