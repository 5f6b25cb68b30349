"""AdamW with both moments in a memory-mapped file, updated in chunks: the page cache holds what fits and the disk the rest.

Bitwise the plain optimiser. It is what a paged optimiser is for, without unified memory: state that is pushed out under pressure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError, ResourceError
from veneer.train.config import TrainConfig
from veneer.train.optim import FlatParameters, optimizer
from veneer.train.optimizers._chunked import ChunkedAdamW


class MappedAdamW(ChunkedAdamW):
    """Moments in one file, mapped and shared; `folder` holds it."""

    def __init__(self, parameters: FlatParameters, config: TrainConfig, folder: Path) -> None:
        super().__init__(parameters, config)
        self._path = folder / "moments.bin"
        self._used = 0
        total = 8 * parameters.count
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("wb") as file:
                file.truncate(total)
        except OSError as error:
            raise ResourceError(
                f"{self._path} ({total / 1e6:.0f} MB) could not be made: {error.strerror}",
                help="free some space, or use optimizer: adamw",
            ) from error
        self._all = torch.from_file(str(self._path), shared=True, size=2 * parameters.count, dtype=torch.float32)

    def fresh(self, buffer: Tensor) -> dict[str, Tensor]:
        size = buffer.numel()
        first, second = self._all[self._used : self._used + 2 * size].split(size)
        self._used += 2 * size
        return {"exp_avg": first, "exp_avg_sq": second}

    def open(self, state: dict[str, Any], part: slice) -> tuple[Tensor, Tensor]:
        return state["exp_avg"][part], state["exp_avg_sq"][part]

    def close(self, state: dict[str, Any], part: slice, first: Tensor, second: Tensor) -> None:
        """They are views of the file already."""


@optimizer("adamw_mapped", state=lambda trained: 0)
def adamw_mapped(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """AdamW whose moments live in a file of the run directory."""
    if folder is None:
        raise ConfigError("adamw_mapped needs a run directory for its file")
    return MappedAdamW(parameters, config, folder)
