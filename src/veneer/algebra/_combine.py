"""Combining adapters: one rule, target by target, and a LoRA with effective scale 1 as the result.

The ranks, targets, scale rules and patterns of the adapters may all differ: a rule sees effective updates. An adapter that
does not touch a target takes no part there. Where a result has to be projected (a dense source, a dense space, `rank=`) the
relative error of each target is in the report, which also travels in the provenance of the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, cast

from veneer import methods
from veneer.adapter import Adapter, HostSource, Part, Provenance
from veneer.algebra._rule import Product, Updates, load_all, options, schema
from veneer.algebra._sources import is_shared, is_update, source
from veneer.algebra._spaces import Fit, fitted, product_norm
from veneer.errors import BaseMismatch, ConfigError, NeedsBase, TargetError, Unsupported, listed
from veneer.methods.lora import LoRA
from veneer.ops.threads import side_by_side
from veneer.registry import did_you_mean, selects
from veneer.types import HostKind

Weighted: TypeAlias = Adapter | tuple[Adapter, float]
Others: TypeAlias = Literal["refuse", "keep", "drop"]

WORKERS = 4
"""Most targets that are combined at a time."""


@dataclass(frozen=True)
class TargetReport:
    """What happened at one target: the rank of the result, the norm of the combined update, the relative error of projecting."""

    target: str
    rank: int
    norm: float
    error: float
    adapters: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What a combination did: the rule with its options, every target, and the parts that were kept or dropped."""

    rule: str
    options: Mapping[str, Any]
    weights: Mapping[str, float]
    targets: tuple[TargetReport, ...]
    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Relative Frobenius error over all targets together: 0 where every result is exact."""
        total = sum(t.norm**2 for t in self.targets)
        return math.sqrt(sum((t.error * t.norm) ** 2 for t in self.targets) / total) if total > 0 else 0.0

    @property
    def worst(self) -> TargetReport:
        return max(self.targets, key=lambda t: t.error)


@dataclass(frozen=True, eq=False)
class Combination:
    """The combined adapter and the account of how it came about."""

    adapter: Adapter
    report: Report


def combine(adapters: Mapping[str, Weighted], rule: str = "linear", **options: Any) -> Adapter:
    """One adapter from several: `combine({"a": (a, 0.7), "b": (b, 0.3)}, rule="ties", density=0.3)`.

    The report is in the result's `provenance.extra["combination"]`; `combination` returns it as a value and documents the
    other arguments.
    """
    return combination(adapters, rule, **options).adapter


def combination(
    adapters: Mapping[str, Weighted],
    rule: str = "linear",
    *,
    base: HostSource | None = None,
    rank: int | None = None,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    weights: Mapping[str, Mapping[str, float]] | None = None,
    others: Others = "refuse",
    allow_base_mismatch: str | None = None,
    **rule_options: Any,
) -> Combination:
    """Combine and report.

    adapters  name -> adapter, or (adapter, weight); the names seed DARE, so they matter and their order doesn't
    base      for sources whose update depends on the frozen weight (DoRA, IA3)
    rank      project every target to at most this rank; the errors are in the report
    include, exclude   selectors of targets: a name, a suffix, a glob, or re:REGEX. One that matches nothing is an error
    weights   name -> {selector: weight}, in place of that adapter's weight at the matching targets; the first match wins
    others    parts that are no weight update (biases, replaced tensors, prompts): "refuse", "drop", "keep" those of one adapter
    allow_base_mismatch  the reason for combining adapters of different bases; it is recorded
    """
    pairs = {name: given if isinstance(given, tuple) else (given, 1.0) for name, given in sorted(adapters.items())}
    bare = {name: adapter for name, (adapter, _) in pairs.items()}
    if "rank" in schema(rule).model_fields and rank is not None:
        rule_options["rank"] = rank
    checked = options(rule, rule_options)
    _refuse_bad_arguments(pairs, rank)
    _refuse_other_bases(bare, allow_base_mismatch)
    chosen = _chosen_targets(list(bare.values()), include, exclude)
    table = _weights(pairs, weights or {}, chosen)
    kept, dropped = _other_parts({name: methods.folded(adapter) for name, adapter in bare.items()}, others)
    sources = _Sources(bare, base)
    sources.check(chosen)

    def combined(target: str) -> tuple[Part, TargetReport]:
        updates, dense = sources.updates(target, table, seed)
        product, report = _settled(load_all()[rule](updates, **checked), updates, rank, dense)
        a = product.A.float().contiguous().reshape(len(product.A), *sources.input_axes(target))
        tensors = {"A": a, "B": product.B.float().contiguous()}
        return Part("lora", "weight", target, tensors, sources.host_kind(target)), report

    with side_by_side(WORKERS) as pool:  # the matrices of one target are too small for two cores
        found = list(pool.map(combined, chosen))
    parts, reports = [part for part, _ in found], [report for _, report in found]
    told = {name: weight for name, (_, weight) in pairs.items()}
    account = Report(rule, checked, told, tuple(reports), tuple(_place(p) for p in kept), tuple(dropped))
    provenance = _provenance(list(bare.values()), account, seed, allow_base_mismatch)
    return Combination(Adapter(lora_spec(parts), (*parts, *kept), provenance), account)


def _settled(product: Product, updates: Updates, rank: int | None, dense: bool) -> tuple[Product, TargetReport]:
    """The rule's product at the rank that was asked for, and its report."""
    limit = min(product.B.shape[0], product.A.shape[1])
    cap = rank if rank is not None else product.rank if product.rank is not None else updates.rank if dense else None
    if cap is None and dense:
        raise ConfigError(
            f"the combined update at '{updates.target}' is dense, and no adapter there has a rank to go by",
            help="say how large the result may be: rank=16",
        )
    if product.A.shape[0] > (limit if cap is None else min(limit, cap)):
        fit = fitted(product.B, product.A, cap)
    else:
        fit = Fit(product.B, product.A, product_norm(product.B, product.A), 0.0)
    return Product(fit.B, fit.A), TargetReport(updates.target, fit.A.shape[0], fit.norm, fit.error, updates.names)


class _Sources:
    """The updates of all adapters, target by target, with every problem found before any work is done."""

    def __init__(self, adapters: Mapping[str, Adapter], base: HostSource | None) -> None:
        self._base = base
        self._parts: dict[str, dict[str, tuple[Adapter, Part]]] = {}
        self._double: list[str] = []
        for name, adapter in adapters.items():
            for part in adapter.parts:
                if is_update(part):
                    assert part.target is not None
                    at = self._parts.setdefault(part.target, {})
                    if name in at:
                        self._double.append(f"{name}: two weight parts at '{part.target}'")
                    at[name] = (adapter, part)

    def updates(self, target: str, weights: Mapping[tuple[str, str], float], seed: int) -> tuple[Updates, bool]:
        """What a rule sees at `target`, and whether a source there is dense."""
        found = {name: source(adapter, part, self._base) for name, (adapter, part) in self._parts[target].items()}
        updates = Updates(
            target,
            tuple(found),
            tuple(weights[name, target] for name in found),
            tuple(s.A for s in found.values()),
            tuple(s.B for s in found.values()),
            max((s.rank for s in found.values() if s.rank is not None), default=None),
            seed,
        )
        return updates, any(s.dense for s in found.values())

    def host_kind(self, target: str) -> HostKind:
        return next(iter(self._parts[target].values()))[1].host

    def input_axes(self, target: str) -> tuple[int, ...]:
        """What a row of A looks like as stored: `[in]`, or `[channels, *kernel]` of a convolution."""
        _, part = next(iter(self._parts[target].values()))
        return tuple(part.tensors["A"].shape[1:]) if part.host == "conv" else (-1,)

    def check(self, targets: Iterable[str]) -> None:
        problems, kind, help = list(self._double), TargetError, None
        for target in targets:
            shapes: dict[str, tuple[int, int]] = {}
            for name, (adapter, part) in self._parts[target].items():
                try:
                    shapes[name] = _shape(adapter, part, self._base)
                except (NeedsBase, Unsupported) as error:
                    problems.append(f"{name}: {error.message}")
                    kind, help = cast("type[TargetError]", type(error)), error.help
            if len(set(shapes.values())) > 1:
                told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
                problems.append(f"'{target}' has different sizes: {told}")
        if problems:
            raise kind(
                f"these adapters can't be combined:\n{listed(problems)}", help=help or "leave targets out with exclude"
            )


def _shape(adapter: Adapter, part: Part, base: HostSource | None) -> tuple[int, int]:
    if set(part.tensors) >= {"A", "B"} and part.kind == "lora":
        return part.tensors["B"].shape[0], part.tensors["A"][0].numel()
    return source(adapter, part, base).shape


def _refuse_bad_arguments(pairs: Mapping[str, tuple[Adapter, float]], rank: int | None) -> None:
    problems = [] if pairs else ["no adapters were given"]
    problems += [f"{name}: weight {w} is not a finite number" for name, (_, w) in pairs.items() if not math.isfinite(w)]
    for name, (adapter, _) in pairs.items():
        if adapter.spec.model_dump().get("invocation"):
            problems.append(f"{name}: it switches on inside a sequence (aLoRA), which a sum can't")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        problems.append(f"rank is {rank!r}, expected a whole number from 1")
    if problems:
        raise ConfigError(f"these adapters can't be combined:\n{listed(problems)}")


def _refuse_other_bases(adapters: Mapping[str, Adapter], reason: str | None) -> None:
    bases = {name: a.provenance.base for name, a in adapters.items() if a.provenance.base is not None}
    if len(set(bases.values())) > 1 and reason is None:
        told = [f"{name}: {adapters[name].provenance.base_name or 'base'} {base[:12]}" for name, base in bases.items()]
        raise BaseMismatch(
            f"these adapters belong to different bases:\n{listed(told)}",
            help="an update of one base means nothing on another; if you know better: allow_base_mismatch='REASON'",
        )


def _chosen_targets(adapters: Sequence[Adapter], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """All targets with a weight update that the selectors leave, in the order of the first adapter that has them."""
    found = dict.fromkeys(p.target for a in adapters for p in a.parts if is_update(p) and p.target is not None)
    idle = [s for s in (*include, *exclude) if not any(selects(s, t) for t in found)]
    if idle:
        problems = [f"'{s}' ({did_you_mean(s, list(found))})" for s in idle]
        raise TargetError(f"these selectors match no target of the adapters:\n{listed(problems)}")
    chosen = [t for t in found if not include or any(selects(s, t) for s in include)]
    chosen = [t for t in chosen if not any(selects(s, t) for s in exclude)]
    if not chosen:
        raise TargetError("nothing is left to combine: the selectors, or the adapters' parts, leave no weight update")
    return chosen


def _weights(
    pairs: Mapping[str, tuple[Adapter, float]], special: Mapping[str, Mapping[str, float]], targets: Sequence[str]
) -> dict[tuple[str, str], float]:
    """(name, target) -> weight."""
    problems = [
        f"weights for '{n}', which is no adapter here: {did_you_mean(n, list(pairs))}"
        for n in special
        if n not in pairs
    ]
    for name, table in ((n, special[n]) for n in special if n in pairs):
        own = {p.target for p in pairs[name][0].parts if is_update(p) and p.target is not None}.intersection(targets)
        problems += [f"{name}: '{s}' matches no target of it" for s in table if not any(selects(s, t) for t in own)]
        problems += [f"{name}: the weight at '{s}' is {w}" for s, w in table.items() if not math.isfinite(w)]
    if problems:
        raise ConfigError(f"the weights per target are wrong:\n{listed(problems)}")
    return {
        (name, target): next((w for s, w in special.get(name, {}).items() if selects(s, target)), weight)
        for name, (_, weight) in pairs.items()
        for target in targets
    }


def _place(part: Part) -> str:
    return f"{part.kind} at {part.target or 'the whole model'}"


def _other_parts(adapters: Mapping[str, Adapter], others: Others) -> tuple[list[Part], list[str]]:
    """Parts that are no weight update: those to carry over, and the names of those dropped."""
    found: dict[tuple[str, str | None], list[tuple[str, Part]]] = {}
    for name, adapter in adapters.items():
        for part in adapter.parts:
            if not is_update(part) and not is_shared(part):
                found.setdefault((part.kind, part.target), []).append((name, part))
    if others == "drop":
        return [], [f"{name}: {_place(part)}" for owners in found.values() for name, part in owners]
    told = [f"{', '.join(n for n, _ in owners)}: {_place(owners[0][1])}" for owners in found.values()]
    if found and others == "refuse":
        raise Unsupported(
            f"these parts are no update of a weight, so no rule combines them:\n{listed(told)}",
            help="others='keep' carries them over where one adapter has them, others='drop' leaves them out",
        )
    shared = [line for line, owners in zip(told, found.values(), strict=True) if len(owners) > 1]
    if shared:
        raise Unsupported(
            f"several adapters carry the same part:\n{listed(shared)}", help="others='drop' leaves them out"
        )
    kept = [(name, part, methods.method_of(adapters[name], part)) for ((name, part),) in found.values()]
    if unlike := [
        f"{name}: {_place(part)} has {field}={getattr(method, field)!r}"
        for name, part, method in kept
        for field in method.settings
        if getattr(method, field) != type(method).model_fields[field].get_default()
    ]:
        raise Unsupported(
            f"the result is a LoRA, which has no room for settings of other parts:\n{listed(unlike)}",
            help="others='drop' leaves them out, and the adapter that has them stays one of its own",
        )
    return [part for _, part, _ in kept], []


def lora_spec(parts: Sequence[Part]) -> LoRA:
    """The LoRA whose effective scale is 1 at every part, whatever their ranks."""
    ranks = {p.target: p.tensors["A"].shape[0] for p in parts if p.target is not None}
    common = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    different = {t: r for t, r in ranks.items() if r != common}
    # A pattern also matches longer names that end with it: those are then named too, and longer names come first.
    named = {t for t in ranks if any(t.endswith("." + other) for other in different)} | set(different)
    patterns = {re.escape(t): ranks[t] for t in sorted(named, key=lambda t: (-len(t), t))}
    spec = LoRA(
        rank=common,
        alpha=float(common),
        scaling="alpha/r",
        targets=tuple(ranks),
        rank_pattern=patterns,
        alpha_pattern={key: float(rank) for key, rank in patterns.items()},
    )
    assert all(spec.rank_at(t) == r and spec.scale(t, r) == 1.0 for t, r in ranks.items())
    return spec


def _provenance(adapters: Sequence[Adapter], report: Report, seed: int, reason: str | None) -> Provenance:
    def agreed(field: str) -> Any:
        values = {getattr(a.provenance, field) for a in adapters}
        return values.pop() if len(values) == 1 else None

    samples = {k: v for a in adapters for k, v in a.provenance.base_samples.items()}
    known = [a.provenance for a in adapters if a.provenance.base is not None]
    extra: dict[str, Any] = {"combination": {**asdict(report), "seed": seed, "error": report.error}}
    if reason is not None:
        extra["base_mismatch_allowed"] = reason
    return replace(
        Provenance(),
        base=known[0].base if known else None,
        base_name=known[0].base_name if known else agreed("base_name"),
        base_samples=samples,
        trained_on=agreed("trained_on"),
        data=agreed("data"),
        parents=tuple(sorted(a.digest for a in adapters)),
        chat_template=agreed("chat_template"),
        extra=extra,
    )
