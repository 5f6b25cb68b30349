"""What a run tells its watchers. The loop yields these; the run directory, the progress bar and TensorBoard render them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Preflight:
    """What is about to happen, before the first step.

    targets      (entry, layers or count as text, parameters) of the coverage table
    memory       category -> predicted bytes
    warnings     each with its reason
    """

    rows: int
    tokens: int
    label_share: float
    steps: int
    trained_parameters: int
    base_parameters: int
    dtype: str
    tokens_per_pass: int
    recomputed_blocks: int
    targets: tuple[tuple[str, str, int], ...]
    memory: Mapping[str, int]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One optimiser step. `loss` is nats per label token, `tokens` the useful tokens in the step, `seconds` its wall time."""

    step: int
    total: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    label_tokens: int
    seconds: float
    tokens_per_second: float
    peak_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses after a step, nats per label token; None where there is no such data."""

    step: int
    eval_loss: float | None
    general_loss: float | None
    is_best: bool


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk."""

    step: int


@dataclass(frozen=True)
class Finished:
    """The run ended: `reason` is "done", "patience" or "stopped"."""

    step: int
    reason: str


Event: TypeAlias = Preflight | Step | Evaluation | Saved | Finished
