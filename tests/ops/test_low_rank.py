"""adapted_linear and gated_adapted_linear are their definitions: values, gradients, spans, dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from veneer.ops.gated import gated_reference
from veneer.ops.low_rank import (
    DenseFrozen,
    Pack,
    Packs,
    adapted_linear,
    adapted_linear_reference,
    gated_adapted_linear,
    norm_adapted_linear,
)
from veneer.ops.norm import rms_norm_reference
from veneer.types import Span

IN, PARTS = 6, (4, 2, 3)
OUT = sum(PARTS)
ONE = [Span(0, 7, 0)]
MIXED = [Span(0, 2, 1), Span(2, 3, -1), Span(3, 5, 0), Span(5, 7, 1)]
SHORT = [Span(i, i + 1, i % 4 - 1) for i in range(7)]


def make_pack(
    kind: str, *, seed: int = 0, parts: Sequence[int] = PARTS, dtype: torch.dtype = torch.float64, inp: int = IN
) -> Pack:
    """`kind` lists what the pack holds: l(ow rank), i(n scale), o(ut scale), b(ias); `s` leaves the middle part out."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()

    edges = [(sum(parts[:i]), sum(parts[: i + 1])) for i in range(len(parts))]
    columns = tuple(edge for i, edge in enumerate(edges) if not ("s" in kind and i == 1))
    ranks = [2 + i % 2 for i in range(len(columns))]
    low = "l" in kind
    return Pack(
        A=leaf(sum(ranks), inp) if low else None,
        B=tuple(leaf(stop - start, r) for (start, stop), r in zip(columns, ranks, strict=True)) if low else (),
        columns=columns if low else (),
        in_scale=leaf(inp) if "i" in kind else None,
        out_scale=leaf(sum(parts)) if "o" in kind else None,
        bias=leaf(sum(parts)) if "b" in kind else None,
    )


def leaves(packs: Sequence[Pack]) -> list[Tensor]:
    found = [t for p in packs for t in (p.A, *p.B, p.in_scale, p.out_scale, p.bias)]
    return [t for t in found if t is not None]


def assert_same_gradients(found: Tensor, wanted: Tensor, inputs: Sequence[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    dy = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(wanted.dtype)
    left = torch.autograd.grad(found, inputs, dy, allow_unused=True)
    right = torch.autograd.grad(wanted, inputs, dy, allow_unused=True)
    for value, a, b in zip(inputs, left, right, strict=True):
        a = torch.zeros_like(value) if a is None else a
        b = torch.zeros_like(value) if b is None else b
        assert a.dtype == value.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


KINDS = ["l", "ls", "lo", "li", "lb", "liob", "lsiob", "o", "i", "b", "iob", ""]


@pytest.mark.parametrize("spans", [ONE, MIXED, SHORT], ids=["one", "mixed", "short"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["bare", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_definition(kind: str, with_bias: bool, spans: list[Span]) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(7, IN, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(OUT, IN, generator=g, dtype=torch.float64)
    bias = torch.randn(OUT, generator=g, dtype=torch.float64) if with_bias else None
    packs = [make_pack(kind, seed=2), make_pack("l", seed=3), make_pack("lob", seed=4)]
    found = adapted_linear(x, DenseFrozen(weight), bias, packs, spans)
    wanted = adapted_linear_reference(x, weight, bias, packs, spans)
    assert_same_gradients(found, wanted, [x, *leaves(packs)], 1e-10)


@pytest.mark.parametrize("kind", ["l", "lsiob"])
def test_gradcheck(kind: str) -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.randn(7, IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)
    pack = make_pack(kind)
    assert torch.autograd.gradcheck(
        lambda x, *_: adapted_linear(x, DenseFrozen(weight), None, [pack], ONE), (x, *leaves([pack]))
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("spans", [ONE, MIXED], ids=["one", "mixed"])
@pytest.mark.parametrize("kind", ["l", "liob", "o", ""])
def test_gated_equals_definition(kind: str, spans: list[Span], activation: str) -> None:
    g = torch.Generator().manual_seed(1)
    gate_up = torch.randn(7, 2 * IN, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, IN, generator=g, dtype=torch.float64)
    packs = [make_pack(kind, seed=2, parts=(5,)), make_pack("l", seed=3, parts=(5,))]
    found = gated_adapted_linear(gate_up, activation, DenseFrozen(weight), None, packs, spans)
    wanted = adapted_linear_reference(gated_reference(gate_up, activation), weight, None, packs, spans)
    assert_same_gradients(found, wanted, [gate_up, *leaves(packs)], 1e-10)


@pytest.mark.parametrize("spans", [ONE, MIXED, SHORT], ids=["one", "mixed", "short"])
def test_fp32_adapter_on_bf16_base(spans: list[Span]) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(7, IN, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(OUT, IN, generator=g).bfloat16()
    packs = [make_pack(kind, seed=i, dtype=torch.float32) for i, kind in enumerate(("lob", "li", "l"))]
    y = adapted_linear(x, DenseFrozen(weight), None, packs, spans)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16
    wide = [torch.nn.Parameter(t.detach().double()) for t in (x, *leaves(packs))]
    it = iter(wide[1:])
    twins = [Pack(next(it), tuple(next(it) for _ in p.B), p.columns, *(next(it) if t is not None else None
             for t in (p.in_scale, p.out_scale, p.bias))) for p in packs]  # fmt: skip
    exact = adapted_linear_reference(wide[0], weight.double(), None, twins, spans)
    exact.square().sum().backward()
    for value, twin in zip((x, *leaves(packs)), wide, strict=True):
        if twin.grad is None:
            assert value.grad is None or not value.grad.any()
            continue
        assert value.grad is not None and value.grad.dtype == value.dtype
        error = (value.grad.double() - twin.grad).norm() / twin.grad.norm()
        assert error < 0.03


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    """A frozen input (below the lowest adapter) costs no product with W."""

    class Counting(DenseFrozen):
        def apply_transposed(self, dy: Tensor) -> Tensor:
            raise AssertionError("the input needs no gradient")

    pack = make_pack("l")
    y = adapted_linear(
        torch.randn(7, IN, dtype=torch.float64), Counting(torch.randn(OUT, IN).double()), None, [pack], ONE
    )
    y.sum().backward()
    assert pack.A is not None and pack.A.grad is not None


def test_one_row_at_a_time_is_all_rows_at_once() -> None:
    """Decode: eight rows with eight adapters of different ranks give what each alone gives."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, IN, generator=g, dtype=torch.float64)
    frozen = DenseFrozen(torch.randn(OUT, IN, generator=g, dtype=torch.float64))
    packs = [make_pack("l" if i % 2 else "lob", seed=i) for i in range(7)]
    spans = [Span(i, i + 1, i - 1) for i in range(8)]
    with torch.no_grad():
        together = adapted_linear(x, frozen, None, packs, spans)
        alone = [adapted_linear(x[i : i + 1], frozen, None, packs, [Span(0, 1, i - 1)]) for i in range(8)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spans", [ONE, MIXED], ids=["one", "mixed"])
@pytest.mark.parametrize("kind", ["l", "liob", ""])
def test_norm_equals_definition(kind: str, spans: list[Span]) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(7, IN, generator=g, dtype=torch.float64, requires_grad=True)
    norm, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((IN,), (OUT, IN)))
    packs = [make_pack(kind, seed=2), make_pack("lo", seed=3)]
    found = norm_adapted_linear(x, norm, 1e-5, DenseFrozen(weight), None, packs, spans, offset=1.0)
    wanted = adapted_linear_reference(rms_norm_reference(x, norm, 1e-5, offset=1.0), weight, None, packs, spans)
    assert_same_gradients(found, wanted, [x, *leaves(packs)], 1e-10)


@pytest.mark.parametrize("zero", [False, True], ids=["divides", "keeps"])
def test_out_scale_gradient_at_zero(zero: bool) -> None:
    """The output is divided by its scale to get the gradient of the scale, unless a scale is zero."""
    g = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((7, IN), (OUT, IN)))
    pack = make_pack("lo")
    assert pack.out_scale is not None
    if zero:
        pack.out_scale.data[2] = 0
    found = adapted_linear(x, DenseFrozen(weight), None, [pack], ONE)
    wanted = adapted_linear_reference(x, weight, None, [pack], ONE)
    assert_same_gradients(found, wanted, leaves([pack]), 1e-10)


def test_fp32_frozen_product_is_exact_enough() -> None:
    """fp32 products go through oneDNN where torch has it; both ways round, and from a transposed store."""
    g = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(*shape, generator=g) for shape in ((40, 24), (56, 24)))
    dy = torch.randn(40, 56, generator=g)
    for stored in (weight, weight.t().contiguous().t()):
        frozen = DenseFrozen(stored)
        torch.testing.assert_close(frozen.apply(x).double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            frozen.apply_transposed(dy).double(), dy.double() @ weight.double(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("with_bias", [False, True], ids=["bare", "bias"])
def test_stacked_packs_are_the_loop(with_bias: bool) -> None:
    """Packs with different parts, ranks and vectors side by side, with and without a memory of the last stack."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(9, IN, generator=g, dtype=torch.float64)
    weight = torch.randn(OUT, IN, generator=g, dtype=torch.float64)
    bias = torch.randn(OUT, generator=g, dtype=torch.float64) if with_bias else None
    packs = Packs(make_pack(kind, seed=i) for i, kind in enumerate(["l", "ls", "lob", "i", "liob", "b", "o"]))
    for shift in (0, 3, 0):
        spans = [Span(i, i + 1, (i + shift) % 8 - 1) for i in range(9)]
        wanted = adapted_linear_reference(x, weight, bias, packs, spans)
        with torch.no_grad():
            for given in (packs, list(packs)):
                torch.testing.assert_close(adapted_linear(x, DenseFrozen(weight), bias, given, spans), wanted)


def test_a_sick_neighbour_does_not_spread() -> None:
    """A non-finite adapter in the batch spoils its own rows only."""
    x, weight = torch.ones(4, IN), torch.ones(OUT, IN)
    packs = [make_pack("l", seed=i, dtype=torch.float32) for i in range(4)]
    assert packs[1].A is not None
    packs[1].A.data.fill_(torch.inf)
    with torch.no_grad():
        y = adapted_linear(x, DenseFrozen(weight), None, packs, [Span(i, i + 1, i) for i in range(4)])
    assert not y[1].isfinite().all() and y[[0, 2, 3]].isfinite().all()
