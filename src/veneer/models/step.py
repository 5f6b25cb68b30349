"""Steps in which every row reads one token: all blocks are one call, where the kernel covers the model and what adapters do.

Decoding is bound by reading the weights, so what stands between two products counts: Python took half as long as they did. The
surprise: this changes no value. Where a condition fails the step goes the ordinary way, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from veneer.models.bank import Bank
from veneer.models.config import DecoderConfig
from veneer.models.group import Group
from veneer.models.project import packs_of
from veneer.models.state import Pass
from veneer.ops.frozen import DenseFrozen, Frozen, StoredRows
from veneer.ops.mixed import plan
from veneer.ops.native.block import NORMS, Block, Product, Shape, Stack, block
from veneer.ops.native.few import BF16, FEW, Rows
from veneer.ops.native.mixed import Jobs
from veneer.ops.pack import Packs
from veneer.types import Span

GROUPS = ("qkv", "o", "up", "down")


class Steps:
    """The blocks of one decoder in the kernel's form, made when they are first asked for.

    halves  of a head's dimensions that turn, for global and for local layers; empty without rotary positions
    """

    def __init__(
        self,
        config: DecoderConfig,
        groups: Mapping[str, Group],
        norms: Mapping[str, Tensor],
        halves: Mapping[bool, int],
    ) -> None:
        self._config, self._groups, self._norms, self._halves = config, groups, norms, halves
        self._stacks: WeakKeyDictionary[Bank, tuple[tuple[Span, ...], Stack | None]] = WeakKeyDictionary()

    def run(self, h: Tensor, state: Pass) -> Tensor | None:
        """Hidden states after all blocks and the final norm.

        None where some row reads more than one token or more is asked than the kernel gives.
        """
        bank, cache = state.bank, state.cache
        if cache is None or torch.is_grad_enabled() or len(h) > FEW or h.dtype != torch.bfloat16:
            return None
        if h.device.type != "cpu" or bank.dropout is not None or any(bank.sublayers) or any(bank.overrides):
            return None
        stack = self._stack(bank, state.spans)
        places = None if stack is None else cache.places(state.runs)
        if stack is None or places is None:
            return None
        return stack.run(h, places, [state.angles.get(local, state.angles[False]) for local in (False, True)])

    @cached_property
    def _blocks(self) -> tuple[Block, ...] | None:
        """All of them, or None where one is not what the kernel computes."""
        if not _is_covered(self._config):
            return None
        found = [self._block(layer) for layer in range(self._config.layers)]
        whole = tuple(each for each in found if each is not None)
        return whole if len(whole) == len(found) else None

    def _stack(self, bank: Bank, spans: tuple[Span, ...]) -> Stack | None:
        """For these rows. Remembered as long as the bank lives: most steps run what the step before ran."""
        known = self._stacks.get(bank)
        if known is None or known[0] is not spans:
            known = spans, self._stacked(bank, spans)
            self._stacks[bank] = known
        return known[1]

    def _stacked(self, bank: Bank, spans: tuple[Span, ...]) -> Stack | None:
        if self._blocks is None:
            return None
        updates: list[Jobs | None] = []
        for layer in range(self._config.layers):
            for group in GROUPS:
                name = f"layers.{layer}.{group}"
                packs, own = packs_of(bank.groups.get(name), spans)
                if name in bank.split:
                    return None
                if all(span.index < 0 for span in own):
                    updates.append(None)
                    continue
                planned = packs.remembered(own, torch.bfloat16, plan) if isinstance(packs, Packs) else None
                if planned is None or planned.long or planned.vectors:
                    return None
                updates.append(planned.jobs)
        return Stack(self._blocks, tuple(updates), self._norm("final_norm"))

    def _norm(self, name: str) -> Tensor:
        """An RMSNorm weight as the kernel reads it."""
        offset = 1.0 if self._config.norm == "rms1" else 0.0
        return (self._norms[name].float() + offset).contiguous()

    def _block(self, layer: int) -> Block | None:
        config, name = self._config, f"layers.{layer}"
        products = [_product(self._groups[f"{name}.{group}"]) for group in GROUPS]
        found = [product for product in products if product is not None]
        if len(found) < len(products):
            return None
        norms = [self._norm(f"{name}.{norm}") if f"{name}.{norm}" in self._norms else None for norm in NORMS]
        local = config.is_local(layer) and config.local_rope is not None
        shape = Shape(
            eps=config.norm_eps,
            scale=config.attention_scale or config.head_dim**-0.5,
            activation=config.activation,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            half=self._halves[local],
            window=config.window(layer),
            whole=config.qk_norm == "full",
            local=local,
        )
        return block(found, norms, shape)


def _is_covered(config: DecoderConfig) -> bool:
    """Whether block.c computes this kind of block."""
    attends = config.positions == "rope" and config.qkv_order == "parts" and config.attention_softcap is None
    return attends and config.norm in ("rms", "rms1") and config.gated and config.block == "sequential"


def _product(group: Group) -> Product | None:
    pieces = _pieces(group.frozen)
    return None if pieces is None else Product(pieces, group.bias)


def _pieces(frozen: Frozen) -> tuple[Rows, ...] | None:
    if isinstance(frozen, DenseFrozen):
        return (Rows(BF16, (frozen.out_features, frozen.in_features), frozen.weight),)
    return frozen.stored_rows() if isinstance(frozen, StoredRows) else None
