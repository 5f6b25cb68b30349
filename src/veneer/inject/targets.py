"""Which layers carry an adapter: one grammar, strict, with a table of what matched.

    all-linear        every linear layer and Conv1D except the output head
    q_proj            the last names of a module path: `q_proj`, `self_attn.q_proj`, or the whole path
    mlp.*             a glob over the whole path, or over its last names
    re:.*layers\\.[0-3]\\..*   a regular expression that matches the whole path

`exclude` takes the same words. `layers` keeps blocks by number: `[0, 1]`, `first:4`, `last:8`. Every entry must match something,
and so must every key of `rank_pattern` and `alpha_pattern`: an entry that matches nothing is a typo, and a silent typo is a wrong
adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.errors import TargetError, listed
from veneer.registry import did_you_mean, selects
from veneer.types import BaseShape, HostShape


@dataclass(frozen=True)
class Match:
    """One row of the coverage table: an entry, what it matched, and how many numbers the adapter keeps there."""

    entry: str
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class Selection:
    """The chosen targets in checkpoint order, and how each entry contributed."""

    targets: tuple[str, ...]
    table: tuple[Match, ...]

    @property
    def parameters(self) -> int:
        return sum(match.parameters for match in self.table)


def select(shape: BaseShape, spec: Any) -> Selection:
    """The targets of a weight method on a base of this shape, or one TargetError that lists every entry that is wrong."""
    hosts = shape.hosts
    problems: list[str] = []
    chosen: dict[str, str] = {}
    for entry in spec.targets:
        found = [path for path in matching(entry, shape) if path not in chosen]
        if not found and not any(True for _ in matching(entry, shape)):
            problems.append(_nothing("targets", entry, hosts))
        chosen.update(dict.fromkeys(found, entry))
    for entry in spec.exclude:
        dropped = set(matching(entry, shape)) & set(chosen)
        if not dropped:
            problems.append(_nothing("exclude", entry, chosen or hosts))
        chosen = {path: by for path, by in chosen.items() if path not in dropped}
    chosen, wrong = _keep_layers(chosen, spec.layers)
    problems += wrong + _pattern_problems(spec, chosen) + _rank_problems(spec, hosts, chosen)
    if not problems and not chosen:
        problems.append("targets, exclude and layers together leave no layer")
    if problems:
        raise TargetError(
            f"the selection of targets is wrong:\n{listed(problems)}",
            help="`veneer plan --config FILE` prints what each entry matches",
        )
    order = [path for path in hosts if path in chosen]
    return Selection(tuple(order), _table(spec, hosts, order, chosen))


def matching(entry: str, shape: BaseShape) -> Iterable[str]:
    """The module paths that one selector names, in checkpoint order."""
    if entry == "all-linear":
        return [p for p, h in shape.hosts.items() if h.kind in ("linear", "conv1d") and p != shape.head]
    return [p for p in shape.hosts if selects(entry, p)]


def layer_of(path: str) -> int | None:
    """The block number in a module path: its first part that is a number.

    >>> layer_of("model.layers.3.self_attn.q_proj"), layer_of("lm_head")
    (3, None)
    """
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _nothing(what: str, entry: str, paths: Iterable[str]) -> str:
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    return f"{what}: '{entry}' matches nothing; {did_you_mean(entry, names)}"


def _keep_layers(chosen: dict[str, str], layers: str | Sequence[int] | None) -> tuple[dict[str, str], list[str]]:
    if layers is None:
        return chosen, []
    present = sorted({n for n in map(layer_of, chosen) if n is not None})
    if isinstance(layers, str):
        kind, _, count = layers.partition(":")
        if kind not in ("first", "last") or not count.isdigit() or int(count) == 0:
            return chosen, [f"layers: '{layers}' is not first:N, last:N or a list of block numbers"]
        wanted = set(present[: int(count)] if kind == "first" else present[-int(count) :])
        if int(count) > len(present):
            return chosen, [f"layers: '{layers}' asks for more than the {len(present)} blocks there are"]
    else:
        wanted = set(layers)
        missing = sorted(wanted - set(present))
        if missing:
            return chosen, [f"layers: no block {', '.join(map(str, missing))}; the blocks are 0 to {present[-1]}"]
    return {path: by for path, by in chosen.items() if layer_of(path) in wanted}, []


def _pattern_problems(spec: Any, chosen: Mapping[str, str]) -> list[str]:
    problems = []
    for name in ("rank_pattern", "alpha_pattern"):
        for key in dict(spec).get(name, {}):
            try:
                if not any(re.match(rf"(.*\.)?({key})$", path) for path in chosen):
                    problems.append(f"{name}: '{key}' matches none of the {len(chosen)} targets")
            except re.error as error:
                problems.append(f"{name}: '{key}' is not a regular expression: {error}")
    return problems


def _rank_problems(spec: Any, hosts: Mapping[str, HostShape], chosen: Mapping[str, str]) -> list[str]:
    problems = []
    for path in chosen:
        rank = spec.rank_at(path)
        limit = min(hosts[path].in_features, hosts[path].out_features)
        if rank is not None and rank > limit:
            size = f"{hosts[path].in_features} in, {hosts[path].out_features} out"
            problems.append(f"rank {rank} at {path} is above the layer's {limit} ({size})")
    return problems


def _table(
    spec: Any, hosts: Mapping[str, HostShape], order: Sequence[str], chosen: Mapping[str, str]
) -> tuple[Match, ...]:
    rows = []
    for entry in dict.fromkeys(chosen[path] for path in order):
        for name in dict.fromkeys(path.rsplit(".", 1)[-1] for path in order if chosen[path] == entry):
            paths = tuple(p for p in order if chosen[p] == entry and p.rsplit(".", 1)[-1] == name)
            layers = tuple(n for n in map(layer_of, paths) if n is not None)
            count = sum(_numbers(spec.tensor_shapes(p, hosts[p])) for p in paths)
            rows.append(Match(entry if entry == name else f"{entry} > {name}", paths, layers, count))
    return tuple(rows)


def _numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes.values():
        count = 1
        for size in shape:
            count *= size
        total += count
    return total
