"""The laws of combination, rule by rule, and the hand examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import veneer as vn
from veneer import algebra
from veneer.adapter import Adapter, Part, Provenance
from veneer.algebra import combination, combine
from veneer.errors import BaseMismatch, ConfigError, TargetError, Unsupported
from veneer.methods.lora import LoRA

SIZES = {"layers.0.q": (24, 20), "layers.1.up": (40, 20), "layers.1.down": (20, 40)}

IDENTITIES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 1.0},
    "dare": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "magnitude": {"density": 1.0},
    "core": {"density": 1.0},
    "knots": {"density": 1.0},
    "factor_linear": {},
}
ANY_FACTORING = {name: {k: 0.4 for k in given} for name, given in IDENTITIES.items() if name != "factor_linear"}


def adapter(seed: int, rank: int = 3, dtype: torch.dtype = torch.float32, sizes: Any = None, **fields: Any) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    spec = LoRA(rank=rank, **fields)
    parts = []
    for target, (out, into) in (sizes or SIZES).items():
        r = spec.rank_at(target)
        a = torch.randn(r, into, generator=g, dtype=torch.float64).to(dtype)
        b = torch.randn(out, r, generator=g, dtype=torch.float64).to(dtype)
        parts.append(Part("lora", "weight", target, {"A": a, "B": b}))
    return Adapter(spec, tuple(parts))


def delta(a: Adapter, target: str) -> Tensor:
    part = a.part(target)
    return a.scale(target) * (part.tensors["B"].double() @ part.tensors["A"].double())


def regauged(a: Adapter, seed: int) -> Adapter:
    """The same updates, factored differently: (B M, M^-1 A), and a rank that is larger than needed."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for part in a.parts:
        r = part.tensors["A"].shape[0]
        m = torch.randn(r, r, generator=g, dtype=torch.float64) + 3 * torch.eye(r, dtype=torch.float64)
        b, x = part.tensors["B"].double() @ m, torch.linalg.solve(m, part.tensors["A"].double())
        parts.append(Part("lora", "weight", part.target, {"A": x, "B": b}))
    return Adapter(a.spec, tuple(parts))


def far(one: Adapter, two: Adapter) -> float:
    assert set(one.targets) == set(two.targets)
    return max(float((delta(one, t) - delta(two, t)).norm() / delta(two, t).norm()) for t in two.targets)


def test_every_rule_is_held_to_the_identity_law() -> None:
    assert set(IDENTITIES) == set(algebra.load_all())


@pytest.mark.parametrize("rule", sorted(IDENTITIES))
@given(
    seed=st.integers(0, 2**20),
    rank=st.integers(1, 8),
    alpha=st.floats(0.1, 100),
    scaling=st.sampled_from(["alpha/r", "alpha/sqrt(r)"]),
    patterned=st.booleans(),
)
@settings(max_examples=12)
def test_one_adapter_at_weight_one_is_itself(
    rule: str, seed: int, rank: int, alpha: float, scaling: str, patterned: bool
) -> None:
    """PEFT returns rsLoRA times sqrt(rank) here (its issue 3761)."""
    patterns = {"rank_pattern": {"q": 5}, "alpha_pattern": {"layers.1.up": 3.0}} if patterned else {}
    a = adapter(seed, rank, alpha=alpha, scaling=scaling, **patterns)
    assert far(combine({"a": a}, rule, **IDENTITIES[rule]), a) < 1e-6


@pytest.mark.parametrize("rule", sorted(ANY_FACTORING))
@given(seed=st.integers(0, 2**20), gauge=st.integers(0, 2**20))
@settings(max_examples=12)
def test_no_rule_sees_the_factors(rule: str, seed: int, gauge: int) -> None:
    family = {"a": adapter(seed), "b": adapter(seed + 1, 4, scaling="alpha/sqrt(r)"), "c": adapter(seed + 2, 2)}
    same = {name: (regauged(a, gauge + i), 0.7 - i * 0.5) for i, (name, a) in enumerate(family.items())}
    plain = {name: (a, 0.7 - i * 0.5) for i, (name, a) in enumerate(family.items())}
    options = ANY_FACTORING[rule]
    assert far(combine(same, rule, **options), combine(plain, rule, **options)) < 1e-5


@pytest.mark.parametrize("rule", sorted(IDENTITIES))
def test_the_order_of_the_adapters_plays_no_part(rule: str) -> None:
    pairs = {"a": (adapter(1), 0.5), "b": (adapter(2), -0.3), "c": (adapter(3), 1.1)}
    one, two = combine(pairs, rule), combine(dict(reversed(pairs.items())), rule)
    for target in one.targets:
        assert torch.equal(one.delta(target), two.delta(target))


@given(weights=st.lists(st.floats(-2, 2), min_size=2, max_size=4), seed=st.integers(0, 2**20))
def test_cat_and_linear_are_the_sum_of_the_updates(weights: list[float], seed: int) -> None:
    family = {f"n{i}": adapter(seed + i, 1 + i, scaling="alpha/sqrt(r)") for i in range(len(weights))}
    pairs = {name: (a, w) for (name, a), w in zip(family.items(), weights, strict=True)}
    size = sum(abs(w) for w in weights) + 1e-9
    largest = max(float(delta(a, t).norm()) for a, _ in pairs.values() for t in SIZES)
    for rule in ("cat", "linear"):
        made = combine(pairs, rule)
        for target in SIZES:
            wanted = sum((w * delta(a, target) for a, w in pairs.values()), torch.zeros(SIZES[target]))
            assert float((delta(made, target) - wanted).norm()) < 1e-6 * size * largest


def test_an_adapter_minus_itself_is_nothing() -> None:
    a = adapter(0)
    for rule, options in ANY_FACTORING.items():
        if not rule.startswith("dare"):
            made = combine({"a": (a, 1.0), "b": (a, -1.0)}, rule, **options)
            assert max(float(made.delta(t).abs().max()) for t in made.targets) < 1e-4 * float(
                a.delta("layers.0.q").abs().max()
            )
    linear = combine({"a": (a, 1.0), "b": (a, -1.0)})
    assert {p.tensors["A"].shape[0] for p in linear.parts} == {1}


def test_svd_is_as_near_as_its_rank_allows_and_says_how_near() -> None:
    pairs = {f"n{i}": (adapter(i, 4), 0.5 + i) for i in range(3)}
    made = combination(pairs, "svd", rank=5)
    for row in made.report.targets:
        wanted = sum((w * delta(a, row.target) for a, w in pairs.values()), torch.zeros(SIZES[row.target]))
        sigma = torch.linalg.svdvals(wanted)
        best = float(sigma[5:].norm() / sigma.norm())
        assert row.rank == 5
        assert row.error == pytest.approx(best, rel=1e-6)
        assert float((delta(made.adapter, row.target) - wanted).norm() / wanted.norm()) == pytest.approx(best, rel=1e-4)
        assert row.norm == pytest.approx(float(wanted.norm()), rel=1e-9)
    assert made.adapter.provenance.extra["combination"]["error"] == pytest.approx(made.report.error)
    assert made.report.worst.error >= made.report.error


def test_dare_over_seeds_averages_to_the_linear_sum() -> None:
    pairs = {"a": (adapter(1), 0.7), "b": (adapter(2), 0.5)}
    wanted = combine(pairs, "linear")
    for space in ("core", "dense"):
        draws = torch.stack(
            [delta(combine(pairs, "dare", density=0.5, space=space, rank=20, seed=s), "layers.0.q") for s in range(150)]
        )
        off = (draws.mean(0) - delta(wanted, "layers.0.q")) / (draws.std(0) / math.sqrt(150))
        assert float((off.abs() < 3).double().mean()) > 0.99


def test_dare_follows_the_name_and_the_target_only() -> None:
    a, b, c = adapter(1), adapter(2), adapter(3)
    one = combine({"a": a, "b": (b, 0.0)}, "dare", space="dense", rank=20)
    two = combine({"a": a, "c": (c, 0.0)}, "dare", space="dense", rank=20)
    assert far(one, two) < 1e-5
    assert far(combine({"z": a}, "dare", space="dense", rank=20), one) > 0.1
    assert far(combine({"a": a}, "dare", space="dense", rank=20, seed=1), one) > 0.1


def dense(values: list[list[float]], **fields: Any) -> Adapter:
    b = torch.tensor(values)
    part = Part("lora", "weight", "x", {"A": torch.eye(b.shape[1]), "B": b})
    return Adapter(LoRA(rank=b.shape[1], alpha=b.shape[1], **fields), (part,))


def test_ties_by_hand() -> None:
    a, b = dense([[1.0, -2.0, 0.0]]), dense([[3.0, 1.0, 0.0]])
    made = combine({"a": a, "b": b}, "ties", density=1.0, space="dense", rank=3)
    torch.testing.assert_close(made.delta("x"), torch.tensor([[2.0, -2.0, 0.0]]))
    weighted = combine({"a": (a, 0.2), "b": (b, 0.8)}, "ties", density=1.0, space="dense", rank=3)
    torch.testing.assert_close(weighted.delta("x"), torch.tensor([[2.6, 1.0, 0.0]]))
    trimmed = combine({"a": a, "b": b}, "ties", density=1 / 3, space="dense", rank=3)
    torch.testing.assert_close(trimmed.delta("x"), torch.tensor([[3.0, -2.0, 0.0]]))
    cancelled = combine(
        {"a": dense([[1.0, 2.0]]), "b": dense([[-1.0, 1.0]])}, "ties", density=1.0, space="dense", rank=2
    )
    torch.testing.assert_close(cancelled.delta("x"), torch.tensor([[0.0, 1.5]]))


def test_magnitude_by_hand() -> None:
    made = combine({"a": (dense([[1.0, -2.0, 0.5, 3.0]]), 2.0)}, "magnitude", density=0.5, space="dense", rank=4)
    torch.testing.assert_close(made.delta("x"), torch.tensor([[0.0, -4.0, 0.0, 6.0]]))


class LargestAllocation(TorchDispatchMode):
    """The most elements that any one operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("rule", sorted(set(IDENTITIES) - {"knots"}))
def test_low_rank_work_stays_low_rank(rule: str) -> None:
    sizes = {"x": (600, 500)}
    family = {f"n{i}": adapter(i, 4, sizes=sizes) for i in range(4)}
    with LargestAllocation() as largest:
        combine(family, rule)
    assert largest.elements < 600 * 500 / 10
    with LargestAllocation() as largest:
        algebra.interference(family)
    assert largest.elements < 600 * 500 / 5


def test_different_targets_ranks_and_scale_rules_meet() -> None:
    a = adapter(1, 2, sizes={"layers.0.q": (24, 20)})
    b = adapter(2, 5, scaling="alpha/sqrt(r)")
    made = combine({"a": (a, 2.0), "b": b}, "cat")
    assert set(made.targets) == set(SIZES)
    wanted = 2 * delta(a, "layers.0.q") + delta(b, "layers.0.q")
    torch.testing.assert_close(delta(made, "layers.0.q"), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(delta(made, "layers.1.up"), delta(b, "layers.1.up"), rtol=1e-5, atol=1e-4)
    assert isinstance(made.spec, LoRA)
    assert [made.scale(t) for t in made.targets] == [1.0, 1.0, 1.0]


def test_the_spec_holds_where_one_target_ends_like_another() -> None:
    sizes = {"q": (6, 5), "h.q": (6, 5), "x.h.q": (6, 5), "h.v": (6, 5)}
    parts = [
        Part("lora", "weight", t, {"A": torch.ones(r, 5), "B": torch.ones(6, r)})
        for (t, _), r in zip(sizes.items(), (1, 2, 1, 3), strict=True)
    ]
    made = combine({"a": Adapter(LoRA(rank=1, alpha=1), tuple(parts))}, "cat")
    assert [made.scale(t) for t in made.targets] == [1.0] * 4


def test_weights_per_target_include_and_exclude() -> None:
    a, b = adapter(1), adapter(2)
    made = combine({"a": a, "b": b}, "cat", weights={"a": {"layers.1.*": 0.0, "q": 3.0}}, exclude=["down"])
    assert made.targets == ("layers.0.q", "layers.1.up")
    torch.testing.assert_close(delta(made, "layers.1.up"), delta(b, "layers.1.up"), rtol=1e-5, atol=1e-5)
    wanted = 3 * delta(a, "layers.0.q") + delta(b, "layers.0.q")
    torch.testing.assert_close(delta(made, "layers.0.q"), wanted, rtol=1e-5, atol=1e-4)
    only = combine({"a": a, "b": b}, "cat", include=[r"re:layers\.1\..*"])
    assert only.targets == ("layers.1.up", "layers.1.down")


def test_what_a_rule_cannot_hold_is_refused_or_handled_on_purpose() -> None:
    a, b = adapter(1), adapter(2)
    norm = Part("full", "override", "norm", {"weight": torch.ones(4)})
    with_norm = Adapter(a.spec, (*a.parts, norm))
    with pytest.raises(Unsupported, match="full at norm") as refusal:
        combine({"a": with_norm, "b": b})
    assert "others='keep'" in (refusal.value.help or "")
    kept = combination({"a": with_norm, "b": b}, others="keep")
    assert kept.adapter.parts[-1] is norm
    assert kept.report.kept == ("full at norm",)
    with pytest.raises(Unsupported, match="a, b: full at norm"):
        combine({"a": with_norm, "b": with_norm}, others="keep")
    dropped = combination({"a": with_norm, "b": b}, others="drop")
    assert dropped.report.dropped == ("a: full at norm",)
    assert len(dropped.adapter.parts) == 3


def test_refusals_name_everything_and_the_way_out() -> None:
    a, b = adapter(1), adapter(2, sizes={"layers.0.q": (24, 21)})
    with pytest.raises(TargetError, match=r"'layers.0.q' has different sizes: a \[24, 20\], b \[24, 21\]"):
        combine({"a": a, "b": b})
    with pytest.raises(TargetError, match="'qq'"):
        combine({"a": a}, include=["qq"])
    with pytest.raises(ConfigError, match="did you mean 'density'"):
        combine({"a": a}, "ties", densty=0.3)
    with pytest.raises(ConfigError, match="density"):
        combine({"a": a}, "ties", density=0.0)
    with pytest.raises(ConfigError, match="did you mean 'ties'"):
        combine({"a": a}, "tie")
    with pytest.raises(ConfigError, match="not a finite number"):
        combine({"a": (a, math.nan)})
    with pytest.raises(ConfigError, match="no adapters"):
        combine({})
    with pytest.raises(ConfigError, match="no adapter here"):
        combine({"a": a}, weights={"b": {"q": 1.0}})
    with pytest.raises(Unsupported, match="all ranks must be equal"):
        combine({"a": a, "b": adapter(3, 4)}, "factor_linear")


def test_adapters_of_different_bases_are_refused() -> None:
    one = Adapter(adapter(1).spec, adapter(1).parts, Provenance(base="aa" * 32, base_name="first"))
    two = Adapter(adapter(2).spec, adapter(2).parts, Provenance(base="bb" * 32, base_name="second"))
    with pytest.raises(BaseMismatch, match="first"):
        combine({"a": one, "b": two})
    made = combine({"a": one, "b": two}, allow_base_mismatch="same weights, renamed")
    assert made.provenance.extra["base_mismatch_allowed"] == "same weights, renamed"
    assert made.provenance.parents == tuple(sorted((one.digest, two.digest)))


def test_combine_is_what_the_package_offers() -> None:
    a, b = adapter(1), adapter(2)
    both = vn.combine({"a": (a, 0.7), "b": (b, 0.3)}, rule="ties", density=0.3)
    assert set(both.targets) == set(SIZES)


def test_a_rule_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "RULES", algebra.RULES)

    def largest(updates: algebra.Updates, *, times: float = 1.0) -> algebra.Product:
        best = max(range(len(updates.names)), key=lambda i: float((updates.B[i] @ updates.A[i]).norm()))
        return algebra.Product(times * updates.B[best], updates.A[best])

    algebra.rule("largest")(largest)
    try:
        small = adapter(1, alpha=0.01)
        big = adapter(2)
        assert far(combine({"small": small, "big": big}, "largest", times=1.0), big) < 1e-6
        with pytest.raises(ConfigError, match="times"):
            combine({"a": big}, "largest", time=2.0)
    finally:
        del algebra.RULES["largest"]
