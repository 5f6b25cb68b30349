"""Norms, rotary and gated activations are their definitions; statistics are fp32 inside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.ops.gated import activate, gated, gated_reference
from veneer.ops.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from veneer.ops.rope import rotary, rotary_reference


def randn(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_(grad)


@pytest.mark.parametrize("shape", [(5, 6), (3, 2, 4)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weight_grad", [True, False])
def test_rms_norm(shape: tuple[int, ...], offset: float, weight_grad: bool) -> None:
    x, w = randn(*shape), randn(shape[-1], seed=1, grad=weight_grad)
    torch.testing.assert_close(rms_norm(x, w, 1e-5, offset=offset), rms_norm_reference(x, w, 1e-5, offset=offset))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, offset=offset), (x, w))


@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm(with_bias: bool) -> None:
    x, w = randn(5, 6), randn(6, seed=1)
    b = randn(6, seed=2) if with_bias else None
    torch.testing.assert_close(layer_norm(x, w, b, 1e-5), layer_norm_reference(x, w, b, 1e-5))
    inputs = (x, w) if b is None else (x, w, b)
    assert torch.autograd.gradcheck(lambda x, w, b=None: layer_norm(x, w, b, 1e-5), inputs)


def test_norms_are_wide_inside() -> None:
    """Squares of large bf16 values must not lose their small digits on the way to the mean."""
    x = (100 + torch.arange(512) / 256).repeat(3, 1).bfloat16()
    w = torch.ones(512)
    exact = rms_norm_reference(x.double(), w.double(), 1e-6)
    assert (rms_norm(x, w, 1e-6).double() - exact).abs().max() <= 2**-8
    assert rms_norm(x, w, 1e-6).dtype == torch.bfloat16


def test_rms_norm_bf16_gradients() -> None:
    x = randn(64, 96).detach().bfloat16().requires_grad_()
    w = randn(96, seed=1).detach().float().requires_grad_()
    xx, ww = (t.detach().double().requires_grad_() for t in (x, w))
    dy = randn(64, 96, seed=3, grad=False)
    rms_norm(x, w, 1e-5).backward(dy.bfloat16())
    rms_norm_reference(xx, ww, 1e-5).backward(dy)
    for value, twin in ((x, xx), (w, ww)):
        assert value.grad is not None and twin.grad is not None and value.grad.dtype == value.dtype
        assert (value.grad.double() - twin.grad).norm() / twin.grad.norm() < 5e-3


@pytest.mark.parametrize("dim", [8, 4])
def test_rotary(dim: int) -> None:
    x = randn(5, 3, 8)
    angles = randn(5, dim // 2, seed=1, grad=False)
    cos, sin = angles.cos(), angles.sin()
    torch.testing.assert_close(rotary(x, cos, sin), rotary_reference(x, cos, sin))
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), (x,))
    torch.testing.assert_close(rotary(rotary(x, cos, sin), cos, -sin), x)


def test_rotary_takes_a_slice_of_the_group() -> None:
    """q and k are column slices of one product: rows are further apart than a row is wide."""
    wide = randn(5, 40, grad=False).float().bfloat16()
    x = wide[:, 8:32].view(5, 3, 8)
    angles = randn(5, 4, seed=1, grad=False).float()
    found = rotary(x, angles.cos(), angles.sin())
    exact = rotary_reference(x.double(), angles.cos().double(), angles.sin().double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated(name: str) -> None:
    x = randn(5, 8)
    torch.testing.assert_close(gated(x, name), gated_reference(x, name))
    assert torch.autograd.gradcheck(lambda x: gated(x, name), (x,))
    assert torch.autograd.gradcheck(lambda x: activate(x, name), (x,))


def test_unknown_activation_suggests() -> None:
    with pytest.raises(ConfigError, match="gelu"):
        activate(torch.zeros(2), "gelo")
