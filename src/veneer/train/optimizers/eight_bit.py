"""AdamW with both moments in 8 bits, blocks of 256 numbers with one absmax each; arXiv 2110.02861.

Buffers under 4,096 numbers stay in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.ops.four_bit import dynamic_code
from veneer.plan.counts import Counted
from veneer.train.config import TrainConfig
from veneer.train.optim import FlatParameters, optimizer
from veneer.train.optimizers._chunked import ChunkedAdamW

BLOCK = 256
SMALL = 4096


class AdamW8bit(ChunkedAdamW):
    """Moments as 8-bit codes: the signed dynamic map for the first, its positive half at twice the resolution for the second."""

    def fresh(self, buffer: Tensor) -> dict[str, Tensor]:
        if buffer.numel() < SMALL:
            return {"exp_avg": torch.zeros_like(buffer), "exp_avg_sq": torch.zeros_like(buffer)}
        blocks = -(-buffer.numel() // BLOCK)
        found: dict[str, Tensor] = {}
        for name, code in (("exp_avg", dynamic_code()), ("exp_avg_sq", dynamic_code(signed=False))):
            zero = int((code == 0).nonzero()[0])
            found[name] = torch.full((buffer.numel(),), zero, dtype=torch.uint8)
            found[f"{name}_absmax"] = torch.zeros(blocks)
        return found

    def open(self, state: dict[str, Any], part: slice) -> tuple[Tensor, Tensor]:
        if state["exp_avg"].dtype != torch.uint8:
            return state["exp_avg"][part], state["exp_avg_sq"][part]
        first, second = (self._read(state, n, part, s) for n, s in (("exp_avg", True), ("exp_avg_sq", False)))
        return first, second

    def close(self, state: dict[str, Any], part: slice, first: Tensor, second: Tensor) -> None:
        if state["exp_avg"].dtype == torch.uint8:
            self._write(state, "exp_avg", part, first, True)
            self._write(state, "exp_avg_sq", part, second, False)

    @staticmethod
    def _read(state: dict[str, Any], name: str, part: slice, signed: bool) -> Tensor:
        values: Tensor = dynamic_code(signed=signed)[state[name][part].int()]
        absmax = state[f"{name}_absmax"][part.start // BLOCK : -(-part.stop // BLOCK)]
        scales: Tensor = absmax.repeat_interleave(BLOCK)[: values.numel()]
        return values * scales

    @staticmethod
    def _write(state: dict[str, Any], name: str, part: slice, values: Tensor, signed: bool) -> None:
        size = values.numel()
        padded = torch.nn.functional.pad(values, (0, -size % BLOCK)).view(-1, BLOCK)
        absmax = padded.abs().amax(dim=1)
        scaled = (padded / absmax.clamp_min(1e-38)[:, None]).flatten()[:size]
        code = dynamic_code(signed=signed)
        middles = (code[1:] + code[:-1]) / 2
        state[name][part] = torch.bucketize(scaled, middles).to(torch.uint8)
        state[f"{name}_absmax"][part.start // BLOCK : -(-part.stop // BLOCK)] = absmax


def _codes(trained: Sequence[Counted]) -> int:
    """One byte for each moment, and one fp32 absmax for 256 of them."""
    numbers = sum(tensor.numbers for tensor in trained)
    return 2 * (numbers + 4 * -(-numbers // BLOCK)) if numbers >= SMALL else 8 * numbers


@optimizer("adamw8bit", state=_codes, paper="2110.02861")
def adamw8bit(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits."""
    return AdamW8bit(parameters, config)
