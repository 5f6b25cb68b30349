"""The methods, found by file name, and what can be done with an adapter of any of them.

`start_parts` makes a fresh one, `lower` turns it into what the decoder runs, `merged` into a plain weight, `delta` into the dense
update, `folded` into what files keep.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any, cast

from torch import Tensor

from veneer.adapter import Adapter, HostSource, Part
from veneer.base.host import DenseHost, Host
from veneer.errors import NeedsBase, NotFound
from veneer.methods._abstract import METHODS, Method, PeftForm, Regime
from veneer.methods._start import BaseView, FactorSource, Place, embedding_path, host_at, start_parts
from veneer.registry import did_you_mean, discover
from veneer.types import BaseShape, HostShape, Lowered

__all__ = [
    "METHODS",
    "BaseView",
    "FactorSource",
    "Method",
    "PeftForm",
    "Place",
    "Regime",
    "complete",
    "completed",
    "delta",
    "embedding_path",
    "folded",
    "host_at",
    "load_all",
    "lower",
    "merged",
    "method_of",
    "misfits",
    "parse",
    "start_parts",
]


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


def misfits(adapter: Adapter, part: Part, shape: BaseShape) -> list[str]:
    """Why `part` does not fit a base of this shape: a place that is not there, or a tensor of another size. Any rank is right."""
    if part.site == "weight" and part.target is not None:
        host = shape.hosts.get(part.target)
        return [f"{part.target} is not a layer"] if host is None else _missized(adapter, part, host)
    return _misplaced(part, shape)


def _misplaced(part: Part, shape: BaseShape) -> list[str]:
    """`misfits` of what does not act on a weight. Replaced tensors are looked at when they are packed."""
    tensors = part.tensors
    if part.site == "sublayer":
        match = re.fullmatch(r"layers\.(\d+)\.(attn_out|mlp_out)", part.target or "")
        if match is None or int(match[1]) >= shape.layers:
            return [
                f"{part.target} is not a sublayer: layers.0 to layers.{shape.layers - 1}, each .attn_out and .mlp_out"
            ]
    states = (shape.layers, None, shape.kv_heads, shape.head_dim)
    sizes: dict[str, dict[str, tuple[int | None, ...]]] = {
        "sublayer": {"down": (None, shape.hidden), "up": (shape.hidden, None), "up_bias": (shape.hidden,)},
        "tokens": {"rows": (None, shape.hidden)},
        "kv": {"key": states, "value": states},
    }
    if "key" in tensors and tensors["key"].shape != tensors["value"].shape:
        return [
            f"prefix: key is {list(tensors['key'].shape)}, value {list(tensors['value'].shape)}, expected equal sizes"
        ]
    found = []
    for name, expected in sizes.get(part.site, {}).items():
        size = tensors[name].shape if name in tensors else expected
        if len(size) != len(expected) or any(n not in (None, m) for m, n in zip(size, expected, strict=True)):
            told = ", ".join("any" if n is None else str(n) for n in expected)
            found.append(f"{part.target or part.kind}: {name} is {list(size)}, expected [{told}]")
    return found


def _missized(adapter: Adapter, part: Part, shape: HostShape) -> list[str]:
    """Tensors of a weight part whose size is not the one its method has at a layer of this shape."""
    method, target = method_of(adapter, part), part.target or ""
    declared = method.rank_at(target)
    rank = part.tensors["A"].shape[0] if "A" in part.tensors else declared
    is_told_apart = declared not in (shape.in_features, shape.out_features)
    found = []
    for name, wanted in method.tensor_shapes(target, shape).items():
        size = tuple(part.tensors[name].shape) if name in part.tensors else wanted
        of_rank = [w == declared and (is_told_apart or size[at : at + 1] == (rank,)) for at, w in enumerate(wanted)]
        expected = [rank if is_rank else w for w, is_rank in zip(wanted, of_rank, strict=True)]
        if list(size) != expected:
            found.append(
                f"{target}: {name} is {list(size)}, expected {expected} for {shape.out_features} x {shape.in_features}"
            )
    return found


def complete(adapter: Adapter, part: Part) -> Part:
    """`part` with the tensors that its adapter stores once for all of them (a weight part without target)."""
    for shared in adapter.shared:
        if shared.kind == part.kind:
            return replace(part, tensors={**shared.tensors, **part.tensors})
    return part


def merged(adapter: Adapter, target: str, host: Host) -> tuple[Tensor, Tensor | None]:
    """The weight `[out, in]` and bias at `target` with the adapter in it, fp32. Replaced tensors come first."""
    here = sorted((p for p in adapter.parts if p.target == target), key=lambda p: p.site != "override")
    if not here:
        raise NotFound(f"this adapter has no part at '{target}'", help=did_you_mean(target, list(adapter.targets)))
    weight, bias = host.weight(), host.bias
    for part in here:
        weight, bias = method_of(adapter, part).merged(complete(adapter, part), host)
        host = DenseHost(weight, bias)
    return weight.float(), bias


def delta(adapter: Adapter, target: str, host: Host | None) -> Tensor:
    """merged - W, fp32 `[out, in]`; low-rank methods need no host."""
    part = complete(adapter, adapter.part(target))
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
    adapter = completed(adapter, base)
    for part in adapter.parts:
        if part.site == "weight" and part.target is None:
            continue
        lowered = method_of(adapter, part).lower_into(lowered, complete(adapter, part), base)
    return lowered


def completed(adapter: Adapter, base: HostSource) -> Adapter:
    """`adapter` with whatever its file leaves out because it follows from the sizes of `base`."""
    return cast(Method, adapter.spec).completed(adapter, base)


def folded(adapter: Adapter) -> Adapter:
    """What files keep of `adapter`: the same function, without what only training needs."""
    return cast(Method, adapter.spec).folded(adapter)
