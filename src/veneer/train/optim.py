"""Optimisers over flat buffers: an adapter's parameters, gradients and moments are one stretch of memory per group.

AdamW (arXiv 1711.05101) on one flat fp32 tensor is one kernel call whatever the number of layers, and so are the gradient norm
and the check for non-finite values. LoRA+ (arXiv 2402.12354) is a matter of groups: B learns `ratio` times faster than A and than
whatever is trained beside them; at ratio 1 the result is bitwise the plain optimiser's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Adapter, Part
from veneer.errors import ConfigError, TrainingError
from veneer.methods import method_of
from veneer.plan.bytes import two_moments
from veneer.plan.counts import Counted
from veneer.registry import Registry
from veneer.train.config import TrainConfig


@dataclass(frozen=True)
class _Slot:
    part: int
    name: str
    group: str
    shape: torch.Size


@dataclass(frozen=True, eq=False)
class Pair:
    """The factors of one update, as matrices: A `[rank, in]`, B `[out, rank]`; no gradient for one that is not trained.

    part     its number among the adapter's parts
    trains_b whether B is trained
    scale    what multiplies B @ A
    """

    part: int
    a: Tensor
    b: Tensor
    grad_a: Tensor | None
    grad_b: Tensor | None
    trains_b: bool
    scale: float


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
        return self._with(self.views(lambda buffer: buffer))

    def snapshot(self) -> Adapter:
        """A copy of the adapter as it is now."""
        return self.adapter().map_tensors(lambda t: t.detach().clone().cpu())

    def detached(self) -> Adapter:
        """The adapter on views of the buffers without gradients: what is written to them is trained on."""
        return self._with(self.views(lambda buffer: buffer.detach()))

    def gradients(self) -> Adapter:
        """The gradients where the trained tensors stand; nothing stands for the frozen ones."""
        views = self.views(lambda buffer: buffer.grad)
        parts = [
            replace(part, tensors={name: views[i, name] for name in part.tensors if (i, name) in views})
            for i, part in enumerate(self._adapter.parts)
        ]
        return replace(self._adapter, parts=tuple(parts))

    def grad_norm(self) -> Tensor:
        """Euclidean norm of the whole gradient, fp32."""
        norms = [torch.linalg.vector_norm(b.grad) for b in self.buffers.values() if b.grad is not None]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total

    def dead(self) -> list[str]:
        """Targets of parts with factors whose gradients are all exactly zero: nothing of them reaches the loss."""
        alive = {part for (part, _), gradient in self.views(lambda buffer: buffer.grad).items() if bool(gradient.any())}
        parts = {slot.part for slot in self._slots if slot.group != "rest"} - alive
        return [str(self._adapter.parts[part].target) for part in sorted(parts)]

    def freeze(self, group: str) -> None:
        """Stop training a group: its tensors stay as the adapter has them, without a gradient or a share in its norm."""
        self.buffers.pop(group, None)
        self._slots = [slot for slot in self._slots if slot.group != group]

    def pairs(self) -> list[Pair]:
        """Both factors of every update of which at least one is trained, and the gradients of those, as views."""
        values, gradients = self.views(lambda buffer: buffer.detach()), self.views(lambda buffer: buffer.grad)
        found = []
        for i, part in enumerate(self._adapter.parts):
            if part.target is None or not {"A", "B"} <= part.tensors.keys() or not values.keys() & {(i, "A"), (i, "B")}:
                continue
            a, b = (values.get((i, name), part.tensors[name]).flatten(1) for name in "AB")
            grad_a, grad_b = (gradients[i, n].flatten(1) if (i, n) in gradients else None for n in "AB")
            scale = self._adapter.spec.scale(part.target, a.shape[0])
            found.append(Pair(i, a, b, grad_a, grad_b, (i, "B") in values, scale))
        return found

    def extras(self) -> list[str]:
        """Trained tensors that are no factor of an update of which both are trained, as "target.name"."""
        of_a, of_b = ({slot.part for slot in self._slots if slot.name == name} for name in "AB")
        others = [s for s in self._slots if s.part not in of_a & of_b or s.name not in ("A", "B")]
        return [f"{self._adapter.parts[s.part].target}.{s.name}" for s in others]

    def views(self, source: Callable[[Tensor], Tensor | None]) -> dict[tuple[int, str], Tensor]:
        """(part, name) -> the tensor's view of what `source` gives for its buffer, where it gives something."""
        views: dict[tuple[int, str], Tensor] = {}
        for group, buffer in self.buffers.items():
            whole = source(buffer)
            if whole is not None:
                slots = [s for s in self._slots if s.group == group]
                pieces = torch.split(whole, [s.shape.numel() for s in slots])
                views |= {(s.part, s.name): piece.view(s.shape) for s, piece in zip(slots, pieces, strict=True)}
        return views

    def _with(self, views: Mapping[tuple[int, str], Tensor]) -> Adapter:
        parts = []
        for i, part in enumerate(self._adapter.parts):
            own = {name: views.get((i, name), tensor) for name, tensor in part.tensors.items()}
            parts.append(replace(part, tensors=own))
        return replace(self._adapter, parts=tuple(parts))


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


Factory = Callable[[FlatParameters, TrainConfig, Path | None], torch.optim.Optimizer]
"""(parameters, configuration, the run's folder for optimisers that keep state on disk) -> optimiser."""


@dataclass(frozen=True)
class Optimizer:
    """What stands behind `train.optimizer: NAME`. Calling it makes one.

    factory  makes the optimiser of a run
    state    trained tensors -> bytes of its state in memory, for the planner
    freezes  groups of parameters ("A") that it leaves as they start
    paper    arXiv number
    """

    factory: Factory
    state: Callable[[Sequence[Counted]], int] = two_moments
    freezes: tuple[str, ...] = ()
    paper: str = ""

    def __call__(self, parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
        for group in self.freezes:
            parameters.freeze(group)
        return self.factory(parameters, config, folder)


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer")


def optimizer(
    name: str,
    *,
    state: Callable[[Sequence[Counted]], int] = two_moments,
    freezes: tuple[str, ...] = (),
    paper: str = "",
) -> Callable[[Factory], Factory]:
    """File a function that makes an optimiser under `name`, with what it costs."""

    def file(factory: Factory) -> Factory:
        OPTIMIZERS.register(name)(Optimizer(factory, state, freezes, paper))
        return factory

    return file


def inverse(gram: Tensor, damping: float) -> Tensor:
    """(gram + damping I)^-1 of a symmetric `[rank, rank]` matrix without negative eigenvalues."""
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    found: Tensor = torch.linalg.inv(gram + damping * eye)
    return found


def factors_alone(parameters: FlatParameters, name: str) -> None:
    """Refuse what an optimiser of pairs cannot move: anything beside A and B, or one of them alone."""
    extras = parameters.extras()
    if extras:
        raise ConfigError(
            f"optimizer {name} moves A and B together, and nothing else; this adapter also trains {extras[0]}"
            + (f" and {len(extras) - 1} more" if len(extras) > 1 else ""),
            help="use optimizer: riemannian or adamw, or a method that trains A and B alone (lora)",
        )


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
