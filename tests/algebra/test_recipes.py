"""Recipes as files, the interference report, and the spectral measures they stand on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from veneer.adapter import Adapter, Part
from veneer.algebra import Recipe, combine, interference, read_recipe, run_recipe
from veneer.errors import ConfigError
from veneer.methods.lora import LoRA
from veneer.ops.spectra import leading_svd, low_rank_inner, low_rank_svd, low_rank_svd_reference, spectrum


def adapter(seed: int, rank: int = 2) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    tensors = {"A": torch.randn(rank, 12, generator=g), "B": torch.randn(16, rank, generator=g)}
    parts = (Part("lora", "weight", "h.0.q", tensors), Part("lora", "weight", "h.0.v", tensors))
    return Adapter(LoRA(rank=rank), parts)


RECIPE = """
rule: ties
options: {density: 0.5}
adapters:
  a: {path: a, weight: 0.7, targets: {v: 0.1}}
  b: {path: b, weight: 0.3}
seed: 3
"""


def test_a_recipe_does_what_the_call_does_and_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    family = {str(tmp_path / "a"): adapter(1), str(tmp_path / "b"): adapter(2)}
    recipe = read_recipe(tmp_path / "r.yaml")
    made = run_recipe(recipe, family.__getitem__)
    a, b = family.values()
    same = combine({"a": (a, 0.7), "b": (b, 0.3)}, "ties", density=0.5, seed=3, weights={"a": {"v": 0.1}})
    for target in same.targets:
        assert torch.equal(made.adapter.delta(target), same.delta(target))
    extra = made.adapter.provenance.extra
    assert extra["recipe"]["options"] == {"density": 0.5}
    other = run_recipe(recipe, {**family, str(tmp_path / "b"): adapter(4)}.__getitem__)
    assert len(extra["recipe_digest"]) == 64
    assert other.adapter.provenance.extra["recipe_digest"] != extra["recipe_digest"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rule: ties\nadaptors: {}", "did you mean 'adapters'"),
        ("adapters: {a: {path: a, wight: 1}}", "did you mean 'weight'"),
        ("adapters: {}", "adapters"),
        ("[1, 2]", "keys and values"),
        ("a: [", "not YAML"),
        ("rule: ties\nadapters:\n  a: {path: a}\n  a: {path: b}", "r.yaml:4: 'adapters.a' is given twice"),
        ("adapters: {a: {path: a, weight: .nan}}", "adapters.a.weight"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_recipe(tmp_path / "r.yaml")


def test_every_field_of_a_recipe_says_what_it_is() -> None:
    assert all(field.description for field in Recipe.model_fields.values())


def test_interference_by_definition() -> None:
    a, b = adapter(1), adapter(2, 3)
    report = interference({"a": a, "b": b})
    one, two = a.delta("h.0.q").double(), b.delta("h.0.q").double()
    pair = report.pairs[0]
    assert pair.target == "h.0.q"
    assert pair.cosine == pytest.approx(float((one * two).sum() / (one.norm() * two.norm())), rel=1e-6)
    assert pair.sign_conflict == pytest.approx(float(((one * two) < 0).double().mean()))
    assert pair.norm_ratio == pytest.approx(
        max(float(two.norm() / one.norm()), float(one.norm() / two.norm())), rel=1e-6
    )
    v1 = torch.linalg.svd(one).Vh[:2]
    v2 = torch.linalg.svd(two).Vh[:3]
    assert pair.input_overlap == pytest.approx(float((v1 @ v2.t()).square().sum()) / 2, rel=1e-6)
    assert report.norms["a"] == pytest.approx(float(one.norm()) * math.sqrt(2), rel=1e-6)
    assert report.overall[0].cosine == pytest.approx(pair.cosine, rel=1e-6)


def test_interference_of_an_adapter_with_itself_and_its_negative() -> None:
    a = adapter(1)
    flipped = Adapter(
        a.spec, tuple(Part(p.kind, p.site, p.target, {**p.tensors, "B": -9 * p.tensors["B"]}) for p in a.parts)
    )
    report = interference({"a": a, "same": a, "not": flipped})
    pairs = {(p.first, p.second): p for p in report.overall}
    assert pairs["a", "same"].cosine == pytest.approx(1)
    assert pairs["a", "same"].input_overlap == pytest.approx(1)
    assert pairs["a", "not"].cosine == pytest.approx(-1)
    assert pairs["a", "not"].sign_conflict == 1
    told = " ".join(report.warnings())
    assert "opposite directions" in told
    assert "9 times larger" in told
    with pytest.raises(ConfigError, match="at least two"):
        interference({"a": a})


def test_spectral_measures_on_known_matrices() -> None:
    flat = spectrum(torch.ones(7))
    assert (flat.stable_rank, flat.participation, flat.energy_rank) == (7, pytest.approx(7), 7)
    assert flat.effective_rank == pytest.approx(7)
    one = spectrum(torch.tensor([2.0, 0.0, 0.0]))
    assert (one.frobenius, one.stable_rank, one.effective_rank, one.participation, one.energy_rank) == (2, 1, 1, 1, 1)
    assert spectrum(torch.zeros(3)).stable_rank == 0


@pytest.mark.parametrize(("out", "into", "rank"), [(30, 20, 4), (3, 20, 5), (20, 3, 5)])
def test_the_core_svd_is_the_dense_one(out: int, into: int, rank: int) -> None:
    g = torch.Generator().manual_seed(0)
    b = torch.randn(out, rank, generator=g, dtype=torch.float64)
    a = torch.randn(rank, into, generator=g, dtype=torch.float64)
    u, s, vh = low_rank_svd(b, a)
    _, wanted, _ = low_rank_svd_reference(b, a)
    torch.testing.assert_close(s, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(u * s @ vh, b @ a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(low_rank_inner(b, a, b, a), s.square().sum())
    values, norm, leading = leading_svd(b, a)
    torch.testing.assert_close(values, s[: len(values)], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(norm, s.norm())
    left, right = leading(len(values))
    torch.testing.assert_close(left * values @ right, b @ a, rtol=1e-7, atol=1e-7)


def test_the_fast_svd_knows_a_rank_that_the_factors_hide() -> None:
    b = torch.randn(30, 2, dtype=torch.float64).repeat(1, 3)
    a = torch.randn(2, 20, dtype=torch.float64).repeat(3, 1)
    values, _, leading = leading_svd(b, a)
    assert int((values > 1e-6 * values[0]).sum()) == 2
    left, right = leading(2)
    torch.testing.assert_close(left.t() @ left, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(left * values[:2] @ right, b @ a)
    zero, norm, _ = leading_svd(0 * b, a)
    assert float(norm) == 0
    assert float(zero[0]) == 0
