"""Updates of single rows of many adapters: the C kernel, the plan it is called by, and the plain form agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.ops.low_rank import DenseFrozen, Pack, Packs, adapted_linear, adapted_linear_reference
from veneer.ops.mixed import plan
from veneer.ops.native import build
from veneer.ops.native.mixed import RUN, factors, jobs
from veneer.types import Span

needs_kernels = pytest.mark.skipif(build.library() is None, reason="no native kernels on this machine")


def random(g: torch.Generator, *shape: int, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=g) * size).bfloat16()


def by_rank(B: Tensor) -> Tensor:
    """B `[out, rank]` stored rank by rank, as the kernel reads it."""
    return B.t().contiguous().t()


@needs_kernels
@pytest.mark.parametrize("k,outs", [(576, (576, 192, 192)), (64, (48, 33, 1)), (96, (300,))])
def test_the_kernel_is_the_definition(k: int, outs: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = random(g, 20, k), random(g, 20, sum(outs))
    exact, runs, row = y.double(), [], 0
    for rows, rank in ((1, 16), (2, 7), (7, 1), (1, 33), (9, 5)):
        column, pairs = 0, []
        for out in outs:
            A, B = random(g, rank, k, size=k**-0.5), by_rank(random(g, out, rank))
            pairs.append((A, B, column))
            part = slice(row, row + rows), slice(column, column + out)
            exact[part] += x[row : row + rows].double() @ A.double().t() @ B.double().t()
            column += out
        made_of = factors(pairs)
        assert made_of is not None
        runs.append((row, rows, made_of))
        row += rows
    made = jobs(runs)
    assert made is not None
    assert made.add(y, x)
    assert float((y.double() - exact).norm() / exact.norm()) < 4e-3


@needs_kernels
def test_what_the_kernel_cannot_take_is_left_to_others() -> None:
    g = torch.Generator().manual_seed(0)
    A, B = random(g, 4, 64), by_rank(random(g, 32, 4))
    good = factors([(A, B, 0)])
    assert good is not None
    for bad in (
        (A.float(), B.float(), 0),
        (A, B.contiguous(), 0),
        (random(g, 4, 40), B, 0),
        (random(g, 3, 64), B, 0),
        (A.clone().requires_grad_(), B, 0),
    ):
        assert factors([(A, B, 0), bad]) is None
    assert factors([]) is None
    other = factors([(random(g, 4, 96), B, 0)])
    assert other is not None
    assert jobs([]) is None and jobs([(0, RUN + 1, good)]) is None and jobs([(0, 1, good), (1, 1, other)]) is None
    made = jobs([(0, 1, good)])
    assert made is not None
    assert not made.add(torch.zeros(1, 32), random(g, 1, 64))
    assert not made.add(random(g, 1, 32), random(g, 1, 96))


def packs(g: torch.Generator) -> Packs:
    def one(rank: int, *, scaled: bool = False, biased: bool = False, parts: int = 2) -> Pack:
        B = tuple(by_rank(random(g, 32, rank, size=0.5)) for _ in range(parts))
        return Pack(
            A=random(g, rank * parts, 64, size=0.1),
            B=B,
            columns=((0, 32), (32, 64))[:parts],
            in_scale=random(g, 64) if scaled else None,
            out_scale=random(g, 64) if scaled else None,
            bias=random(g, 64) if biased else None,
        )

    return Packs([one(4), one(7, scaled=True), one(16, biased=True), one(3, parts=1), Pack(bias=random(g, 64))])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "lengths", [(1, 1, 1, 1, 1, 1), (1, 40, 2, 9, 1, 3), (20, 0, 0, 0, 0, 20), (3, 70, 65, 64, 2, 1)]
)
def test_planned_rows_are_the_definition(bias: bool, lengths: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    many, weight = packs(g), random(g, 64, 64, size=0.1)
    spans, row = [], 0
    for index, length in zip((-1, 0, 1, 2, 3, 4), lengths, strict=True):
        if length:
            spans.append(Span(row, row + length, index))
            row += length
    x, base = random(g, row, 64), random(g, 64) if bias else None
    with torch.inference_mode():
        found = adapted_linear(x, DenseFrozen(weight), base, many, spans)
    wide = [p.with_tensors([None if t is None else t.double() for t in p.tensors()]) for p in many]
    exact = adapted_linear_reference(x.double(), weight.double(), None if base is None else base.double(), wide, spans)
    assert float((found.double() - exact).norm() / exact.norm()) < 8e-3


@needs_kernels
def test_a_plan_is_kept_while_the_mix_stays() -> None:
    many = packs(torch.Generator().manual_seed(0))
    made = []

    def counting(*arguments: object) -> object:
        made.append(arguments)
        return plan(*arguments)  # type: ignore[arg-type]

    spans = (Span(0, 1, 0), Span(1, 2, 3))
    for _ in range(3):
        assert many.remembered(spans, torch.bfloat16, counting) is not None
    assert len(made) == 1
    assert many.remembered((Span(0, 2, 0),), torch.bfloat16, counting) is not None
    assert len(made) == 2
    assert many.remembered(spans, torch.float32, counting) is None
