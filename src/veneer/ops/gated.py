"""Activations and the gated MLP: act(gate) * up, where `gate_up` is `[N, 2F]` with the gate first.

SwiGLU and its relatives: arXiv 2002.05202. Only `gate_up` is kept for the backward pass; everything else is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from veneer.ops.native import rows
from veneer.ops.recording import recorded, unrecorded
from veneer.registry import Registry

aten = torch.ops.aten


class Activation(NamedTuple):
    """f(x), and `slope(dy, x, grad_input=...)` = dy * f'(x)."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[..., Tensor]


def _gelu_tanh_slope(dy: Tensor, x: Tensor, *, grad_input: Tensor) -> Tensor:
    return aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=grad_input)  # type: ignore[no-any-return]


def _relu_slope(dy: Tensor, x: Tensor, *, grad_input: Tensor) -> Tensor:
    return aten.threshold_backward.grad_input(dy, x, 0, grad_input=grad_input)  # type: ignore[no-any-return]


ACTIVATIONS: Registry[Activation] = Registry("activation")
ACTIVATIONS["silu"] = Activation(F.silu, aten.silu_backward.grad_input)
ACTIVATIONS["gelu"] = Activation(F.gelu, aten.gelu_backward.grad_input)
ACTIVATIONS["gelu_tanh"] = Activation(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_slope)
ACTIVATIONS["relu"] = Activation(torch.relu, _relu_slope)


def activate(x: Float[Tensor, "*shape"], name: str) -> Float[Tensor, "*shape"]:
    """The activation called `name`, element by element. Keeps x."""
    return ACTIVATIONS[name].value(x)


def gated_reference(gate_up: Float[Tensor, "n twice"], name: str) -> Float[Tensor, "n width"]:
    """The definition of `gated`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, name) * up


def gated(gate_up: Float[Tensor, "n twice"], name: str) -> Float[Tensor, "n width"]:
    """act(gate) * up. Keeps `gate_up`."""
    if not recorded(gate_up):
        return gated_value(gate_up, name)
    return _Gated.apply(gate_up, name)  # type: ignore[no-any-return, no-untyped-call]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.name = name
        return gated_value(gate_up, name)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return gated_slope(gate_up, dy, ctx.name), None


@unrecorded
def gated_value(gate_up: Float[Tensor, "n twice"], name: str) -> Float[Tensor, "n width"]:
    """act(gate) * up, without a gradient."""
    fast = rows.gated_forward(gate_up, name)
    if fast is not None:
        return fast
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, name).mul_(up)


@torch.no_grad()
def gated_slope(gate_up: Float[Tensor, "n twice"], dy: Float[Tensor, "n width"], name: str) -> Float[Tensor, "n twice"]:
    """The gradient of `gate_up` for the gradient dy of act(gate) * up."""
    fast = rows.gated_backward(gate_up, dy, name)
    if fast is not None:
        return fast
    gate, up = gate_up.chunk(2, dim=-1)
    found = torch.empty_like(gate_up)
    d_gate, d_up = found.chunk(2, dim=-1)
    torch.mul(dy, activate(gate, name), out=d_up)
    ACTIVATIONS[name].slope(dy * up, gate, grad_input=d_gate)
    return found
