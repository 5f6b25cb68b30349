"""Draws by the kernel and by numpy fall where the definition says, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from veneer.engine.sampling import draw_plainly
from veneer.ops.native import build
from veneer.ops.native.draw import Draw, draw

Scores = npt.NDArray[np.float32]
needs_kernels = pytest.mark.skipif(build.library() is None, reason="no native kernels on this machine")


def by_kernel(rows: Sequence[Scores], draws: Sequence[Draw]) -> list[int]:
    found = draw(rows, draws)
    assert found is not None
    return found


def by_numpy(rows: Sequence[Scores], draws: Sequence[Draw]) -> list[int]:
    return [draw_plainly(row.copy(), how) for row, how in zip(rows, draws, strict=True)]


WAYS = [pytest.param(by_kernel, marks=needs_kernels), by_numpy]


def shares(scores: Scores, how: Draw) -> npt.NDArray[np.float64]:
    """What each token is drawn with, by the words of `Draw`; among equals the first are the larger."""
    exact = scores.astype(np.float64)
    weights = np.exp((exact - exact.max()) / how.temperature)
    order = np.argsort(-weights, kind="stable")
    if how.top_k:
        order = order[: how.top_k]
    if how.top_p < 1:
        before = np.concatenate([[0.0], weights[order].cumsum()[:-1]])
        order = order[before < how.top_p * weights[order].sum()]
    order = order[weights[order] >= how.min_p]
    found = np.zeros(len(scores))
    found[order] = weights[order] / weights[order].sum()
    return found


def misses(scores: Scores, how: Draw, token: int) -> float:
    """How far the draw is from the token's part of the sum, with tokens side by side."""
    each = shares(scores, how)
    assert each[token] > 0
    end = float(each[: token + 1].sum())
    return max(0.0, end - float(each[token]) - how.draw, how.draw - end)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [1.0, 0.2, 0.9, 0.9999])
@pytest.mark.parametrize("top_k, min_p", [(0, 0.0), (1, 0.0), (5, 0.0), (60, 0.02), (0, 0.1), (10_000, 0.0)])
def test_a_draw_falls_where_it_should(
    top_k: int, min_p: float, top_p: float, temperature: float, way: Callable[..., list[int]]
) -> None:
    generator = np.random.default_rng(0)
    for size in (1, 15, 16, 257, 4000):
        rows = [3 * generator.standard_normal(size, np.float32) for _ in range(4)]
        rows[1][: size // 2] = -np.inf
        rows[2][: size // 2] -= 50
        draws = [Draw(temperature, top_k, top_p, min_p, u) for u in (0.0, *generator.random(2), 1 - 2**-53)]
        for row, how, token in zip(rows, draws, way(rows, draws), strict=True):
            assert misses(row, how, token) < 1e-5


@needs_kernels
@pytest.mark.parametrize("top_k, top_p", [(7, 1.0), (0, 0.5), (300, 0.7)])
def test_of_equal_scores_the_first_are_kept(top_k: int, top_p: float) -> None:
    generator = np.random.default_rng(1)
    for levels in (1, 3):
        row = generator.integers(0, levels, 2000).astype(np.float32)
        draws = [Draw(1.0, top_k, top_p, 0.0, u) for u in generator.random(50)]
        for how, token in zip(draws, by_kernel([row] * 50, draws), strict=True):
            assert misses(row, how, token) < 1e-5


@needs_kernels
def test_rows_that_lie_oddly_or_are_none_go_the_plain_way() -> None:
    how = Draw(1.0, 0, 1.0, 0.0, 0.5)
    assert draw([np.zeros((8, 2), np.float32)[:, 0]], [how]) is None
    assert draw([np.zeros(8, np.float32), np.zeros(7, np.float32)], [how, how]) is None
    assert draw([], []) is None


@needs_kernels
def test_temperatures_at_the_edge_of_fp32_take_the_largest() -> None:
    row = np.array([1.0, 3.0, -np.inf, 2.9999], np.float32)
    assert by_kernel([row], [Draw(float(np.finfo(np.float32).tiny), 0, 1.0, 0.0, 0.7)]) == [1]
