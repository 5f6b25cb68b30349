"""LoRA-Pro: steps of the factors whose sum is the nearest that rank allows to a step of full fine-tuning; arXiv 2407.18242.

    g_A = s^-2 (B^T B)^-1 m_A + X A
    g_B = s^-2 [I - B (B^T B)^-1 B^T] m_B (A A^T)^-1 - B X
    B^T B X + X A A^T = -s^-2 (B^T B)^-1 m_A A^T

m_A, m_B are running means of the factors' own gradients (decay 0.9, corrected for their start), then p <- p - lr (g + decay p).
For gradients s B^T G, s G A^T the weight moves along P_B G + (I - P_B) G P_A, P the projectors on B's columns and A's rows.

This is the form with moments of the factors' size. The paper's Adam keeps them for the dense weight, as much memory as full
fine-tuning; that form is not offered.

The surprise: nothing is divided by the gradient's size, so the learning rate is one of plain descent on full weights, some
hundred times AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from veneer.plan.counts import Counted
from veneer.train.config import TrainConfig
from veneer.train.optim import FlatParameters, FlatState, factors_alone, groups_of, inverse, optimizer

BETA = 0.9
DAMPING = 1e-8


def adjusted(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scale: float, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """g_A and g_B for A `[rank, in]`, B `[out, rank]` and gradients of their shapes."""
    gram_a, gram_b = a @ a.t(), b.t() @ b
    inner = inverse(gram_b, damping)
    of_a = inner @ grad_a / scale**2
    x = _sylvester(gram_b, gram_a, -of_a @ a.t())
    of_b = grad_b @ inverse(gram_a, damping) / scale**2
    return of_a + x @ a, of_b - b @ (inner @ (b.t() @ of_b)) - b @ x


def _sylvester(left: Tensor, right: Tensor, wanted: Tensor) -> Tensor:
    """X with left X + X right = wanted, for symmetric `left` and `right` whose eigenvalues are not negative."""
    (p, u), (q, v) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    sums = (p.clamp_min(0)[:, None] + q.clamp_min(0)[None]).clamp_min(torch.finfo(p.dtype).tiny)
    found: Tensor = u @ ((u.t() @ wanted @ v) / sums) @ v.t()
    return found


def _one_moment(trained: Sequence[Counted]) -> int:
    return 4 * sum(tensor.numbers for tensor in trained)


@optimizer("lora_pro", state=_one_moment, paper="2407.18242")
def lora_pro(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """Descent with a running mean on gradients adjusted to the full weight's; takes a learning rate of plain descent."""
    factors_alone(parameters, "lora_pro")
    return LoRAPro(parameters, config)


class LoRAPro(FlatState):
    """State: the running mean of each buffer's gradient."""

    def __init__(self, parameters: FlatParameters, config: TrainConfig) -> None:
        super().__init__(groups_of(parameters, config), {"lr": config.lr, "weight_decay": config.weight_decay})
        self._parameters = parameters

    def fresh(self, buffer: Tensor) -> dict[str, Tensor]:
        return {"mean": torch.zeros_like(buffer)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for buffer in self._parameters.buffers.values():
            state = self.state[buffer]
            if not state:
                state |= {"step": torch.zeros(()), **self.fresh(buffer)}
            assert buffer.grad is not None
            state["step"] += 1
            state["mean"].lerp_(buffer.grad, 1 - BETA)
            buffer.grad.copy_(state["mean"] / (1 - BETA ** float(state["step"])))
        for pair in self._parameters.pairs():
            assert pair.grad_a is not None and pair.grad_b is not None
            step_a, step_b = adjusted(pair.a, pair.b, pair.grad_a, pair.grad_b, pair.scale)
            pair.grad_a.copy_(step_a)
            pair.grad_b.copy_(step_b)
        for group in self.param_groups:
            (buffer,) = group["params"]
            buffer.mul_(1 - group["lr"] * group["weight_decay"]).sub_(buffer.grad, alpha=group["lr"])
        return None
