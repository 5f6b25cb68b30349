"""Which base is this, and does an adapter belong to it?

identity = SHA-256 over the sorted (canonical tensor name, shape, SHA-256 of the values rounded to bf16) of the source
checkpoint. File format, layout, dtype and quantisation are not in it. The surprise: a rounding, not the file, is hashed, so an
fp32 copy of a bf16 checkpoint is the same base; and 64 sampled values per target recognise the same weights when even the
rounding differs (a 16-bit float export, say).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from veneer.adapter import Adapter
from veneer.errors import BaseMismatch, listed
from veneer.types import BaseShape

SAMPLES = 64
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it fall evenly and never align with rows or columns
ULP = 2.0**-7  # a bf16 has 8 significant bits

Outcome = Literal["equal", "other precision", "unverified", "allowed"]


class KnownBase(Protocol):
    """What the comparison needs of a base."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str | None: ...

    @property
    def shape(self) -> BaseShape: ...

    def samples(self, target: str) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class Verdict:
    """How an adapter and a base were found to belong together, with the reason in words.

    equal            same identity
    other precision  the sampled weights agree within one bf16 step
    unverified       the adapter names no base; only names and shapes were compared
    allowed          they differ, and the user said why that is all right
    """

    outcome: Outcome
    detail: str


class Hasher:
    """Collects a checkpoint's tensors in any order; `identity()` is their hash."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tuple[int, ...], str]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """File one tensor under its canonical name, in the checkpoint's own orientation."""
        rounded = tensor.detach().to("cpu", torch.bfloat16).reshape(-1).view(torch.uint8)
        self._entries[name] = (tuple(tensor.shape), hashlib.sha256(rounded.numpy().data).hexdigest())

    def identity(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._entries):
            shape, values = self._entries[name]
            digest.update(f"{name} {list(shape)} {values}\n".encode())
        return digest.hexdigest()


def identity_of(tensors: Mapping[str, Tensor]) -> str:
    """Identity of a checkpoint at hand: canonical tensor name -> tensor. A tied head is named once, as the embedding."""
    hasher = Hasher()
    for name, tensor in tensors.items():
        hasher.add(name, tensor)
    return hasher.identity()


def sampled(weight: Tensor) -> tuple[float, ...]:
    """64 values of a weight at fixed scattered places of its flat `[out, in]` (an embedding's `[vocab, hidden]`), to 6 digits."""
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    places = torch.tensor([(k * GOLDEN % 2**64) * count >> 64 for k in range(1, SAMPLES + 1)])
    return tuple(float(f"{value:.6g}") for value in flat[places.to(flat.device)].float().tolist())


def same_weights(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two samples agree within one bf16 step, value by value."""
    if not mine or len(mine) != len(theirs):
        return False  # where nothing was compared, nothing is known
    return all(abs(a - b) <= ULP * max(abs(a), abs(b)) for a, b in zip(mine, theirs, strict=True))


def compare(adapter: Adapter, base: KnownBase, *, allow: str | None = None, fits: bool = False) -> Verdict:
    """How `adapter` and `base` belong together.

    Names and shapes must fit whatever is known otherwise (`fits`: those of another adapter of its form were found to). With
    `allow` (a reason in words) different weights are accepted and the reason is kept in the verdict; names and shapes that do
    not fit are refused all the same.
    """
    if not fits:
        _fit(adapter, base)
    known = adapter.provenance
    if known.base is not None and known.base == base.identity:
        return Verdict("equal", "made for exactly these weights")
    if known.base is None and not known.base_samples:
        return Verdict("unverified", "the adapter does not say which base it was made for; names and shapes fit")
    compared = {t: values for t, values in known.base_samples.items() if t in base.shape.hosts}
    differing = [t for t, values in compared.items() if not same_weights(values, base.samples(t))]
    if compared and not differing:
        return Verdict("other precision", f"same weights in another precision ({len(compared)} layers sampled)")
    reason = _difference(adapter, base, differing, len(compared))
    if allow is not None:
        return Verdict("allowed", f"{reason}; allowed: {allow}")
    raise BaseMismatch(
        f"this adapter was made for another base: {reason}",
        help='use the base it was trained on, or --allow-base-mismatch "why this is right"',
    )


def _fit(adapter: Adapter, base: KnownBase) -> None:
    """Every target exists in the base and has its size there."""
    problems: list[str] = []
    for part in adapter.parts:
        problems += [f"{what} in {base.name}" for what in adapter.misfits(part, base.shape)]
    if problems:
        raise BaseMismatch(
            f"this adapter does not fit {base.name}:\n{listed(problems)}", help="use the base it was trained on"
        )


def _difference(adapter: Adapter, base: KnownBase, differing: Sequence[str], compared: int) -> str:
    known = adapter.provenance
    name = f" ({known.base_name})" if known.base_name else ""
    theirs = f"{known.base[:12]}{name}" if known.base else f"unnamed{name}"
    ours = f"{base.identity[:12]} ({base.name})" if base.identity else base.name
    where = f", {len(differing)} of {compared} sampled layers differ, first {differing[0]}" if differing else ""
    return f"trained on {theirs}, this is {ours}{where}"
