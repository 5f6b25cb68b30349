"""Lowered adapters, packed for the decoder: everything that the rows of one forward pass may need.

A `Bank` holds one entry per adapter. For each projection group it has the adapters' primitives as one `Pack` (A's of the group
stacked, B's per part, scales and biases folded), so a group costs one shrink whatever the number of parts. The decoder holds no
adapter state: a bank is passed to each forward.

The surprise: packing is differentiable and happens once per optimiser step, not once per micro-batch. The trainer runs the
decoder on `leaves` (detached copies that collect gradients) and sends the sum back through packing and lowering in one go.
That is why DoRA's norms cost nothing per micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from veneer.errors import Unsupported
from veneer.models.group import Group
from veneer.ops.low_rank import Pack
from veneer.types import (
    KV,
    Bias,
    Bottleneck,
    InScale,
    Lowered,
    LowRank,
    OutScale,
    Override,
    Primitive,
    Segment,
    Span,
    Sublayer,
    Tokens,
    switch_at,
)


@dataclass(frozen=True, eq=False)
class Packed:
    """The adapters of one group. `slot[i]` is the pack of adapter i, or -1 where it leaves the group alone."""

    packs: tuple[Pack, ...]
    slot: tuple[int, ...]

    @cached_property
    def is_whole(self) -> bool:
        """Whether adapter i has pack i, for every i."""
        return self.slot == tuple(range(len(self.packs)))


@dataclass(frozen=True, eq=False)
class Dropout:
    """Dropout on the input of low-rank updates during training; one mask per group and forward."""

    rate: float
    generator: torch.Generator


@dataclass(frozen=True, eq=False)
class Bank:
    """What the rows of a pass may use. Build with `Bank.of`; the empty bank is the bare base.

    groups     group (or part-of-group) name -> its packs
    split      groups of which some part needs its own input, run part by part
    overrides  per adapter: tensor name -> the tensor that replaces it
    invocations  per adapter: the token ids that switch it on (aLoRA), or None for always on
    embedding  per adapter: low-rank factors of the input embedding, (A `[rank, vocab]`, B `[hidden, rank]`), or None
    """

    size: int = 0
    groups: Mapping[str, Packed] = field(default_factory=dict)
    split: frozenset[str] = frozenset()
    sublayers: tuple[Mapping[tuple[int, Sublayer], tuple[Bottleneck, ...]], ...] = ()
    tokens: tuple[Tokens | None, ...] = ()
    kv: tuple[Mapping[int, KV], ...] = ()
    overrides: tuple[Mapping[str, Override], ...] = ()
    embedding: tuple[tuple[Tensor, Tensor] | None, ...] = ()
    invocations: tuple[tuple[int, ...] | None, ...] = ()
    dropout: Dropout | None = None

    @staticmethod
    def of(
        lowered: Sequence[Lowered], groups: Mapping[str, Group], embed_path: str, *, dropout: Dropout | None = None
    ) -> Bank:
        """Pack `lowered` for a decoder with these groups."""
        head = groups["head"].parts[0].path if "head" in groups else ""
        known = {part.path for group in groups.values() for part in group.parts} | {embed_path}
        for entry in lowered:
            stray = sorted(set(entry.weights) - known)
            if entry.invocation is not None and head in entry.weights:
                raise Unsupported(
                    "an invoked adapter (aLoRA) on the output head is not run natively",
                    help="leave the head out of its targets",
                )
            if stray:
                raise Unsupported(
                    f"the native decoder has no layer called {', '.join(stray)}",
                    help="attach the adapter to the transformers model, or check that it was made for this base",
                )
        packed: dict[str, Packed] = {}
        split: set[str] = set()
        for name, group in groups.items():
            if not any(part.path in entry.weights for entry in lowered for part in group.parts):
                continue
            if len(group.parts) > 1 and any(_stands_apart(group, entry) for entry in lowered):
                split.add(name)
                for single in group.split():
                    packed[single.name] = _pack_all(single, lowered)
            else:
                packed[name] = _pack_all(group, lowered)
        return Bank(
            size=len(lowered),
            groups=packed,
            split=frozenset(split),
            sublayers=tuple(entry.sublayers for entry in lowered),
            tokens=tuple(entry.tokens for entry in lowered),
            kv=tuple(entry.kv for entry in lowered),
            overrides=tuple(entry.overrides for entry in lowered),
            embedding=tuple(_embedding_factors(entry.weights.get(embed_path, ())) for entry in lowered),
            invocations=tuple(entry.invocation for entry in lowered),
            dropout=dropout,
        )

    def activated(self, tokens: Tensor, segments: Sequence[Segment]) -> Sequence[Segment]:
        """Segments of whole sequences, cut where an invoked adapter switches on: the base until the last invocation."""
        if not any(self.invocations):
            return segments
        found: list[Segment] = []
        row = 0
        for segment in segments:
            invocation = self.invocations[segment.adapter] if segment.adapter >= 0 else None
            if invocation is None:
                found.append(segment)
            else:
                ids: list[int] = tokens[row : row + segment.length].tolist()
                switch = min(switch_at(ids, invocation), segment.length)
                before = Segment(switch, segment.sequence, -1, segment.start)
                after = replace(segment, length=segment.length - switch, start=segment.start + switch)
                found += [s for s in (before, after) if s.length]
            row += segment.length
        return found

    def virtual_tokens(self, adapter: int) -> int:
        """Rows that stand before a sequence of `adapter`: prompt rows, or keys and values of a prefix."""
        return self.prompt_rows(adapter) + self.prefix_rows(adapter)

    def prompt_rows(self, adapter: int) -> int:
        tokens = self.tokens[adapter] if adapter >= 0 else None
        return 0 if tokens is None else tokens.rows.shape[0]

    def prefix_rows(self, adapter: int) -> int:
        kv = self.kv[adapter] if adapter >= 0 else {}
        return 0 if not kv else next(iter(kv.values())).key.shape[0]

    def leaves(self) -> tuple[Bank, list[tuple[Tensor, Tensor]]]:
        """This bank on detached leaves, and the pairs (packed tensor, leaf) whose gradients belong together."""
        pairs: dict[int, tuple[Tensor, Tensor]] = {}

        def leaf(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            if id(tensor) not in pairs:
                pairs[id(tensor)] = (tensor, tensor.detach().requires_grad_())
            return pairs[id(tensor)][1]

        return self.map_tensors(leaf), list(pairs.values())

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor; one that several places share comes several times."""
        for packed in self.groups.values():
            yield from (t for pack in packed.packs for t in pack.tensors() if t is not None)
        for sublayers in self.sublayers:
            yield from (t for own in sublayers.values() for b in own for t in (b.down, b.down_bias, b.up, b.up_bias))
        yield from (own.rows for own in self.tokens if own is not None)
        yield from (t for layers in self.kv for kv in layers.values() for t in (kv.key, kv.value))
        yield from (own.value for overrides in self.overrides for own in overrides.values())
        yield from (t for factors in self.embedding if factors is not None for t in factors)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Bank:
        """The same bank with `function` applied to every tensor."""

        def maybe(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        def of_pack(pack: Pack) -> Pack:
            return pack.with_tensors([maybe(t) for t in pack.tensors()])

        def of_bottleneck(b: Bottleneck) -> Bottleneck:
            return replace(
                b,
                down=function(b.down),
                down_bias=function(b.down_bias),
                up=function(b.up),
                up_bias=function(b.up_bias),
            )

        return replace(
            self,
            groups={n: replace(p, packs=type(p.packs)(of_pack(x) for x in p.packs)) for n, p in self.groups.items()},
            sublayers=tuple({k: tuple(of_bottleneck(b) for b in v) for k, v in s.items()} for s in self.sublayers),
            tokens=tuple(None if t is None else Tokens(function(t.rows)) for t in self.tokens),
            kv=tuple({i: KV(function(e.key), function(e.value)) for i, e in m.items()} for m in self.kv),
            overrides=tuple({n: replace(o, value=function(o.value)) for n, o in m.items()} for m in self.overrides),
            embedding=tuple(None if e is None else (function(e[0]), function(e[1])) for e in self.embedding),
        )


EMPTY = Bank()


def _stands_apart(group: Group, entry: Lowered) -> bool:
    """Whether a part of the group needs an input of its own, or has its weight replaced."""
    scaled = any(isinstance(p, InScale) for part in group.parts for p in entry.weights.get(part.path, ()))
    return scaled or any(f"{p.path}.{kind}" in entry.overrides for p in group.parts for kind in ("weight", "bias"))


def _pack_all(group: Group, lowered: Sequence[Lowered]) -> Packed:
    packs: list[Pack] = []
    slot: list[int] = []
    for entry in lowered:
        if any(part.path in entry.weights for part in group.parts):
            slot.append(len(packs))
            packs.append(_pack(group, entry))
        else:
            slot.append(-1)
    return Packed(tuple(packs), tuple(slot))


def _pack(group: Group, entry: Lowered) -> Pack:
    """One adapter's primitives on one group, folded."""
    shrink: list[Tensor] = []
    expand: list[Tensor] = []
    columns: list[tuple[int, int]] = []
    in_scale: Tensor | None = None
    out_scales: dict[int, tuple[Tensor, bool]] = {}
    biases: dict[int, Tensor] = {}
    for index, part in enumerate(group.parts):
        primitives = entry.weights.get(part.path, ())
        low_rank = [p for p in primitives if isinstance(p, LowRank)]
        if low_rank:
            shrink += [p.A for p in low_rank]
            expand.append(torch.cat([p.B for p in low_rank], dim=1) if len(low_rank) > 1 else low_rank[0].B)
            columns.append((part.start, part.stop))
        for primitive in primitives:
            if isinstance(primitive, InScale):
                in_scale = primitive.vector if in_scale is None else in_scale * primitive.vector
            elif isinstance(primitive, OutScale):
                before = out_scales.get(index)
                vector = primitive.vector if before is None else before[0] * primitive.vector
                out_scales[index] = (vector, primitive.scales_bias)
            elif isinstance(primitive, Bias):
                biases[index] = biases[index] + primitive.vector if index in biases else primitive.vector
    return Pack(
        A=torch.cat(shrink) if len(shrink) > 1 else shrink[0] if shrink else None,
        B=tuple(expand),
        columns=tuple(columns),
        in_scale=in_scale,
        out_scale=_whole_out_scale(group, out_scales),
        bias=_whole_bias(group, out_scales, biases),
    )


def _whole_out_scale(group: Group, scales: Mapping[int, tuple[Tensor, bool]]) -> Tensor | None:
    if not scales:
        return None
    like = next(iter(scales.values()))[0]
    pieces = [
        scales[i][0] if i in scales else torch.ones(p.stop - p.start, dtype=like.dtype, device=like.device)
        for i, p in enumerate(group.parts)
    ]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _whole_bias(group: Group, scales: Mapping[int, tuple[Tensor, bool]], biases: Mapping[int, Tensor]) -> Tensor | None:
    """The bias of the adapted group, or None where it is the base's own."""
    scaled = {i for i, (_, scales_bias) in scales.items() if scales_bias and group.bias is not None}
    if not scaled and not biases:
        return None
    like = next(iter(biases.values())) if biases else next(iter(scales.values()))[0]
    pieces: list[Tensor] = []
    for i, part in enumerate(group.parts):
        piece = torch.zeros(part.stop - part.start, dtype=like.dtype, device=like.device)
        if group.bias is not None:
            piece = group.bias[part.start : part.stop].to(like.dtype)
        if i in scaled:
            piece = piece * scales[i][0]
        pieces.append(piece + biases[i] if i in biases else piece)
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _embedding_factors(primitives: tuple[Primitive, ...]) -> tuple[Tensor, Tensor] | None:
    if not primitives:
        return None
    low_rank = [p for p in primitives if isinstance(p, LowRank)]
    if len(low_rank) != len(primitives):
        others = sorted({type(p).__name__ for p in primitives} - {"LowRank"})
        raise Unsupported(f"an embedding takes low-rank updates or replaced rows only, not {', '.join(others)}")
    return torch.cat([p.A for p in low_rank]), torch.cat([p.B for p in low_rank], dim=1)


def spans_of(segments: Sequence[Segment]) -> tuple[Span, ...]:
    """Row spans by adapter of packed segments; neighbours with one adapter become one span."""
    spans: list[Span] = []
    row = 0
    for segment in segments:
        if spans and spans[-1].index == segment.adapter:
            spans[-1] = Span(spans[-1].start, row + segment.length, segment.adapter)
        else:
            spans.append(Span(row, row + segment.length, segment.adapter))
        row += segment.length
    return one_of(tuple(spans))


@lru_cache(maxsize=64)
def one_of(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """The same tuple for equal spans: what is remembered of a mix of rows is found by identity, a hundred times a step."""
    return spans


def compose(parts: Sequence[Lowered]) -> Lowered:
    """Several adapters on the same rows, where the order does not matter: low-rank updates add, scales multiply.

    Anything else (DoRA beside another update, two prompts, two replaced tensors) depends on an order and is refused.
    """
    if len(parts) == 1:
        return parts[0]
    weights: dict[str, tuple[Primitive, ...]] = {}
    for entry in parts:
        if entry.tokens or entry.kv or entry.sublayers or entry.overrides or entry.invocation:
            raise Unsupported(
                "prompts, prefixes, bottlenecks, replaced tensors and invoked adapters can't share a row with another adapter",
                help="combine low-rank adapters, or merge one into a new base",
            )
        for target, primitives in entry.weights.items():
            weights[target] = weights.get(target, ()) + primitives
    for target, primitives in weights.items():
        kinds = {type(p) for p in primitives}
        if not (kinds <= {LowRank, Bias} or kinds <= {InScale, OutScale}):
            names = ", ".join(sorted(k.__name__ for k in kinds))
            raise Unsupported(f"at {target} the adapters would apply {names}: the result depends on their order")
    return Lowered(weights=weights, digest="+".join(p.digest for p in parts))
