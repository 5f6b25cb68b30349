"""Quantised groups multiply with the dequantised weight, part by part, and keep nothing dense."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.base.formats import load_all as load_formats
from veneer.base.quantized import QuantizedFrozen, QuantizedHost, quantize_parts
from veneer.errors import ConfigError
from veneer.ops.low_rank import Frozen, Pack, adapted_linear
from veneer.ops.scratch import Scratch
from veneer.types import Span


def weights() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 64, generator=g) for rows in (48, 16, 16)]


@pytest.mark.parametrize("name", sorted(load_formats()))
def test_group_is_its_parts(name: str) -> None:
    parts = quantize_parts(weights(), name)
    frozen = QuantizedFrozen(parts, torch.float32, Scratch())
    dense = torch.cat([QuantizedHost(part, torch.float32).weight() for part in parts])
    x, dy = torch.randn(20, 64), torch.randn(20, 80)
    assert isinstance(frozen, Frozen) and (frozen.in_features, frozen.out_features) == (64, 80)
    torch.testing.assert_close(frozen.apply(x), x @ dense.t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(frozen.apply_transposed(dy), dy @ dense, rtol=1e-5, atol=1e-4)
    assert frozen.nbytes < dense.numel() * 2


@pytest.mark.parametrize("name", sorted(load_formats()))
def test_host(name: str) -> None:
    (storage,) = quantize_parts(weights()[:1], name)
    host = QuantizedHost(storage, torch.bfloat16, torch.ones(48).bfloat16())
    assert host.dtype == torch.bfloat16 and host.weight().shape == (48, 64) and host.shape.has_bias
    x = torch.randn(3, 64).bfloat16()
    torch.testing.assert_close(host.apply(x), torch.nn.functional.linear(x, host.weight(), host.bias))


def test_training_through_a_quantised_base_saves_no_dense_weight() -> None:
    frozen = QuantizedFrozen(quantize_parts(weights(), "nf4-dq"), torch.float32, Scratch())
    x = torch.randn(20, 64, requires_grad=True)
    pack = Pack(torch.randn(4, 64, requires_grad=True), (torch.randn(80, 4, requires_grad=True),), ((0, 80),))
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = adapted_linear(x, frozen, None, [pack], [Span(0, 20, 0)])
    assert sum(t.numel() for t in saved) <= x.numel() + 20 * 4
    dy = torch.randn(20, 80)
    y.backward(dy)
    assert pack.A is not None
    wanted = frozen.apply_transposed(dy) + dy @ pack.B[0].detach() @ pack.A.detach()
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-4)


def test_unknown_name_suggests() -> None:
    with pytest.raises(ConfigError, match="nf4"):
        quantize_parts(weights(), "nf5")


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_int8_rows_are_read_where_they_lie(rows: int) -> None:
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(48, 64, generator=g), torch.randn(16, 64, generator=g)]
    frozen = QuantizedFrozen(quantize_parts(weights, "int8"), torch.bfloat16, Scratch())
    x = torch.randn(rows, 64, generator=g).bfloat16()
    dense = torch.cat([p.dequantise(torch.empty(p.shape)) for p in frozen.parts])
    exact = x.double() @ dense.double().t()
    assert float((frozen.apply(x).double() - exact).norm() / exact.norm()) < 5e-3
