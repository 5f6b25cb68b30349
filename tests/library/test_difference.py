"""Comparing adapters: what is printed equals the definition on dense updates, and never makes one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.library.shelf import make
from veneer.adapter import Adapter, Part
from veneer.library import difference
from veneer.methods.lora import LoRA


def _dense(adapter: Adapter, target: str) -> torch.Tensor:
    part = adapter.part(target)
    return adapter.scale(target) * part.tensors["B"].double() @ part.tensors["A"].double()


@pytest.mark.parametrize(("ranks", "scaling"), [((4, 4), "alpha/r"), ((2, 5), "alpha/sqrt(r)"), ((1, 16), "alpha/r")])
def test_figures_equal_their_definitions(ranks: tuple[int, int], scaling: str) -> None:
    one, other = make(0, rank=ranks[0]), make(1, rank=ranks[1])
    other = replace(other, spec=LoRA(rank=ranks[1], alpha=7, scaling=scaling, targets=("q_proj", "v_proj")))
    found = difference(one, other)
    assert not found.same and len(found.targets) == 4
    for row in found.targets:
        a, b = _dense(one, row.target), _dense(other, row.target)
        u1, s1, _ = torch.linalg.svd(a)
        u2, s2, _ = torch.linalg.svd(b)
        assert row.rank == ranks
        assert row.norm == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-9)
        assert row.stable_rank == pytest.approx([float(s.square().sum() / s[0] ** 2) for s in (s1, s2)], rel=1e-9)
        assert row.distance == pytest.approx(float((a - b).norm()) / max(row.norm), rel=1e-9)
        assert row.cosine == pytest.approx(float((a * b).sum()) / (row.norm[0] * row.norm[1]), abs=1e-9)
        overlap = (u1[:, : ranks[0]].T @ u2[:, : ranks[1]]).square().sum() / min(ranks)
        assert row.overlap == pytest.approx(float(overlap), abs=1e-9)


def test_a_refactorised_adapter_has_no_distance() -> None:
    one = make(0)
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(5)).double() + 3 * torch.eye(4).double()
    parts = tuple(
        replace(p, tensors={"A": mix @ p.tensors["A"].double(), "B": p.tensors["B"].double() @ torch.linalg.inv(mix)})
        for p in one.parts
    )
    for row in difference(one, replace(one, parts=parts)).targets:
        assert row.distance < 1e-9 and row.cosine == pytest.approx(1.0) and row.overlap == pytest.approx(1.0)


def test_a_scaled_copy_differs_in_size_only() -> None:
    found = difference(make(0), make(0).scaled(0.5))
    assert found.config["alpha"] == (32.0, 16.0)
    for row in found.targets:
        assert row.distance == pytest.approx(0.5) and row.overlap == pytest.approx(1.0)


def test_the_same_adapter() -> None:
    found = difference(make(0), make(0))
    assert found.same and not found.config and all(row.distance < 1e-12 for row in found.targets)


def test_a_zero_update_has_no_direction() -> None:
    one = make(0)
    zero = replace(one, parts=tuple(replace(p, tensors={**p.tensors, "B": torch.zeros(16, 4)}) for p in one.parts))
    row = difference(one, zero).targets[0]
    assert row.rank == (4, 0) and row.cosine is None and row.overlap is None
    assert row.norm[1] == 0 and row.distance == pytest.approx(1.0)
    nothing = difference(zero, replace(zero, spec=LoRA(rank=4, alpha=1, targets=("q_proj",)))).targets[0]
    assert nothing.distance == 0 and nothing.stable_rank == (0.0, 0.0)


def test_a_shifted_start_is_subtracted() -> None:
    one = make(0)
    parts = tuple(
        replace(p, tensors={**p.tensors, "A0": p.tensors["A"].clone(), "B0": p.tensors["B"].clone()}) for p in one.parts
    )
    assert difference(one, replace(one, parts=parts)).targets[0].norm[1] == pytest.approx(0, abs=1e-9)


def test_targets_of_one_side_and_other_methods() -> None:
    one = make(0)
    fewer = replace(one, parts=one.parts[:2])
    scales = Part("full", "override", "model.norm", {"weight": torch.ones(16)})
    doubled = Part("full", "override", "model.norm", {"weight": torch.full((16,), 2.0)})
    found = difference(replace(one, parts=(*one.parts, scales)), replace(fewer, parts=(*fewer.parts, doubled)))
    assert found.only_one == tuple(p.target for p in one.parts[2:]) and found.only_other == ()
    row = next(r for r in found.targets if r.kind == "full")
    assert (row.norm, row.rank, row.overlap) == ((4.0, 8.0), None, None)
    assert row.distance == pytest.approx(0.5)


def test_a_large_target_is_never_dense() -> None:
    """A 60,000 x 60,000 update would be 29 GB in fp64."""
    width = 60_000
    generator = torch.Generator().manual_seed(0)
    tensors = {"A": torch.randn(2, width, generator=generator), "B": torch.randn(width, 2, generator=generator)}
    big = Adapter(LoRA(rank=2, targets=("x",)), (Part("lora", "weight", "x", tensors),))
    assert difference(big, big.scaled(2.0)).targets[0].distance == pytest.approx(0.5)
