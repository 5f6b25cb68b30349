"""Attention over packed sequences is its definition, sequence by sequence, and nothing leaks between neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.ops.attention import (
    attention,
    attention_over,
    attention_over_reference,
    attention_reference,
    decode_attention,
)

OPTIONS = [{}, {"window": 5}, {"softcap": 2.0}, {"window": 3, "softcap": 1.5}]
IDS = ["plain", "window", "softcap", "both"]


def qkv(n: int, heads: int, kv: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, h, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for h in (heads, kv, kv)]


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("heads, kv", [(3, 1), (2, 2), (4, 2)])
def test_gradcheck(heads: int, kv: int, options: dict[str, float]) -> None:
    q, k, v = qkv(9, heads, kv, 4)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, [6, 1, 2], scale=0.5, **options), (q, k, v))


@pytest.mark.parametrize(
    "options", [{}, {"window": 70}, {"window": 7}, {"softcap": 2.0}], ids=["plain", "wide", "narrow", "cap"]
)
@pytest.mark.parametrize("lengths", [[300], [1, 129, 128, 42], [64] * 4 + [44]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_equal_definition(lengths: list[int], options: dict[str, float], dtype: torch.dtype) -> None:
    q, k, v = qkv(300, 6, 2, 16, dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    dy = torch.randn(300, 6, 16, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = attention(q, k, v, lengths, scale=0.25, **options)
    exact_inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = attention_reference(*exact_inputs, lengths, scale=0.25, **options)
    pairs = [(found, exact), *zip(torch.autograd.grad(found, (q, k, v), dy),
             torch.autograd.grad(exact, exact_inputs, dy.double()), strict=True)]  # fmt: skip
    for a, b in pairs:
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("options", [{}, {"window": 4}], ids=["plain", "window"])
def test_prefix(options: dict[str, float]) -> None:
    q, k, v = qkv(9, 4, 2, 4)
    g = torch.Generator().manual_seed(8)
    pairs = [torch.randn(3, 2, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    prefix = [None, (pairs[0], pairs[1])]
    wanted = attention_reference(q, k, v, [4, 5], scale=0.5, prefix=prefix, **options)
    torch.testing.assert_close(attention(q, k, v, [4, 5], scale=0.5, prefix=prefix, **options), wanted)

    def of(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
        return attention(q, k, v, [4, 5], scale=0.5, prefix=[None, (pk, pv)], **options)

    assert torch.autograd.gradcheck(of, (q, k, v, *pairs))


def test_only_keys_need_a_gradient() -> None:
    """Prefix tuning on a frozen base: the queries of the lowest layer need none."""
    q, k, v = qkv(9, 4, 2, 4)
    wanted = torch.autograd.grad(attention_reference(q, k, v, [4, 5], scale=0.5).square().sum(), (k, v))
    q = q.detach()
    found = torch.autograd.grad(attention(q, k, v, [4, 5], scale=0.5).square().sum(), (k, v))
    torch.testing.assert_close(found, wanted)


def test_neighbours_do_not_leak() -> None:
    q, k, v = (t.detach().float() for t in qkv(200, 3, 1, 8))
    before = attention(q, k, v, [90, 110], scale=0.3)
    for t in (q, k, v):
        t[:90] += 10
    after = attention(q, k, v, [90, 110], scale=0.3)
    assert torch.equal(before[90:], after[90:])


def test_slices_of_one_product() -> None:
    """q, k and v come as column slices of one `[N, (H + 2K) D]` product."""
    wide = torch.randn(20, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    q, k, v = wide[:, :24].view(20, 3, 8), wide[:, 24:32].view(20, 1, 8), wide[:, 32:].view(20, 1, 8)
    found = torch.autograd.grad(attention(q, k, v, [20], scale=0.3).square().sum(), wide)
    wanted = torch.autograd.grad(attention_reference(q, k, v, [20], scale=0.3).square().sum(), wide)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("n, t", [(1, 7), (3, 7), (7, 7), (150, 400), (1, 300)])
def test_attention_over(n: int, t: int, options: dict[str, float]) -> None:
    q, k, v = (x.detach() for x in qkv(t, 4, 2, 8))
    wanted = attention_over_reference(q[-n:], k, v, scale=0.4, **options)
    torch.testing.assert_close(attention_over(q[-n:], k, v, scale=0.4, **options), wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_decode_attention(options: dict[str, float]) -> None:
    q, _, _ = (x.detach() for x in qkv(3, 4, 2, 8))
    g = torch.Generator().manual_seed(3)
    k, v = (torch.randn(3, 12, 2, 8, generator=g, dtype=torch.float64) for _ in range(2))
    lengths = [12, 1, 7]
    k[1, 1:], v[1, 1:] = 1e6, 1e6  # what a store held before counts for nothing
    found = decode_attention(q, k, v, lengths, scale=0.4, **options)
    for row, t in enumerate(lengths):
        wanted = attention_over_reference(q[row : row + 1], k[row, :t], v[row, :t], scale=0.4, **options)
        torch.testing.assert_close(found[row : row + 1], wanted)
