"""Which tensors of a checkpoint an adapter changes, and how, before a byte is written.

A checkpoint stores a projection as `[out, in]`, GPT-2's Conv1D and embeddings as `[in, out]`, a convolution as
`[out, in, *kernel]`; an adapter names module paths.
`edits` brings the two together and refuses with every problem at once: a target that isn't there, a size that doesn't fit, a
method that is no change of a weight, a head that is tied to the embedding.

The surprise: on a model whose head is its embedding, an adapter on either would change the other's weight too. That is never what
was trained, so it is refused, or the two are untied: the copy is written as a tensor of its own and config.json says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from veneer import methods
from veneer.adapter import Adapter, Part
from veneer.base.host import DenseHost, Host
from veneer.errors import NeedsBase, TargetError, Unsupported, VeneerError, listed
from veneer.merge.rounding import MERGEABLE, Dense, LowRankRows, Update, working_dtype
from veneer.methods import Method, Place
from veneer.models.families import decoder_config, layout
from veneer.registry import did_you_mean
from veneer.types import HostKind, HostShape, Lowered, LowRank, Override, Primitive

CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose projections are transformers' Conv1D, `[in, out]`."""

EMBEDDINGS = ("model.embed_tokens", "transformer.wte", "gpt_neox.embed_in", "model.decoder.embed_tokens", "wte")
HEADS = ("lm_head", "embed_out")


class Tensors(Protocol):
    """A checkpoint: tensors by name, and its config.json."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    def __contains__(self, name: object, /) -> bool: ...

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of one stored tensor.

    name      in the checkpoint
    source    the tensor it starts from: itself, or the embedding for a head that is untied
    overrides what replaces it, first; then the weight parts, in order
    """

    name: str
    target: str
    source: str
    bias_name: str | None
    shape: HostShape
    overrides: tuple[Override, ...] = ()
    parts: tuple[tuple[Method, Part], ...] = ()

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(left, right) with update = left @ right as stored, where low-rank parts are all there is, else None."""
        if self.overrides or self.is_bias or not self.parts or self.shape.kind == "conv":
            return None
        pairs = [_factors(method, part, self.shape) for method, part in self.parts]
        found = [pair for pair in pairs if pair is not None]
        if len(found) < len(pairs):
            return None
        a, b = torch.cat([a for a, _ in found]), torch.cat([b for _, b in found], dim=1)
        return (b, a) if self.shape.kind == "linear" else (a.t().contiguous(), b.t().contiguous())

    @property
    def is_bias(self) -> bool:
        return self.name == self.bias_name

    def update(self, tensors: Tensors) -> Update:
        """The exact update of the stored tensor."""
        stored = tensors.tensor(self.source)
        work = working_dtype(stored.dtype)
        factors = self.factors()
        if factors is not None:
            return LowRankRows(*(f.to(work) for f in factors))
        value = self._value(tensors, stored)
        return Dense(lambda start, stop: value[start:stop].to(work) - stored[start:stop].to(work))

    def _value(self, tensors: Tensors, stored: Tensor) -> Tensor:
        """The changed tensor in fp32, as stored."""
        value = stored
        for override in self.overrides:
            value = _overridden(value, override)
        if not self.parts:
            return value
        weight = tensors.tensor(self.source) if not self.is_bias else tensors.tensor(f"{_stem(self.name)}.weight")
        bias = tensors.tensor(self.bias_name) if self.bias_name is not None else None
        weight, bias = (weight, value) if self.is_bias else (value, bias)
        kind: HostKind = "linear" if self.shape.kind == "conv" else self.shape.kind
        changed, changed_bias = _through(self.parts, DenseHost(weight.flatten(1), bias, kind=kind))
        if self.is_bias:
            assert changed_bias is not None
            return changed_bias
        if changed_bias is not None and bias is None:
            raise TargetError(
                f"the adapter gives '{self.target}' a bias, and this model has none there",
                help="serve the adapter as it is, or train it without biases (bias: none)",
            )
        return changed.view(stored.shape) if kind == "linear" else changed.t()


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0]


def _through(parts: Sequence[tuple[Method, Part]], host: Host) -> tuple[Tensor, Tensor | None]:
    weight, bias = host.weight().float(), host.bias
    for method, part in parts:
        weight, bias = method.merged(part, host)
        host = DenseHost(weight, bias)
    return weight, bias


def _overridden(value: Tensor, override: Override) -> Tensor:
    if override.rows is None:
        return override.value
    return value.float().index_copy(0, override.rows, override.value.float())


def _factors(method: Method, part: Part, shape: HostShape) -> tuple[Tensor, Tensor] | None:
    """A and B in fp32, the scale folded in, for a part that is low-rank whatever the weight is; else None."""
    try:
        primitives: tuple[Primitive, ...] = method.lower(part, Place(shape))
    except (NeedsBase, Unsupported):  # the method looked at the weight
        return None
    low = [p for p in primitives if isinstance(p, LowRank)]
    if not low or len(low) < len(primitives):
        return None
    return torch.cat([p.A for p in low]).float(), torch.cat([p.B for p in low], dim=1).float()


def edits(adapter: Adapter, tensors: Tensors, *, untie: bool = False) -> list[Edit]:
    """Every tensor that changes, or one TargetError with all that is in the way."""
    places = Places(tensors)
    adapter = methods.completed(methods.folded(adapter), _Stored(places))
    problems: list[str] = _not_weights(adapter)
    found: dict[str, Edit] = {}
    for target in adapter.targets:
        try:
            for edit in _edits_at(adapter, target, places, untie):
                if edit.name in found:
                    problems.append(f"'{target}' and '{found[edit.name].target}' are one tensor here ({edit.name})")
                found[edit.name] = edit
        except VeneerError as error:
            problems.append(error.message)
    if places.tied and places.head_name not in found and (table := found.get(places.table)) is not None:
        if table.parts:  # untied: the head stays what it was
            shape = places.shape(places.table, "linear", False)
            found[places.head_name] = Edit(places.head_name, places.head, places.table, None, shape)
        elif places.head_name in tensors:  # replaced rows serve both ends, also where the file has the table twice
            found[places.head_name] = replace(table, name=places.head_name, target=places.head, source=places.head_name)
    if problems:
        raise TargetError(
            f"this adapter can't be merged into this checkpoint:\n{listed(problems)}", help=_way_out(problems)
        )
    return list(found.values())


def _way_out(problems: Sequence[str]) -> str:
    if any("tied" in p for p in problems):
        return "--untie writes the head as a tensor of its own (the file grows by the size of the embedding)"
    return "serve the adapter as it is, or use the base it was trained on"


def _not_weights(adapter: Adapter) -> list[str]:
    """Parts that are no change of a stored tensor, with the method's own reason."""
    if adapter.spec.model_dump().get("invocation"):
        return [f"{adapter.spec.kind}: it switches on inside a sequence (aLoRA), which a weight can't"]
    return [
        f"{part.kind} at {part.target or 'the whole model'}: {methods.method_of(adapter, part).why_not_mergeable}"
        for part in adapter.parts
        if part.site not in ("weight", "override")
    ]


def _edits_at(adapter: Adapter, target: str, places: Places, untie: bool) -> list[Edit]:
    overrides, weights = _split(adapter, target)
    found: list[Edit] = []
    source = name = places.stored(target, "weight", required=bool(weights) or f"{target}.weight" in overrides)
    replaces_head = target == places.head and f"{target}.weight" in overrides
    if places.tied and (replaces_head or (weights and (source == places.table or target == places.head))):
        if not weights and _copies_the_table(adapter, overrides[f"{target}.weight"], places):
            return []
        if not untie:
            raise TargetError(f"'{target}' is tied: the head and the embedding are one tensor ({places.table})")
        if target == places.head:
            name, source = places.head_name, places.table
    bias = places.stored(target, "bias", required=f"{target}.bias" in overrides)
    kind = places.kind(target, [part for _, part in weights])
    shape = places.shape(source or bias or "", kind, bias is not None)
    edit = Edit(
        name or "", target, source or "", bias, shape, tuple(overrides.get(f"{target}.weight", ())), tuple(weights)
    )
    if name and (edit.overrides or weights):
        places.check(edit)
        found.append(edit)
    if bias and (f"{target}.bias" in overrides or (weights and edit.factors() is None)):
        found.append(replace(edit, name=bias, source=bias, overrides=tuple(overrides.get(f"{target}.bias", ()))))
    return found


def _copies_the_table(adapter: Adapter, head: Sequence[Override], places: Places) -> bool:
    """Whether the head is replaced by what replaces the embedding: PEFT saves it twice where it keeps the two tied."""
    table = _split(adapter, places.embedding)[0].get(f"{places.embedding}.weight", [])
    whole = [override.value for override in (*head, *table) if override.rows is None]
    return len(head) == len(table) == 1 and len(whole) == 2 and torch.equal(*whole)


def _split(adapter: Adapter, target: str) -> tuple[dict[str, list[Override]], list[tuple[Method, Part]]]:
    """Tensor name -> what replaces it, and the weight parts, at one target."""
    overrides: dict[str, list[Override]] = {}
    weights: list[tuple[Method, Part]] = []
    for part in adapter.parts:
        if part.target != target:
            continue
        method = methods.method_of(adapter, part)
        if part.site == "override":
            for name, override in method.lower_into(Lowered(), part, _NoSource()).overrides.items():
                overrides.setdefault(name, []).append(override)
        elif part.site == "weight":
            weights.append((method, methods.complete(adapter, part)))
    return overrides, weights


class _NoSource:
    """Replaced tensors need no host."""

    def host(self, target: str) -> Host:
        return Place(HostShape("linear", 0, 0))


class _Stored:
    """The sizes of a checkpoint's layers, for methods that make tensors of theirs from them."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def host(self, target: str) -> Host:
        name = self._places.stored(target, "weight", required=True)
        assert name is not None
        return Place(self._places.shape(name, self._places.kind(target, ()), False))


class Places:
    """Where module paths are in this checkpoint, in which orientation, and whether its head is tied."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        config = dict(tensors.config)
        try:
            native = decoder_config(config)
            rows = layout(native)
            self.kinds: dict[str, HostKind] = {path: h.kind for path, h in rows.hosts(native).items()}
            self.embedding, self.head = rows.embed_path, rows.head_path
        except VeneerError:  # not one of the native families: the conventional names, and shapes decide
            self.kinds = {}
            self.head = next((h for h in HEADS if self.find(h, "weight")), HEADS[0])
            named = next((e for e in EMBEDDINGS if self.find(e, "weight")), None)
            self.embedding = named or self._widest() or EMBEDDINGS[0]
        stored_head = self.find(self.head, "weight")
        self.table = self.find(self.embedding, "weight") or f"{self.embedding}.weight"
        self.head_name = stored_head or f"{self.head}.weight"
        self.tied = bool(config.get("tie_word_embeddings", stored_head is None)) and not self._head_differs(stored_head)

    def _widest(self) -> str | None:
        """The module that keeps one row for each token of the vocabulary and is no head, under whatever name."""
        rows = self._tensors.config.get("vocab_size")
        sizes = {name: self._tensors.shape(name) for name in self._tensors.names() if name.endswith(".weight")}
        found = [_stem(n) for n, size in sizes.items() if len(size) == 2 and size[0] == rows and _stem(n) not in HEADS]
        return found[0] if len(found) == 1 else None

    def _head_differs(self, stored: str | None) -> bool:
        """Whether the checkpoint has a head that is not its embedding, whatever config.json says."""
        if stored is None or self.table not in self._tensors:
            return False
        return not torch.equal(self._tensors.tensor(stored), self._tensors.tensor(self.table))

    def find(self, target: str, what: str) -> str | None:
        """The stored name of `target.what`: as it is, or without the model's prefix."""
        candidates = [f"{target}.{what}", f"{target.partition('.')[2]}.{what}"]
        if target == "lm_head":
            candidates.append(f"embed_out.{what}")
        return next((name for name in candidates if name in self._tensors), None)

    def stored(self, target: str, what: str, *, required: bool) -> str | None:
        name = self.find(target, what)
        if name is None and self.tied and target == self.head and what == "weight":
            return self.table
        if name is None and required:
            paths = [_stem(n) for n in self._tensors.names()]
            raise TargetError(f"there is no tensor '{target}.{what}': {did_you_mean(target, paths)}")
        return name

    def kind(self, target: str, parts: Sequence[Part]) -> HostKind:
        """How `target` is stored. Native families say it; otherwise the part, then the model type."""
        if target in self.kinds:
            return self.kinds[target]
        told = next((p.host for p in parts if p.host != "linear"), None)
        if told is not None:
            return told
        if target == self.embedding:
            return "embedding"
        return "conv1d" if self._tensors.config.get("model_type") in CONV1D_MODELS else "linear"

    def shape(self, name: str, kind: HostKind, has_bias: bool) -> HostShape:
        """The size of what is stored under `name`."""
        stored = self._tensors.tensor(name)
        if kind == "conv":
            return HostShape(kind, stored[0].numel(), stored.shape[0], has_bias, kernel=tuple(stored.shape[2:]))
        rows, columns = stored.shape[0], stored.shape[-1]
        out, into = (rows, columns) if kind == "linear" else (columns, rows)
        return HostShape(kind, into, out, has_bias)

    def check(self, edit: Edit) -> None:
        """Sizes and dtype of what is stored, against the parts."""
        stored = self._tensors.tensor(edit.source)
        if stored.dtype not in MERGEABLE:
            raise Unsupported(
                f"'{edit.source}' is stored as {str(stored.dtype).removeprefix('torch.')}, which is quantised"
            )
        for method, part in edit.parts:
            for name, wanted in method.tensor_shapes(edit.target, edit.shape).items():
                tensor = part.tensors.get(name)
                if tensor is not None and tuple(tensor.shape) != tuple(wanted):
                    told = f"'{edit.target}': {name} is {list(tensor.shape)}, expected {list(wanted)}"
                    raise TargetError(f"{told} for a weight of {list(stored.shape)}")
        for override in edit.overrides:
            wanted = stored.shape if override.rows is None else (len(override.rows), stored.shape[1])
            if tuple(override.value.shape) != tuple(wanted):
                raise TargetError(
                    f"'{edit.name}' is {list(stored.shape)}, the adapter has {list(override.value.shape)}: another base, "
                    "or this one with tokens added to it"
                )
