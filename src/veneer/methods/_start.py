"""From a method and its targets to the parts of a fresh adapter.

The surprise: a part's start is drawn from a generator of its own (seed + place), so adding a target changes no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor

from veneer.adapter import Part
from veneer.base.host import Host
from veneer.errors import TargetError, Unsupported, listed
from veneer.methods._abstract import METHODS, Method
from veneer.types import BaseShape, Factors, HostKind, HostShape, Site

FactorSource = Callable[[str, Host, torch.Generator], Factors | None]
"""(target, host, generator) -> the start that `inits/` gives there, or None for methods without factors."""


class BaseView(Protocol):
    """What a fresh adapter needs of a base."""

    @property
    def shape(self) -> BaseShape: ...

    def host(self, target: str) -> Host: ...


@final
class Place(Host):
    """A place without a weight of its own: a sublayer's output, or what stands before a sequence."""

    bias = None

    def __init__(self, shape: HostShape) -> None:
        self.shape = shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def weight(self) -> Tensor:
        raise Unsupported(f"a {self.shape.kind} place has no weight")


@final
class InputRows(Host):
    """The input embedding as the first block reads it: virtual tokens stand behind the factor that some families put on rows."""

    bias = None

    def __init__(self, embedding: Host, factor: float) -> None:
        self._embedding, self._factor, self.shape = embedding, factor, embedding.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    def weight(self) -> Tensor:
        return self._scaled(self._embedding.weight())

    def apply(self, x: Tensor) -> Tensor:
        return self._scaled(self._embedding.apply(x))

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self._factor == 1.0 else rows * torch.tensor(self._factor, dtype=rows.dtype, device=rows.device)


def host_at(site: Site, target: str, base: BaseView) -> Host:
    """The host that a method of `site` sees at `target`."""
    shape = base.shape
    if site == "sublayer":
        width = shape.hidden or _width_of(target, shape)
        return Place(HostShape("sublayer", width, width))
    if site == "kv":
        return Place(HostShape("kv", shape.kv_heads, shape.head_dim, layers=shape.layers))
    if site == "tokens":
        return InputRows(base.host(embedding_path(shape)), shape.embed_scale)
    return base.host(target)


def _width_of(target: str, shape: BaseShape) -> int:
    """What a module returns, on a model whose sizes nobody wrote down: the outputs of its last layer."""
    inside = [host for path, host in shape.hosts.items() if path == target or path.startswith(f"{target}.")]
    if not inside:
        raise TargetError(f"'{target}' has no layer inside that would tell its width", help="name a module with one")
    return inside[-1].out_features


def embedding_path(shape: BaseShape) -> str:
    """The module path of the input embedding."""
    for path, host in shape.hosts.items():
        if host.kind == "embedding":
            return path
    raise TargetError("this base has no input embedding to put tokens before")


def start_parts(
    method: Method, targets: Sequence[str], base: BaseView, generator: torch.Generator, factors: FactorSource
) -> tuple[Part, ...]:
    """The parts of a fresh adapter at `targets`, then its companions. Everything that cannot be is said at once."""
    companions = [
        (METHODS[fields["kind"]](**_without_kind(fields)), target)
        for fields, target in method.companions(base.shape, targets)
    ]
    wanted: list[tuple[Method, str, Host]] = [(method, t, host_at(method.site, t, base)) for t in targets]
    wanted += [(m, t, host_at(m.site, t, base)) for m, t in companions]
    refusals = [f"{t or m.kind}: {why}" for m, t, h in wanted if (why := m.refusal(t, h.shape)) is not None]
    replaced = [t for m, t, _ in wanted if m.site == "override"]
    refusals += [f"{t}: two parts would replace it" for t in dict.fromkeys(replaced) if replaced.count(t) > 1]
    if refusals:
        raise TargetError(f"{method.kind} cannot go everywhere it was asked to:\n{listed(refusals)}")
    seed = int(torch.randint(2**62, (), generator=generator))
    parts = [_start(m, t, h, _generator(seed, f"{m.kind} {t}"), factors if m is method else None) for m, t, h in wanted]
    shared = method.shared_start([h.shape for m, _, h in wanted if m is method], _generator(seed, "shared"))
    if shared:
        parts.insert(0, Part(method.kind, method.site, None, shared))
    return tuple(parts)


def _start(method: Method, target: str, host: Host, generator: torch.Generator, factors: FactorSource | None) -> Part:
    given = None if factors is None else factors(target, host, generator)
    tensors = method.start(target, host, given, generator)
    return Part(method.kind, method.site, target or None, tensors, _kind_of(method.site, host))


def _kind_of(site: Site, host: Host) -> HostKind:
    return "tokens" if site == "tokens" else host.shape.kind


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _without_kind(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "kind"}
