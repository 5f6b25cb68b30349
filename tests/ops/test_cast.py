"""Matrices laid out anew: the kernel writes the bits that torch would, and nothing beside them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops.native import build
from veneer.ops.native.cast import Cast, Casts

KINDS = (torch.bfloat16, torch.float32, torch.float16)


def expected(cast: Cast, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The definition."""
    scaled = source if cast.factor == 1.0 else source * cast.factor
    return (scaled.t() if cast.turned else scaled).to(dtype).flatten()


def many(generator: torch.Generator, count: int) -> tuple[list[Cast], list[torch.Tensor], int]:
    casts, sources, place = [], [], 3
    for i in range(count):
        rows, columns = (int(torch.randint(1, 70, (), generator=generator)) for _ in range(2))
        source = (torch.randn(rows, columns, generator=generator) * 3).to(KINDS[i % 3])
        factor = (1.0, 2.0, 0.7, -1.3)[i % 4]
        casts.append(Cast(rows, columns, source.dtype, place, factor, turned=i % 2 == 1))
        sources.append(source)
        place += rows * columns + int(torch.randint(0, 4, (), generator=generator))
    return casts, sources, place + 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@given(seed=st.integers(0, 10**6))
def test_every_bit_is_as_defined_and_the_rest_is_left_alone(dtype: torch.dtype, seed: int) -> None:
    casts, sources, size = many(torch.Generator().manual_seed(seed), 12)
    room = torch.full((size,), 7.0, dtype=dtype)
    wanted = room.clone()
    for cast, source in zip(casts, sources, strict=True):
        wanted[cast.place : cast.place + source.numel()] = expected(cast, source, dtype)
    assert Casts(casts).into(room, sources)
    assert torch.equal(room, wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_a_number_that_is_not_finite_is_noticed_wherever_it_stands(bad: float, turned: bool, native: bool) -> None:
    if native and build.library() is None:
        pytest.skip("no native kernels on this machine")
    for dtype in KINDS:
        for at in (0, 17, 33 * 19 - 1):
            source = torch.zeros(33, 19, dtype=dtype)
            source.view(-1)[at] = bad
            casts = Casts([Cast(33, 19, dtype, 0, 0.5, turned)])
            if not native:
                casts._records = None
            assert not casts.into(torch.zeros(33 * 19, dtype=torch.bfloat16), [source])


def test_what_becomes_too_large_is_noticed() -> None:
    source = torch.full((4, 4), 3e38)
    assert not Casts([Cast(4, 4, torch.float32, 0, 4.0)]).into(torch.zeros(16, dtype=torch.bfloat16), [source])
    assert not Casts([Cast(1, 1, torch.float16, 0, 2.0)]).into(torch.zeros(1), [torch.tensor([[6e4]]).half()])


def test_a_type_that_the_kernel_does_not_know_takes_the_plain_form() -> None:
    source = torch.randn(5, 3, dtype=torch.float64)
    room = torch.zeros(15, dtype=torch.bfloat16)
    assert Casts([Cast(5, 3, torch.float64, 0, turned=True)]).into(room, [source])
    assert torch.equal(room, source.t().bfloat16().flatten())
