"""linear_cross_entropy is cross-entropy, whatever the chunk, and forms its gradient in the forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.ops.loss import linear_cross_entropy, linear_cross_entropy_reference, token_nll, token_nll_reference


def case(dtype: torch.dtype = torch.float64, n: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 6, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(11, 6, generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(11, generator=g, dtype=torch.float64).to(dtype)
    weights = torch.rand(n, generator=g, dtype=torch.float64)
    return hidden, weight, torch.randint(11, (n,), generator=g), weights, bias


def test_definition_is_torch_cross_entropy() -> None:
    hidden, weight, labels, weights, bias = case()
    wanted = (F.cross_entropy(hidden @ weight.t() + bias, labels, reduction="none") * weights).sum()
    torch.testing.assert_close(linear_cross_entropy_reference(hidden, weight, labels, weights, bias=bias), wanted)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_definition(chunk: int, softcap: float | None, weighted: bool, with_bias: bool) -> None:
    hidden, weight, labels, weights, bias = case()
    options = {"softcap": softcap, "bias": bias if with_bias else None}
    w = weights if weighted else None
    found = linear_cross_entropy(hidden, weight, labels, w, chunk=chunk, **options)
    wanted = linear_cross_entropy_reference(hidden, weight, labels, w, **options)
    torch.testing.assert_close(found, wanted)
    left, right = (torch.autograd.grad(loss * 0.7, hidden)[0] for loss in (found, wanted))
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(
        token_nll(hidden, weight, labels, chunk=chunk, **options),
        token_nll_reference(hidden, weight, labels, **options).detach(),
    )


def test_gradcheck() -> None:
    hidden, weight, labels, weights, bias = case()
    assert torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(h, weight, labels, weights, softcap=2.0, bias=bias, chunk=3), (hidden,)
    )


def test_bf16_hidden_gives_an_fp32_loss() -> None:
    hidden, weight, labels, weights, _ = case(torch.bfloat16, n=300)
    loss = linear_cross_entropy(hidden, weight, labels, weights.float(), chunk=128)
    assert loss.dtype == torch.float32
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = linear_cross_entropy_reference(exact_hidden, weight.double(), labels, weights)
    assert abs(loss.item() - exact.item()) < 5e-3 * exact.item()
    loss.backward()
    exact.backward()
    assert hidden.grad is not None and exact_hidden.grad is not None
    assert (hidden.grad.double() - exact_hidden.grad).norm() < 1e-2 * exact_hidden.grad.norm()


def test_no_rows() -> None:
    hidden, weight, labels, _, _ = case()
    loss = linear_cross_entropy(hidden[:0], weight, labels[:0], None)
    assert loss.item() == 0
    loss.backward()
    assert token_nll(hidden[:0], weight, labels[:0]).shape == (0,)


def test_the_mean_is_not_rounded_to_the_dtype_of_the_hidden_states() -> None:
    hidden, weight = (torch.randn(6, 8, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    labels = torch.arange(6)
    grads = []
    for factor in (1.0, 1 / 777):
        leaf = hidden.clone().requires_grad_()
        (linear_cross_entropy(leaf, weight, labels, None) * factor).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert torch.equal(grads[1], (grads[0].float() / 777).bfloat16())
