"""An adapter as a value: a frozen spec, its tensors, and where they came from. It knows no live model.

`Adapter` is what files, the library, the algebra, the merge and the engine pass around. A part is (kind, target, tensors):
a LoRA that also trains a norm and a few embedding rows is one adapter with three kinds of part.

The surprise: a scaled adapter is an adapter with another alpha, so the factor survives every file format.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from veneer.errors import NotFound, TargetError
from veneer.registry import did_you_mean
from veneer.types import BaseShape, HostKind, Site

if TYPE_CHECKING:
    from torch import Tensor


class Spec(Protocol):
    """What an adapter needs of its method (a class of `methods/`)."""

    @property
    def kind(self) -> str: ...

    def model_dump(self, *, mode: str = ...) -> dict[str, Any]: ...

    def scale(self, target: str, rank: int) -> float: ...

    def scaled(self, factor: float) -> Spec: ...


@dataclass(frozen=True, eq=False)
class Part:
    """What one method keeps for one place.

    kind     the registered method that understands `tensors`
    target   module path as in the checkpoint ("model.layers.0.self_attn.q_proj"), or None for the whole model
    tensors  by the method's own names: {"A": [rank, in], "B": [out, rank]} for LoRA
    host     the kind of layer that carries it, which file formats need to know (embedding and Conv1D have their own names)
    """

    kind: str
    site: Site
    target: str | None
    tensors: Mapping[str, Tensor]
    host: HostKind = "linear"

    @property
    def num_parameters(self) -> int:
        return sum(t.numel() for t in self.tensors.values())


@dataclass(frozen=True)
class Probe:
    """What an adapter said on one short text when it was saved, for whoever wants to know whether it still does.

    digest        of the adapter that was asked: what is made from it says something else
    ids           the text's tokens
    tokens        the likeliest next tokens
    logits, base  their scores with the adapter and without
    """

    digest: str
    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: tuple[float, ...]
    base: tuple[float, ...]


@dataclass(frozen=True)
class Provenance:
    """Where an adapter came from. Everything is optional: a file from elsewhere says little.

    base           identity of the base: SHA-256 over its weights rounded to bf16
    base_name      what the trainer called it
    base_samples   target -> sampled values of the frozen weight, to recognise the same weights in another precision; kept in fp32
    trained_on     dtype and quantisation of the base during training
    data           SHA-256 of the training rows
    parents        digests of the adapters this one was made from
    chat_template  the template its data was rendered with
    probe          what it said when it was saved
    extra          anything else worth keeping, as JSON
    """

    base: str | None = None
    base_name: str | None = None
    base_samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    trained_on: str | None = None
    data: str | None = None
    parents: tuple[str, ...] = ()
    chat_template: str | None = None
    probe: Probe | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class HostSource(Protocol):
    """Anything that can show a base layer by its module path: a `Base`, or a function wrapped in one."""

    def host(self, target: str) -> Any: ...


@dataclass(frozen=True, eq=False)
class Adapter:
    """A frozen spec, parts and provenance.

    spec        a method instance, as `LoRA(rank=16)`
    parts       one per place, in checkpoint order
    provenance  base identity, data hash, parents
    """

    spec: Spec
    parts: tuple[Part, ...]
    provenance: Provenance = field(default_factory=Provenance)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The module paths that carry a part, as named in the checkpoint."""
        return tuple(dict.fromkeys(p.target for p in self.parts if p.target is not None))

    @cached_property
    def shared(self) -> tuple[Part, ...]:
        """Weight parts without a target: tensors that are stored once for all targets (VeRA)."""
        return tuple(p for p in self.parts if p.site == "weight" and p.target is None)

    @cached_property
    def form(self) -> Hashable:
        """What it is but for its numbers and where they came from: adapters of one form differ in those alone."""
        parts = [
            (p.kind, p.site, p.target, p.host, *((name, t.shape, t.dtype) for name, t in p.tensors.items()))
            for p in self.parts
        ]
        return self.spec.kind, json.dumps(self.spec.model_dump(mode="json"), sort_keys=True), tuple(parts)

    @property
    def num_parameters(self) -> int:
        """Numbers stored, over all parts."""
        return sum(p.num_parameters for p in self.parts)

    def part(self, target: str, kind: str | None = None) -> Part:
        """The part at `target` (of `kind`, by default the spec's own); NotFound names the nearest target."""
        kind = self.spec.kind if kind is None else kind
        for part in self.parts:
            if part.target == target and part.kind == kind:
                return part
        raise NotFound(f"this adapter has no {kind} part at '{target}'", help=did_you_mean(target, list(self.targets)))

    def scale(self, target: str) -> float:
        """The effective scale at `target`: what multiplies B @ A there."""
        part = self.part(target)
        if "A" not in part.tensors:
            raise TargetError(f"{self.spec.kind} has no scale: its update is not a scaled product")
        return self.spec.scale(target, part.tensors["A"].shape[0])

    def scaled(self, factor: float) -> Adapter:
        """A new adapter whose effective scale is `factor` times this one's. Refused for methods without a scale."""
        return replace(self, spec=self.spec.scaled(factor))

    def misfits(self, part: Part, shape: BaseShape) -> list[str]:
        """What of `part` does not belong on a base of this shape, in words; its rank is as it is."""
        found: list[str] = _methods().misfits(self, part, shape)
        return found

    def delta(self, target: str, base: HostSource | None = None) -> Tensor:
        """The effective update of the weight at `target`, fp32 `[out, in]`.

        Methods whose update depends on the weight (DoRA, IA3) raise `NeedsBase` without one.
        """
        update: Tensor = _methods().delta(self, target, None if base is None else base.host(target))
        return update

    @cached_property
    def digest(self) -> str:
        """SHA-256 over weights, normalised spec and base identity. Two adapters with one digest are the same function."""
        digest = hashlib.sha256()
        head = {"spec": self.spec.model_dump(mode="json"), "kind": self.spec.kind, "base": self.provenance.base}
        digest.update(json.dumps(head, sort_keys=True).encode())
        for part in sorted(self.parts, key=lambda p: (p.target or "", p.kind)):
            for name, tensor in sorted(part.tensors.items()):
                value = tensor.detach().cpu().contiguous()
                digest.update(f"{part.kind}|{part.target}|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
                digest.update(_bytes(value))
        return digest.hexdigest()

    def known_as(self, digest: str) -> Adapter:
        """This adapter with its digest given by whoever knows it, so that nobody reads every number to compute it again."""
        vars(self)["digest"] = digest
        return self

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Adapter:
        """The same adapter with `function` applied to every tensor."""
        parts = (replace(p, tensors={k: function(v) for k, v in p.tensors.items()}) for p in self.parts)
        return replace(self, parts=tuple(parts))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a PEFT folder with `veneer.json` beside it, all at once or not at all."""
        importlib.import_module("veneer.formats").save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Adapter:
        """Read an adapter folder (PEFT's files, with or without ours), strictly."""
        adapter: Adapter = importlib.import_module("veneer.formats").load(path)
        return adapter


def _methods() -> Any:
    return importlib.import_module("veneer.methods")


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data
