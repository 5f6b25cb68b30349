"""The shortlist finds what the whole product finds, to the bit, and says when it can't."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.ops.low_rank import DenseFrozen
from veneer.ops.native import build, few
from veneer.ops.native.shortlist import MOST, Sketch, sketch

pytestmark = pytest.mark.skipif(build.library() is None, reason="no native kernels on this machine")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sketched(weight: Tensor) -> Sketch:
    found = sketch(weight.bfloat16())
    assert found is not None
    return found


def whole(x: Tensor, weight: Tensor) -> tuple[list[int], list[float]] | None:
    scores = few.scores(x, weight)
    assert scores is not None
    return few.largest(scores)


def uneven(m: int, k: int) -> Tensor:
    """Rows of very different lengths, a few columns that dominate, rows of zeros and of numbers next to zero."""
    w = normal(m, k, seed=1) * 3 ** normal(m, 1, seed=2)
    w[:, ::50] *= 6
    w[::7] = 0
    w[3::11] *= 1e-38
    return w


WEIGHTS = {"normal": lambda m, k: normal(m, k, seed=1), "uneven": uneven, "negative": lambda m, k: -normal(m, k).abs()}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("m, k", [(1, 64), (33, 128), (5000, 576), (1025, 2048)])
@pytest.mark.parametrize("n", [1, 3, 8, MOST])
def test_it_is_the_largest_of_all_scores_to_the_bit(n: int, m: int, k: int, kind: str) -> None:
    held = sketched(WEIGHTS[kind](m, k))
    x = normal(n, k + 64, seed=3)
    x[:, ::90] *= 40  # as hidden states are
    rows = x.bfloat16()[:, 64:]
    found = held.likeliest(rows)
    assert found is not None
    assert found == whole(rows, held.weight)


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    held = sketched(uneven(3001, 192))
    x = normal(9, 192, seed=3).bfloat16()
    alone = held.likeliest(x)
    torch.set_num_threads(threads)
    try:
        assert held.likeliest(x) == alone == whole(x, held.weight)
    finally:
        torch.set_num_threads(1)


def test_of_equal_rows_it_is_the_first() -> None:
    weight = normal(300, 64).bfloat16().repeat(3, 1)
    x = (weight[[7, 299]] * 3).contiguous()
    assert sketched(weight).likeliest(x) == whole(x, weight)
    found = sketched(weight).likeliest(x)
    assert found is not None and max(found[0]) < 300


@pytest.mark.parametrize("kind", WEIGHTS)
def test_no_product_is_farther_off_than_the_sketch_says(kind: str) -> None:
    held = sketched(WEIGHTS[kind](1999, 192))
    m, k = held.weight.shape
    codes = held.codes.transpose(1, 2).reshape(-1, k).double() - 128
    exact, near = held.weight.double(), (codes * held.scale.double()[:, None])[:m]
    rest, bound = (exact - near).norm(dim=1), held.error[:m]
    assert bool((rest <= bound).all())
    assert bool((bound <= 1.01 * rest + 1e-16).all()), "and not much less"
    assert held.longest >= max(float(exact.norm(dim=1).max()), float(near.norm(dim=1).max()))
    x = normal(50, 192, seed=5).double()
    assert bool(((x @ (exact - near).t()).abs() <= x.norm(dim=1)[:, None] * bound).all())


def test_what_it_cannot_tell() -> None:
    held = sketched(normal(100, 64))
    x = normal(3, 64, seed=1).bfloat16()
    for strange in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[1, 5] = strange
        assert held.likeliest(broken) is None
    assert held.likeliest(x * 0) is None
    assert held.likeliest(x.float()) is None
    assert held.likeliest(x[:0]) is None
    assert held.likeliest(normal(MOST + 1, 64).bfloat16()) is None
    alike = sketched(normal(1, 64).repeat(40_000, 1))
    assert alike.likeliest(x) is None, "all rows come equally near"


def test_weights_that_have_no_sketch() -> None:
    w = normal(100, 64)
    assert sketch(w) is None, "fp32"
    assert sketch(normal(100, 96).bfloat16()) is None, "not blocks of 64"
    assert sketch(normal(64, 100).bfloat16().t()) is None
    for strange in (torch.nan, torch.inf, 3e38):
        odd = w.bfloat16()
        odd[5, 5] = strange
        assert sketch(odd) is None


def test_a_frozen_weight_is_sketched_once() -> None:
    frozen = DenseFrozen(normal(100, 64).bfloat16())
    assert frozen.sketch is frozen.sketch is not None
    made = frozen.sketch.nbytes
    assert made == 112 * (64 + 2 * 4)
    assert frozen.sketch.likeliest(normal(2, 64).bfloat16()) and frozen.sketch.nbytes > made, "with its room"
    assert DenseFrozen(normal(100, 64)).sketch is None
