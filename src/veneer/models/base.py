"""A frozen base model: its decoder, its tokenizer, its identity, and a `Host` for every layer that can carry an adapter.

A `Base` is never changed. Adapters meet it in a `Bank` that is passed to the decoder; `bound` makes one bank the current one
for `Base.logits` in this context (thread or task), and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.base.host import DenseHost, Host, NormHost
from veneer.base.quantized import QuantizedFrozen, QuantizedHost
from veneer.errors import ConfigError, NotFound, TargetError, Unsupported
from veneer.models.bank import EMPTY, Bank, Dropout, spans_of
from veneer.models.config import DecoderConfig, GroupSpec, Layout, PartSpec
from veneer.models.decoder import Decoder
from veneer.models.tokenizer import Tokenizer
from veneer.ops.low_rank import DenseFrozen
from veneer.registry import did_you_mean
from veneer.types import BaseShape, Lowered, Segment


@dataclass(frozen=True, eq=False)
class Binding:
    """The adapter that `Base.logits` uses: an index into a bank."""

    base: Base
    bank: Bank
    index: int


_BINDINGS: ContextVar[tuple[Binding, ...]] = ContextVar("veneer_bindings", default=())


@contextmanager
def bound(base: Base, bank: Bank, index: int) -> Iterator[None]:
    """Inside, `base.logits` uses adapter `index` of `bank`. Nested blocks replace it; other threads and tasks see nothing."""
    token = _BINDINGS.set((*_BINDINGS.get(), Binding(base, bank, index)))
    try:
        yield
    finally:
        _BINDINGS.reset(token)


class Base:
    """A base model. Make one with `load_base`.

    name       what the user calls it
    identity   SHA-256 over its weights rounded to bf16, or None where it is unknown
    config     the decoder's shape; `hf_config` is the checkpoint's own config.json
    decoder    the frozen forward pass
    folder     where its converted files are, or None for a base made in memory
    quantize   format of its projections ("nf4", "int8", "bf12", ...), or None
    source     what `load_base` was given, so that the same base can be loaded again in another format
    """

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        identity: str | None = None,
        samples: Mapping[str, tuple[float, ...]] | None = None,
        hf_config: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        quantize: str | None = None,
        source: str = "",
    ) -> None:
        self.source = source or name
        self.name, self.identity, self.folder, self.decoder = name, identity, folder, decoder
        self.quantize = quantize
        self.hf_config: Mapping[str, Any] = {} if hf_config is None else hf_config
        self.config: DecoderConfig = decoder.config
        self.layout: Layout = decoder.layout
        self._samples = {} if samples is None else dict(samples)
        self._hosts: dict[str, Host] = {}

    def __repr__(self) -> str:
        known = self.identity[:12] if self.identity else "no identity"
        return f"Base({self.name}, {self.config.family}, {str(self.dtype).removeprefix('torch.')}, {known})"

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @property
    def precision(self) -> str:
        """`bfloat16`, or `bfloat16, nf4`: what adapters say they were trained on."""
        return ", ".join(filter(None, (str(self.dtype).removeprefix("torch."), self.quantize)))

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @cached_property
    def shape(self) -> BaseShape:
        return self.layout.base_shape(self.config)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the weights as they are held."""
        packed = [g.frozen.nbytes for g in self.decoder.groups.values() if isinstance(g.frozen, QuantizedFrozen)]
        return sum(packed) + sum(t.numel() * t.element_size() for t in self.decoder.tensors.values())

    @cached_property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint; a tied head counts once."""
        held = {spec.name for spec in self.layout.groups}
        small = sum(t.numel() for name, t in self.decoder.tensors.items() if name not in held)
        return small + sum(spec.in_features * spec.out_features for spec in self.layout.groups)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, or None where it has none. Read when it is first asked for."""
        if self.folder is None or not (self.folder / "tokenizer.json").is_file():
            return None
        return Tokenizer.load(self.folder)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer, or a refusal that says what to do."""
        if self.tokenizer is None:
            raise Unsupported(
                f"the base '{self.name}' has no tokenizer, so it cannot read or write text",
                help="put tokenizer.json and tokenizer_config.json in its folder",
            )
        return self.tokenizer

    @cached_property
    def _parts(self) -> dict[str, tuple[GroupSpec, PartSpec]]:
        return {part.path: (group, part) for group in self.layout.groups for part in group.parts}

    def host(self, target: str) -> Host:
        """The layer at a module path of the checkpoint, as a `Host`. Its tensors are views; nothing is copied.

        The same object each time, so that what is derived of a frozen weight (DoRA's row norms) is derived once.
        """
        if target not in self._hosts:
            self._hosts[target] = self._new_host(target)
        return self._hosts[target]

    def _new_host(self, target: str) -> Host:
        if target == self.layout.embed_path:
            return DenseHost(self.decoder.embed, kind="embedding")
        if target == self.layout.head_path and self.config.tied_head:
            return DenseHost(self.decoder.embed)
        if target in self.shape.norms:
            name = next(n for n in self.layout.norms if self.layout.tensors[n] == f"{target}.weight")
            return NormHost(self.decoder.tensors[name], self.decoder.tensors.get(f"{name}_bias"))
        if target not in self._parts:
            raise TargetError(
                f"'{target}' is not a layer of {self.name} that can carry an adapter",
                help=did_you_mean(target, list(self.shape.hosts)),
            )
        spec, part = self._parts[target]
        group = self.decoder.groups[spec.name]
        bias = None if group.bias is None else group.bias[part.start : part.stop]
        if isinstance(group.frozen, QuantizedFrozen):
            return QuantizedHost(group.frozen.parts[spec.parts.index(part)], self.dtype, bias, kind=spec.kind)
        if not isinstance(group.frozen, DenseFrozen):
            raise Unsupported(f"'{target}' is held as {type(group.frozen).__name__}, which gives no view of its parts")
        rows = group.frozen.weight[part.start : part.stop]
        return DenseHost(rows.t(), bias, kind="conv1d") if spec.kind == "conv1d" else DenseHost(rows, bias)

    def bank(self, lowered: Sequence[Lowered], *, dropout: Dropout | None = None) -> Bank:
        """Lowered adapters packed for this base's decoder: row i of a pass uses the one that its segment names."""
        bank = Bank.of(lowered, self.decoder.groups, self.layout.embed_path, dropout=dropout)
        self.decoder.check(bank)
        return bank

    def samples(self, target: str) -> tuple[float, ...]:
        """64 values of the frozen weight at fixed places, from the checkpoint's own precision."""
        if target == self.layout.head_path and self.config.tied_head:
            target = self.layout.embed_path
        if target not in self._samples:
            raise NotFound(f"nothing was sampled at '{target}'", help=did_you_mean(target, list(self._samples)))
        return self._samples[target]

    def binding(self) -> tuple[Bank, int]:
        """The bank and index that `bound` made current for this base in this context; the empty bank and -1 outside."""
        for binding in reversed(_BINDINGS.get()):
            if binding.base is self:
                return binding.bank, binding.index
        return EMPTY, -1

    def logits(self, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Scores `[batch, time, vocab]` for token ids `[batch, time]`, under the bound adapter if there is one."""
        tokens = torch.as_tensor(ids, device=self.device)
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ConfigError(f"ids are {tokens.dtype} {list(tokens.shape)}, expected integers [batch, time]")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab:
            raise ConfigError(
                f"token ids run from {int(tokens.min())} to {int(tokens.max())}, the vocabulary has {self.config.vocab}"
            )
        batch, time = tokens.shape
        bank, index = self.binding()
        segments = [Segment(time, row, index) for row in range(batch)]
        hidden = self.decoder.forward(tokens.reshape(-1).long(), segments, bank)
        return self.decoder.logits(hidden, spans_of(segments), bank).view(batch, time, self.config.vocab)
