"""The C kernels give what the plain forms give, more exactly, and step aside where they cannot be built."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from veneer.base.formats.bof4 import TABLE as BOF4
from veneer.base.formats.fp4 import TABLE as FP4
from veneer.base.formats.nf4 import TABLE as NF4
from veneer.ops import blocks, four_bit, int8
from veneer.ops.attention import attention
from veneer.ops.blocks import Piece, Scores
from veneer.ops.gated import gated_reference
from veneer.ops.native import attention as native
from veneer.ops.native import build, few, rows
from veneer.ops.norm import rms_norm_reference
from veneer.ops.rope import rotary_reference

needs_kernels = pytest.mark.skipif(build.library() is None, reason="no native kernels on this machine")


def pieces_of(*lengths: int) -> list[Piece]:
    return [Piece(sum(lengths[:i]), n, sum(lengths[:i]), n) for i, n in enumerate(lengths)]


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@needs_kernels
@pytest.mark.parametrize(
    "pieces, heads, kv, d, window",
    [
        (pieces_of(128, 128), 3, 1, 64, None),
        (pieces_of(1, 77, 130, 2, 64, 65), 4, 2, 32, None),
        (pieces_of(1, 77, 150), 2, 2, 80, 50),
        (pieces_of(140, 3), 2, 1, 128, 7),
        (pieces_of(70), 2, 1, 256, None),
        ([Piece(0, 5, 0, 150), Piece(5, 100, 150, 233)], 4, 2, 16, None),
    ],
    ids=["even", "ragged", "window", "narrow", "wide", "prefix"],
)
def test_attention_is_the_plain_form(pieces: list[Piece], heads: int, kv: int, d: int, window: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    n, t = sum(p.n for p in pieces), sum(p.t for p in pieces)
    q, k, v, dy = (torch.randn(r, h, d, generator=g).bfloat16() for r, h in ((n, heads), (t, kv), (t, kv), (n, heads)))
    how = Scores(2 * d**-0.5, window, None)
    assert native.fits(q, k, v, how)
    wide = [x.double() for x in (q, k, v)]
    exact = blocks.forward(*wide, pieces, how)
    exact += blocks.backward(*wide, *exact, dy.double(), pieces, how)
    results = []
    for run in (native, blocks):
        found = run.forward(q, k, v, pieces, how)
        found += run.backward(q, k, v, *found, dy, pieces, how)
        results.append([relative(a, b) for a, b in zip(found, exact, strict=True)])
    ours, plain = results
    assert max(ours) < 5e-3
    assert all(a <= b for a, b in zip(ours, plain, strict=True))


@needs_kernels
def test_attention_gives_the_same_bits_every_time() -> None:
    """Work is handed to threads as they come free; sums must not depend on it. Nor on columns of the input in between."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(300, 5 * 64, generator=g).bfloat16()
    q, k, v = (x.unflatten(1, (-1, 64)) for x in wide.split([192, 64, 64], dim=1))
    dy = torch.randn(300, 3, 64, generator=g).bfloat16()

    def run(*inputs: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attention(*leaves, [200, 100], scale=0.1)
        return [out, *torch.autograd.grad(out, leaves, dy)]

    torch.set_num_threads(2)
    try:
        first = run(q, k, v)
        for again in (run(q, k, v), run(q.contiguous(), k.contiguous(), v.contiguous())):
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(1)


@needs_kernels
def test_scores_far_from_zero() -> None:
    """Neither very large nor very small scores may overflow, in columns with a query or in those that fill a vector up."""
    for sign in (1, -1):
        q = torch.full((20, 1, 16), 30.0).bfloat16().requires_grad_()
        k = torch.full((20, 1, 16), 30.0 * sign).bfloat16().requires_grad_()
        v = torch.randn(20, 1, 16).bfloat16().requires_grad_()
        out = attention(q, k, v, [20], scale=1.0)
        grads = torch.autograd.grad(out.float().sum(), (q, k, v))
        assert all(bool(x.isfinite().all()) for x in (out, *grads))


def test_off_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_NATIVE", "0")
    assert build.library.__wrapped__() is None


def test_a_compiler_that_fails_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if build._obstacle() is not None:
        pytest.skip("nothing to build here")
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken && exit 0\necho no such header >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert build.library.__wrapped__() is None
    assert "no such header" in caplog.text
    assert not list((tmp_path / "native").iterdir())


@needs_kernels
def test_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = build._compiled()
    monkeypatch.setattr(
        build.subprocess, "run", lambda *a, **k: pytest.fail("compiled again") if len(a[0]) > 2 else real(*a, **k)
    )
    assert build._compiled() == first


real = build.subprocess.run


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_kernels
def test_rms_norm() -> None:
    for x in (bf16(7, 96), bf16(7, 160)[:, 32:128], bf16(5, 3, 32)):
        w, dy = torch.rand(x.shape[-1]), bf16(*x.shape, seed=1)
        found = rows.rms_forward(x, w, 1e-5, 1.0)
        assert found is not None
        wide, ww = x.double().requires_grad_(), w.double()
        exact = rms_norm_reference(wide, ww, 1e-5, offset=1.0)
        assert relative(found[0], exact.detach()) < 3e-3 and found[1].shape == (*x.shape[:-1], 1)
        dx = rows.rms_backward(x, w, found[1], dy, 1.0)
        assert dx is not None
        assert relative(dx, torch.autograd.grad(exact, wide, dy.double())[0]) < 3e-3


@needs_kernels
@pytest.mark.parametrize("half", [32, 16])
def test_rotary(half: int) -> None:
    x = bf16(6, 320)[:, 64:256].unflatten(1, (3, 64))
    angles = torch.randn(6, half, generator=torch.Generator().manual_seed(2))
    cos, sin = angles.cos(), angles.sin()
    for back in (False, True):
        found = rows.rotary(x, cos, sin, back=back)
        assert found is not None
        assert relative(found, rotary_reference(x.double(), cos.double(), (-sin if back else sin).double())) < 3e-3


@needs_kernels
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_gated(name: str) -> None:
    gate_up, dy = bf16(5, 64) * 6, bf16(5, 32, seed=1)
    gate_up[0, :4] = torch.tensor([-300.0, 300.0, -60.0, 0.0])
    wide = gate_up.double().requires_grad_()
    exact = gated_reference(wide, name)
    found, slope = rows.gated_forward(gate_up, name), rows.gated_backward(gate_up, dy, name)
    assert found is not None and slope is not None
    assert relative(found, exact.detach()) < 3e-3
    assert relative(slope, torch.autograd.grad(exact, wide, dy.double())[0]) < 3e-3


@needs_kernels
def test_scale_backward() -> None:
    dy, y, scale = bf16(300, 96)[:, 32:], bf16(300, 64, seed=1), bf16(64, seed=2)
    dx = torch.empty(300, 64, dtype=torch.bfloat16)
    total = rows.scale_backward(dy, y, scale, dx)
    assert total is not None
    assert relative(total, (dy.double() * y.double()).sum(0)) < 1e-5 and torch.equal(dx, dy * scale)


@needs_kernels
def test_cross_entropy() -> None:
    logits, labels = bf16(9, 112) * 8, torch.randint(112, (9,), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(9, generator=torch.Generator().manual_seed(2))
    wide = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    nll = rows.cross_entropy(logits, labels, None)
    assert nll is not None and torch.equal(wide, logits.double())
    torch.testing.assert_close(nll.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    rows.cross_entropy(logits, labels, weights)
    assert relative(logits, torch.autograd.grad((exact * weights).sum(), wide)[0]) < 3e-3
    with pytest.raises(IndexError, match="-100"):
        rows.cross_entropy(logits, torch.full((9,), -100), weights)


@needs_kernels
@pytest.mark.parametrize("block", [32, 64, 256])
@pytest.mark.parametrize("table", [NF4, FP4, BOF4], ids=["nf4", "fp4", "bof4-s"])
def test_four_bits(block: int, table: four_bit.Table) -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    stored = four_bit.quantise(weight, table, block=block)
    out = torch.empty(24 * 256, dtype=torch.bfloat16)
    assert rows.dequantise_four_bit(stored.packed, stored.scales(), block, table.values, out)
    assert torch.equal(out.view(24, 256), stored.dequantise(torch.empty(24, 256)).bfloat16())


@needs_kernels
def test_int8_is_dequantised_to_the_same_bits() -> None:
    weight = torch.randn(33, 208, generator=torch.Generator().manual_seed(0))
    weight[5] = 0
    stored = int8.quantise(weight)
    out = torch.empty(33, 208, dtype=torch.bfloat16)
    assert rows.dequantise_int8(stored.codes, stored.scale, out)
    assert torch.equal(out, torch.mul(stored.codes, stored.scale[:, None], out=torch.empty_like(out)))
    assert not rows.dequantise_int8(stored.codes, stored.scale, torch.empty(33, 208))
    assert not rows.dequantise_int8(stored.codes, stored.scale, torch.empty(208, 33, dtype=torch.bfloat16).t())


@needs_kernels
@pytest.mark.parametrize("n", [1, 7, 9, 32])
def test_product_of_few_rows_and_int8_codes(n: int) -> None:
    x, weight = bf16(n, 160)[:, 32:], torch.randn(33, 128, generator=torch.Generator().manual_seed(1))
    stored = int8.quantise(weight)
    found = few.product_stored(x, stored.rows)
    assert found is not None
    assert relative(found, x.double() @ (stored.codes.double() * stored.scale.double()[:, None]).t()) < 3e-3
    assert few.product_stored(bf16(33, 128), stored.rows) is None


@needs_kernels
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 16, 32])
@pytest.mark.parametrize("m", [1, 6, 33])
def test_product_of_few_rows(n: int, m: int) -> None:
    x, w = bf16(n, 160)[:, 32:], bf16(m, 128, seed=1)
    found = few.product(x, w)
    assert found is not None
    exact = x.double() @ w.double().t()
    assert relative(found, exact) < 3e-3
    wide = bf16(n, m + 3, seed=2)
    before = wide.clone()
    assert few.add_product(wide[:, 2 : m + 2], x, w)
    assert relative(wide[:, 2 : m + 2], before[:, 2 : m + 2].double() + exact) < 3e-3
    assert torch.equal(wide[:, :2], before[:, :2]) and torch.equal(wide[:, m + 2 :], before[:, m + 2 :])


@needs_kernels
@pytest.mark.parametrize("n", [33, 48, 65, 200, few.SOME])
@pytest.mark.parametrize("m, k", [(1, 32), (6, 128), (33, 320), (200, 576)])
def test_product_of_some_rows(n: int, m: int, k: int) -> None:
    x, w = bf16(n, k + 32)[:, 32:], bf16(m, k, seed=1)
    found = few.product(x, w)
    assert found is not None
    assert relative(found, x.double() @ w.double().t()) < 3e-3
    fewer = few.product(x[-33:], w)
    assert fewer is not None
    assert torch.equal(found[-33:], fewer), "a row does not depend on those beside it"


@needs_kernels
def test_rows_that_are_too_many_or_lie_oddly_are_left_to_the_library() -> None:
    assert few.product(bf16(few.SOME + 1, 64), bf16(8, 64, seed=1)) is None
    odd = bf16(40, 65)
    assert few.product(odd[:, :64], bf16(8, 64, seed=1)) is None
    assert few.product(bf16(40, 66)[:, 1:65], bf16(8, 64, seed=1)) is None


@needs_kernels
@pytest.mark.parametrize("n", [1, 7, 9, 64])
@pytest.mark.parametrize("m", [1, 33])
def test_scores_are_not_rounded(n: int, m: int) -> None:
    x, w = bf16(n, 160)[:, 32:], bf16(m, 128, seed=1)
    found = few.scores(x, w)
    assert found is not None and found.dtype == torch.float32
    assert relative(found, x.double() @ w.double().t()) < 2e-6
    assert few.scores(bf16(65, 128), w) is None


@needs_kernels
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads, kv, d", [(9, 3, 64), (4, 4, 16), (16, 1, 128)])
def test_decode(heads: int, kv: int, d: int, window: int | None) -> None:
    lengths = [1, 200, 129, 31]
    store = bf16(4, 220, 2, kv, d, seed=3)
    k, v = store[:, :, 0], store[:, :, 1]
    store[0, 1:] = torch.nan  # never read
    q, how = bf16(4, heads, d), Scores(d**-0.5, window, None)
    found = few.decode(q, k, v, lengths, how)
    assert found is not None
    exact = blocks.decode(q.double(), k.double().nan_to_num(), v.double().nan_to_num(), lengths, how)
    assert relative(found, exact) < 4e-3


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 64), (8, 1000), (5, 49_152)])
def test_the_largest_of_each_row(shape: tuple[int, int]) -> None:
    """As torch has it: the first of equals, a NaN before any number, and rows where nothing is finite."""
    generator = torch.Generator().manual_seed(shape[1])
    for spoil in (None, torch.nan, torch.inf, -torch.inf):
        y = torch.randn(shape, generator=generator).mul(4).round()  # many equals
        if spoil is not None:
            y[torch.rand(shape, generator=generator) < 0.1] = spoil
            y[-1] = spoil
        found = few.largest(y)
        assert found is not None
        values = y.max(dim=1).values
        same = (y == values[:, None]) | (y.isnan() & values.isnan()[:, None])
        assert found[0] == same.int().argmax(dim=1).tolist()
        torch.testing.assert_close(torch.tensor(found[1]), values, atol=0.0, rtol=0.0, equal_nan=True)
