"""AdamW, arXiv 1711.05101, one kernel call a buffer; and plain gradient descent."""

from __future__ import annotations

from pathlib import Path

import torch

from veneer.train.config import TrainConfig
from veneer.train.optim import FlatParameters, groups_of, optimizer


@optimizer("adamw", paper="1711.05101")
def adamw(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """AdamW, betas (0.9, 0.999), fused; with `lora_plus_ratio` the B group learns that much faster."""
    return torch.optim.AdamW(groups_of(parameters, config), lr=config.lr, weight_decay=config.weight_decay, fused=True)


@optimizer("sgd", state=lambda trained: 0)
def sgd(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """Plain gradient descent, mostly for tests of laws that hold for it alone."""
    return torch.optim.SGD(groups_of(parameters, config), lr=config.lr, weight_decay=config.weight_decay)
