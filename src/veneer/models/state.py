"""What a forward pass knows beside the tokens: whose rows are which, their adapters, where older keys and values live."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from veneer.models.bank import Bank
from veneer.ops.native.few import Place
from veneer.types import Span


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one sequence: `length` tokens from position `start`, virtual rows counted."""

    sequence: int
    start: int
    length: int


class Cache(Protocol):
    """Where keys and values of earlier tokens live. `engine/` implements it; one call per layer."""

    def put_prefix(self, layer: int, sequence: int, key: Tensor, value: Tensor) -> None:
        """Store prefix keys and values `[p, kv_heads, head_dim]` at position 0 of a sequence."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        runs: Sequence[Run],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Append k, v `[N, kv_heads, head_dim]` of each run, attend causally over all that is stored; `[N, heads, head_dim]`."""

    def places(self, runs: Sequence[Run]) -> ctypes.Array[Place] | None:
        """Where each row of runs of one token stores its key and value, for all blocks in one call; None: not that way."""


@dataclass(frozen=True)
class Pass:
    """What every layer of one forward needs to know about its rows."""

    spans: tuple[Span, ...]
    runs: tuple[Run, ...]
    bank: Bank
    cache: Cache | None
    angles: dict[bool, tuple[Tensor, Tensor]]

    def prefixes(self, layer: int) -> list[tuple[Tensor, Tensor] | None] | None:
        """Prefix keys and values per run where any adapter has them and no cache holds them."""
        found: list[tuple[Tensor, Tensor] | None] = []
        row = 0
        for run in self.runs:
            kv = self.bank.kv[index].get(layer) if (index := self.adapter_at(row)) >= 0 else None
            found.append(None if kv is None else (kv.key, kv.value))
            row += run.length
        return found if any(f is not None for f in found) else None

    def adapter_at(self, row: int) -> int:
        return next(span.index for span in self.spans if span.start <= row < span.stop)
