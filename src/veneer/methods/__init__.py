"""The methods, found by file name, and the three things that can be done with a part of any of them.

`lower` turns an adapter into what the decoder runs; `merged` into a plain weight; `delta` into the dense update.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import Tensor

from veneer.adapter import Adapter, HostSource, Part
from veneer.base.host import Host
from veneer.errors import NeedsBase
from veneer.methods._abstract import METHODS, Method
from veneer.registry import discover
from veneer.types import Lowered

__all__ = ["METHODS", "Method", "delta", "load_all", "lower", "merged", "method_of", "parse"]


@cache
def load_all() -> dict[str, type[Method]]:
    """Every method by its kind. The first call imports the files of this folder."""
    discover(__name__)
    return METHODS


def parse(fields: dict[str, Any]) -> Method:
    """A method from plain fields, `kind` among them: `parse({"kind": "lora", "rank": 8})`."""
    load_all()
    rest = dict(fields)
    return METHODS[rest.pop("kind")](**rest)


def method_of(adapter: Adapter, part: Part) -> Method:
    """The method that understands `part`: the adapter's own, or the plain one of the part's kind."""
    if part.kind == adapter.spec.kind:
        return cast(Method, adapter.spec)
    load_all()
    return METHODS[part.kind]()


def merged(adapter: Adapter, target: str, host: Host) -> tuple[Tensor, Tensor | None]:
    """The weight `[out, in]` and bias at `target` with the adapter in it, fp32."""
    part = adapter.part(target)
    return method_of(adapter, part).merged(part, host)


def delta(adapter: Adapter, target: str, host: Host | None) -> Tensor:
    """merged - W, fp32 `[out, in]`; low-rank methods need no host."""
    part = adapter.part(target)
    method = method_of(adapter, part)
    direct = method.direct_delta(part)
    if direct is not None:
        return direct
    if host is None:
        raise NeedsBase(
            f"the update of {method.kind} at '{target}' depends on the frozen weight",
            help="pass the base: adapter.delta(target, base)",
        )
    return method.merged(part, host)[0] - host.weight().float()


def lower(adapter: Adapter, base: HostSource, *, digest: str = "") -> Lowered:
    """The whole adapter as primitives, differentiable in its tensors. `digest` names the result in caches."""
    lowered = Lowered(digest=digest)
    for part in adapter.parts:
        lowered = method_of(adapter, part).lower_into(lowered, part, base)
    return lowered
