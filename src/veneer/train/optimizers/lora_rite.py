"""LoRA-RITE: an adaptive step of the factors that does not depend on how the update is split between them; arXiv 2410.20625.

For B (and for A^T with the roles changed), with A^T = Q R, Q orthonormal `[in, rank]`:

    u = g_B R^-1                                      the "unmagnified" gradient, s G Q: A's size has left it
    V <- b2 P V P^T + (1 - b2) u^T u / out            second moment `[rank, rank]`, carried to today's basis by P = Q^T Q_before
    M <- b1 M P^T + (1 - b1) u (V^1/2 + eps)^-1       first moment of the preconditioned step
    B <- B - lr (M R^-T + decay B)

b1 = 0.9, b2 = 0.999, both corrected for their start; eps = 1e-6. All unmagnified gradients together are clipped to norm 1. Under
(A, B) -> (T A, B T^-1) Q turns by an orthogonal matrix, u, V and M turn along, and B A moves by the same matrix.

As in the authors' code the mass of V that leaves with the old basis is not added back. `train.clip` acts on the plain gradients
before this, and depends on the split: set `clip: null` for the exact invariance.

The surprise: M lives in a basis that turns with the *other* factor, so the state holds that factor's last basis, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from veneer.plan.counts import Counted
from veneer.train.config import TrainConfig
from veneer.train.optim import FlatParameters, FlatState, Pair, factors_alone, groups_of, optimizer

BETAS = (0.9, 0.999)
EPS = 1e-6
LARGEST = 1.0
"""Norm of all unmagnified gradients together, from which on they are scaled down."""


def basis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Q `[n, rank]` and the pseudo-inverse of R `[rank, rank]` of a factor `[n, rank]`; zero where the factor is."""
    q, r = torch.linalg.qr(factor)
    return q, torch.linalg.pinv(r)


def corrected(decay: float, step: int) -> float:
    """The decay of step 1, 2, ... with which a mean that starts at zero needs no further correction.

    >>> corrected(0.9, 1)
    0.0
    """
    return decay * (1 - decay ** (step - 1)) / (1 - decay**step)


def moments(u: Tensor, turn: Tensor, first: Tensor, second: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """M `[n, rank]` and V `[rank, rank]` after the unmagnified gradient u; `turn` is P."""
    slow, fast = corrected(BETAS[1], step), corrected(BETAS[0], step)
    second = slow * turn @ second @ turn.t() + (1 - slow) * u.t() @ u / u.shape[0]
    values, vectors = torch.linalg.eigh((second + second.t()) / 2)
    scaled = u @ vectors / (values.clamp_min(0).sqrt() + EPS) @ vectors.t()
    return fast * first @ turn.t() + (1 - fast) * scaled, second


def _state_bytes(trained: Sequence[Counted]) -> int:
    """A first moment and a basis a number, and one `[rank, rank]` moment a factor."""
    squares = sum(min(tensor.shape[0], tensor.shape[-1]) ** 2 for tensor in trained)
    return 4 * (2 * sum(tensor.numbers for tensor in trained) + squares)


@optimizer("lora_rite", state=_state_bytes, paper="2410.20625")
def lora_rite(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """Adaptive moments in the basis of the other factor: the step does not depend on the split into A and B."""
    factors_alone(parameters, "lora_rite")
    return LoRARite(parameters, config)


class LoRARite(FlatState):
    """State of a buffer: `mean` like it, `basis` like it (the last Q of these factors), `square` for each factor."""

    def __init__(self, parameters: FlatParameters, config: TrainConfig) -> None:
        super().__init__(groups_of(parameters, config), {"lr": config.lr, "weight_decay": config.weight_decay})
        self._parameters = parameters

    def fresh(self, buffer: Tensor) -> dict[str, Tensor]:
        squares = sum(pair.a.shape[0] ** 2 for pair in self._parameters.pairs())
        return {
            "mean": torch.zeros_like(buffer),
            "basis": torch.zeros_like(buffer),
            "square": buffer.new_zeros(squares),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        parameters, buffers = self._parameters, self._parameters.buffers
        for buffer in buffers.values():
            if not self.state[buffer]:
                self.state[buffer] |= {"step": torch.zeros(()), **self.fresh(buffer)}
            self.state[buffer]["step"] += 1
        step = int(self.state[buffers["A"]]["step"])
        means, bases = self._state_views("mean"), self._state_views("basis")
        work = [_Work(pair, *basis(pair.a.t()), *basis(pair.b)) for pair in parameters.pairs()]
        clip = _clip(work)
        start = 0
        for item in work:
            part, rank = item.pair.part, item.pair.a.shape[0]
            squares = slice(start, start + rank**2)
            start += rank**2
            sides = (
                ("B", item.grad_b, item.q_a, item.r_a, means[part, "B"], bases[part, "A"].t()),
                ("A", item.grad_a, item.q_b, item.r_b, means[part, "A"].t(), bases[part, "B"]),
            )
            for name, grad, q, r, mean, last in sides:
                square = self.state[buffers[name]]["square"][squares].view(rank, rank)
                turned, grown = moments(grad @ r * clip, q.t() @ last, mean, square, step)
                mean.copy_(turned)
                square.copy_(grown)
                grad.copy_(turned @ r.t())
                last.copy_(q)
        for group in self.param_groups:
            (buffer,) = group["params"]
            buffer.mul_(1 - group["lr"] * group["weight_decay"]).sub_(buffer.grad, alpha=group["lr"])
        return None

    def _state_views(self, name: str) -> dict[tuple[int, str], Tensor]:
        """(part, "A" or "B") -> what the state keeps of it under `name`, in the factor's shape `[rank, in]` or `[out, rank]`."""
        found = self._parameters.views(lambda buffer: self.state[buffer][name])
        return {key: view.flatten(1) for key, view in found.items()}


@dataclass(frozen=True, eq=False)
class _Work:
    """One pair with the bases of both factors: Q, and the pseudo-inverse of R."""

    pair: Pair
    q_a: Tensor
    r_a: Tensor
    q_b: Tensor
    r_b: Tensor

    @property
    def grad_a(self) -> Tensor:
        """A's gradient the way round of B's, `[in, rank]`."""
        assert self.pair.grad_a is not None
        return self.pair.grad_a.t()

    @property
    def grad_b(self) -> Tensor:
        assert self.pair.grad_b is not None
        return self.pair.grad_b


def _clip(work: Sequence[_Work]) -> Tensor:
    """The factor that brings all unmagnified gradients together to norm `LARGEST`, at most 1."""
    unmagnified = [u for w in work for u in (w.grad_b @ w.r_a, w.grad_a @ w.r_b)]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(u) for u in unmagnified]))
    factor: Tensor = (LARGEST / norm).clamp_max(1.0)
    return factor
