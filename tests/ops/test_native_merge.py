"""The merge kernel is the definition: one sum, one rounding, and the squares of what it lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from veneer.merge.rounding import LowRankRows, merged
from veneer.merge.store import raw_bytes
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
@pytest.mark.parametrize("n, k, rank", [(1, 16, 1), (7, 80, 3), (300, 576, 16), (37, 8960, 33)])
def test_from_file_to_file_it_is_the_same(tmp_path: Path, n: int, k: int, rank: int) -> None:
    g = torch.Generator().manual_seed(1)
    stored = torch.randn(n, k, generator=g).bfloat16()
    left, right = torch.randn(n, rank, generator=g), torch.randn(rank, k, generator=g) * rank**-0.5
    value = torch.empty_like(stored)
    (tmp_path / "in").write_bytes(b"head...." + raw_bytes(stored) + b"tail")
    (tmp_path / "out").write_bytes(b"before")
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("r+b") as target:
        found = merge.low_rank_file(source.fileno(), 8, left, right, target.fileno(), 6)
    assert found == merge.low_rank(stored, left, right, value)
    assert (tmp_path / "out").read_bytes() == b"before" + bytes(raw_bytes(value))


@needs_kernels
def test_what_the_system_says_of_a_file_is_passed_on(tmp_path: Path) -> None:
    left, right = torch.zeros(600, 2), torch.zeros(2, 1024)
    (tmp_path / "in").write_bytes(bytes(600 * 1024 * 2 - 1))
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as target:
        with pytest.raises(EOFError):
            merge.low_rank_file(source.fileno(), 0, left, right, target.fileno(), 0)
        with pytest.raises(OSError, match="Bad file descriptor"):
            merge.low_rank_file(target.fileno(), 0, left, right, target.fileno(), 0)
    if Path("/dev/full").exists():
        with (
            (tmp_path / "in").open("rb") as source,
            open("/dev/full", "wb") as target,
            pytest.raises(OSError, match="No space left"),
        ):
            merge.low_rank_file(source.fileno(), 0, left, right, target.fileno(), 0)


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
