"""Adapters on a native base: `with attached(base, adapter): base.logits(ids)`.

Nothing is written to the base: the adapter is lowered, packed, and bound to this context (thread or task) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from veneer import methods
from veneer.adapter import Adapter
from veneer.base.identity import compare
from veneer.models.bank import Bank, compose
from veneer.models.base import Base, bound
from veneer.types import Lowered


@contextmanager
def attached(base: Base, *adapters: Adapter, allow_base_mismatch: str | None = None) -> Iterator[Base]:
    """The base with these adapters on every row. Several share a row where their order does not matter, else `Unsupported`.

    `BaseMismatch` where one was made for other weights, unless `allow_base_mismatch` gives a reason, or does not fit these.
    """
    for adapter in adapters:
        compare(adapter, base, allow=allow_base_mismatch)
    bank = bank_of(base, [compose_all(base, adapters)]) if adapters else Bank()
    with bound(base, bank, 0 if adapters else -1):
        yield base


@contextmanager
def disabled(base: Base) -> Iterator[Base]:
    """The bare base inside an `attached` block, bitwise."""
    with bound(base, Bank(), -1):
        yield base


def compose_all(base: Base, adapters: tuple[Adapter, ...]) -> Lowered:
    """Several adapters lowered into one, for the same rows."""
    with torch.no_grad():
        return compose([methods.lower(adapter, base, digest=adapter.digest) for adapter in adapters])


def bank_of(base: Base, lowered: list[Lowered]) -> Bank:
    """Lowered adapters packed for this base's decoder."""
    with torch.no_grad():
        return base.bank(lowered)
