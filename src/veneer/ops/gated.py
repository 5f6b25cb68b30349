"""Activations and the gated MLP: act(gate) * up, where `gate_up` is `[N, 2F]` with the gate first.

SwiGLU and its relatives: arXiv 2002.05202. Only `gate_up` is kept for the backward pass; everything else is computed again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from veneer.registry import Registry

ACTIVATIONS: Registry[Callable[[Tensor], Tensor]] = Registry("activation")
ACTIVATIONS["silu"] = F.silu
ACTIVATIONS["gelu"] = F.gelu
ACTIVATIONS["gelu_tanh"] = lambda x: F.gelu(x, approximate="tanh")
ACTIVATIONS["relu"] = torch.relu


def activate(x: Float[Tensor, "*shape"], name: str) -> Float[Tensor, "*shape"]:
    """The activation called `name`, element by element."""
    return ACTIVATIONS[name](x)


def gated_reference(gate_up: Float[Tensor, "n twice"], name: str) -> Float[Tensor, "n width"]:
    """The definition of `gated`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, name) * up


def gated(gate_up: Float[Tensor, "n twice"], name: str) -> Float[Tensor, "n width"]:
    """act(gate) * up."""
    return gated_reference(gate_up, name)
