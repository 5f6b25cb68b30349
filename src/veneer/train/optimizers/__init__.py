"""Optimisers over the flat buffers of `train/optim.py`: one file each, found by name.

`train: {optimizer: NAME}` in a run file. A file declares what its state weighs, for the planner.
"""

from __future__ import annotations

from functools import cache

from veneer.registry import Registry, discover
from veneer.train.optim import OPTIMIZERS, Optimizer

__all__ = ["OPTIMIZERS", "Optimizer", "load_all"]


@cache
def load_all() -> Registry[Optimizer]:
    """Every optimiser by its name. The first call imports the files of this folder."""
    discover(__name__)
    return OPTIMIZERS
