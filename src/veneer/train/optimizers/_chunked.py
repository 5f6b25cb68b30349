"""AdamW chunk by chunk, with moments that a subclass brings and takes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from veneer.train.config import TrainConfig
from veneer.train.optim import FlatParameters, FlatState, groups_of

CHUNK = 1 << 20
"""Numbers updated at a time: 16 MB of parameter, gradient and moments."""


class ChunkedAdamW(FlatState):
    """AdamW on flat fp32 buffers, chunk by chunk, with moments that a subclass brings and takes back."""

    def __init__(self, parameters: FlatParameters, config: TrainConfig) -> None:
        super().__init__(groups_of(parameters, config), {"lr": config.lr, "weight_decay": config.weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            (buffer,) = group["params"]
            if buffer.grad is None:
                continue
            state = self.state[buffer]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state |= self.fresh(buffer)
            for part in chunks(buffer.numel()):
                first, second = self.open(state, part)
                # The functional form counts its own step; every chunk is handed the same count.
                count = state["step"].clone()
                torch._fused_adamw_(
                    [buffer[part]],
                    [buffer.grad[part]],
                    [first],
                    [second],
                    [],
                    [count.add_(1)],
                    lr=group["lr"],
                    beta1=0.9,
                    beta2=0.999,
                    weight_decay=group["weight_decay"],
                    eps=1e-8,
                    amsgrad=False,
                    maximize=False,
                )
                self.close(state, part, first, second)
            state["step"].add_(1)
        return None

    def open(self, state: dict[str, Any], part: slice) -> tuple[Tensor, Tensor]:
        """Both moments of a chunk in fp32."""
        raise AssertionError("abstract")

    def close(self, state: dict[str, Any], part: slice, first: Tensor, second: Tensor) -> None:
        """Take both moments of a chunk back."""
        raise AssertionError("abstract")


def chunks(size: int) -> Iterator[slice]:
    """The slices of a buffer of `size` numbers."""
    for start in range(0, size, CHUNK):
        yield slice(start, min(start + CHUNK, size))
