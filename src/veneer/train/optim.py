"""Optimisers over flat buffers: an adapter's parameters, gradients and moments are one stretch of memory per group.

AdamW (arXiv 1711.05101) on one flat fp32 tensor is one kernel call whatever the number of layers, and so are the gradient norm
and the check for non-finite values. LoRA+ (arXiv 2402.12354) is a matter of groups: B learns `ratio` times faster than A and than
whatever is trained beside them; at ratio 1 the result is bitwise the plain optimiser's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Adapter, Part
from veneer.errors import ConfigError, TrainingError
from veneer.methods import method_of
from veneer.registry import Registry
from veneer.train.config import TrainConfig


@dataclass(frozen=True)
class _Slot:
    part: int
    name: str
    group: str
    shape: torch.Size


class FlatParameters:
    """The trained tensors of an adapter, gathered into one fp32 buffer per group.

    "A"; "B" with whatever else a low-rank part trains (DoRA's magnitude); "rest" for all other parts.
    """

    def __init__(self, adapter: Adapter, device: torch.device) -> None:
        self._adapter = adapter
        self._slots = [slot for i, part in enumerate(adapter.parts) for slot in _slots(adapter, i, part)]
        if not self._slots:
            raise TrainingError("this adapter has no tensor to train", help="check method.targets")
        self.buffers: dict[str, Tensor] = {}
        for group in sorted({slot.group for slot in self._slots}):
            pieces = [
                adapter.parts[s.part].tensors[s.name].reshape(-1).float() for s in self._slots if s.group == group
            ]
            self.buffers[group] = torch.cat(pieces).to(device).requires_grad_()

    @property
    def count(self) -> int:
        """Trained numbers."""
        return sum(buffer.numel() for buffer in self.buffers.values())

    def adapter(self) -> Adapter:
        """The adapter on views of the buffers, so that gradients flow back into them."""
        return self._with(self._views(lambda buffer: buffer))

    def snapshot(self) -> Adapter:
        """A copy of the adapter as it is now."""
        return self.adapter().map_tensors(lambda t: t.detach().clone().cpu())

    def grad_norm(self) -> Tensor:
        """Euclidean norm of the whole gradient, fp32."""
        norms = [torch.linalg.vector_norm(b.grad) for b in self.buffers.values() if b.grad is not None]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total

    def dead(self) -> list[str]:
        """Targets of parts with factors whose gradients are all exactly zero: nothing of them reaches the loss."""
        alive = {part for (part, _), gradient in self._views(_gradient).items() if bool(gradient.any())}
        parts = {slot.part for slot in self._slots if slot.group != "rest"} - alive
        return [str(self._adapter.parts[part].target) for part in sorted(parts)]

    def low_rank_pairs(self) -> list[tuple[Tensor, Tensor, float]]:
        """(A, gradient of B, scale) of every part with both factors, as views."""
        assert all(buffer.grad is not None for buffer in self.buffers.values())
        values, gradients = self._views(lambda b: b.detach()), self._views(_gradient)
        found = []
        for i, part in enumerate(self._adapter.parts):
            if (i, "A") in values and (i, "B") in values and part.target is not None:
                a = values[i, "A"]
                found.append((a, gradients[i, "B"], self._adapter.spec.scale(part.target, a.shape[0])))
        return found

    def _views(self, source: Callable[[Tensor], Tensor]) -> dict[tuple[int, str], Tensor]:
        """(part, name) -> the tensor's view of what `source` gives for its buffer."""
        views: dict[tuple[int, str], Tensor] = {}
        for group, buffer in self.buffers.items():
            slots = [s for s in self._slots if s.group == group]
            pieces = torch.split(source(buffer), [s.shape.numel() for s in slots])
            views |= {(s.part, s.name): piece.view(s.shape) for s, piece in zip(slots, pieces, strict=True)}
        return views

    def _with(self, views: Mapping[tuple[int, str], Tensor]) -> Adapter:
        parts = []
        for i, part in enumerate(self._adapter.parts):
            own = {name: views.get((i, name), tensor) for name, tensor in part.tensors.items()}
            parts.append(replace(part, tensors=own))
        return replace(self._adapter, parts=tuple(parts))


def _gradient(buffer: Tensor) -> Tensor:
    assert buffer.grad is not None
    return buffer.grad


def _slots(adapter: Adapter, index: int, part: Part) -> list[_Slot]:
    frozen = method_of(adapter, part).frozen()
    return [
        _Slot(index, name, "rest" if "A" not in part.tensors else "A" if name == "A" else "B", tensor.shape)
        for name, tensor in part.tensors.items()
        if name not in frozen and tensor.is_floating_point()
    ]


class FlatState(torch.optim.Optimizer):
    """An optimiser that makes the tensors of its state itself, so that they can live in a mapped file."""

    def fresh(self, buffer: Tensor) -> dict[str, Tensor]:
        """Moments of a buffer that has none yet."""
        raise AssertionError("abstract")


OptimizerFactory = Callable[[FlatParameters, TrainConfig, Path | None], torch.optim.Optimizer]
"""(parameters, configuration, the run's folder for optimisers that keep state on disk) -> optimiser."""

OPTIMIZERS: Registry[OptimizerFactory] = Registry("optimizer")


def groups_of(parameters: FlatParameters, config: TrainConfig) -> list[dict[str, Any]]:
    """Each buffer with its share of the learning rate."""
    if config.lora_plus_ratio != 1.0 and "B" not in parameters.buffers:
        raise ConfigError(
            "train.lora_plus_ratio sets the rate of B over that of A, and this method has neither",
            help="leave it out, or use lora or dora",
        )
    return [
        {"params": [buffer], "ratio": config.lora_plus_ratio if name == "B" else 1.0}
        for name, buffer in parameters.buffers.items()
    ]


@OPTIMIZERS.register("adamw")
def adamw(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """AdamW, betas (0.9, 0.999), fused; with `lora_plus_ratio` the B group learns that much faster."""
    return torch.optim.AdamW(groups_of(parameters, config), lr=config.lr, weight_decay=config.weight_decay, fused=True)


@OPTIMIZERS.register("sgd")
def sgd(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """Plain gradient descent, mostly for tests of laws that hold for it alone."""
    return torch.optim.SGD(groups_of(parameters, config), lr=config.lr, weight_decay=config.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the scheduled rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]


def rate_at(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of optimiser step `step` (from 0) out of `total`: linear warm-up, then the schedule down to 0.

    >>> config = TrainConfig(lr=1.0, warmup=0.0)
    >>> [round(rate_at(s, 4, config), 2) for s in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(1, total - warm)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr
