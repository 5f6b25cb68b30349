"""The merge kernel is the definition: one sum, one rounding, and the squares of what it lost."""

from __future__ import annotations

import pytest
import torch

from veneer.merge.rounding import LowRankRows, merged
from veneer.ops.native import build, merge

needs_kernels = pytest.mark.skipif(build.library() is None, reason="no native kernels on this machine")


@needs_kernels
@pytest.mark.parametrize("n, k, rank", [(1, 16, 1), (7, 80, 3), (64, 576, 16), (130, 208, 33)])
@pytest.mark.parametrize("size", [1e-3, 0.3])
def test_it_is_the_sum_rounded_once(n: int, k: int, rank: int, size: float) -> None:
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(n, k + 16, generator=g).bfloat16()
    stored = wide[:, :k]  # rows may be further apart than they are wide
    left, right = torch.randn(n, rank, generator=g) * size, torch.randn(rank, k, generator=g) * rank**-0.5
    value = torch.empty(n, k, dtype=torch.bfloat16)
    found = merge.low_rank(stored, left, right, value)
    assert found is not None
    exact = stored.double() + left.double() @ right.double()
    step = torch.finfo(torch.bfloat16).eps * exact.abs().clamp(min=1e-30)
    assert bool(((value.double() - exact).abs() <= 0.5001 * step).all()), "the nearest, but for ties of the sum itself"
    assert found[0] == pytest.approx(float((value.double() - exact).square().sum()), rel=1e-3)
    assert found[1] == pytest.approx(float(stored.double().square().sum()), rel=1e-5)
    whole = merged(stored, LowRankRows(left, right))
    assert torch.equal(whole.value, value)
    assert whole.delta_square == pytest.approx(float((left.double() @ right.double()).square().sum()), rel=1e-6)


@needs_kernels
def test_a_weight_without_an_update_keeps_its_bits() -> None:
    """Zeros of both signs, denormals, infinities and every other pattern."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)
    stored = bits.view(torch.bfloat16)
    value = torch.empty_like(stored)
    assert merge.low_rank(stored, torch.zeros(256, 4), torch.zeros(4, 256), value) is not None
    same = (value.view(torch.int16) == bits) | (stored.isnan() & value.isnan()) | (stored == 0)
    assert bool(same.all())
    assert bool((value[stored == 0] == 0).all())


@needs_kernels
def test_what_it_cannot_take_is_left_to_the_plain_form() -> None:
    stored, left, right = torch.zeros(8, 32).bfloat16(), torch.zeros(8, 2), torch.zeros(2, 32)
    value = torch.empty_like(stored)
    assert merge.low_rank(stored, left, right, value) is not None
    assert merge.low_rank(stored.float(), left, right, value.float()) is None
    assert merge.low_rank(stored[:, :20], left, right[:, :20], value[:, :20]) is None
    assert merge.low_rank(stored.t(), left, right, value) is None
    assert merge.low_rank(stored, left.double(), right, value) is None
