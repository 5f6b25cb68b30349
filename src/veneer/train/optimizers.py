"""Optimisers beyond AdamW, each over the same flat buffers.

lora_fa       A stays as it started and B's gradient is projected: g_B <- s^-2 g_B (A A^T + 1e-8 I)^-1, so that a plain step
              moves the weight by the full gradient projected on A's rows; arXiv 2308.03303.
adamw8bit     AdamW with both moments in 8 bits, blocks of 256 numbers with one absmax each; arXiv 2110.02861. Buffers under 4,096
              numbers stay in fp32.
adamw_mapped  AdamW with both moments in a memory-mapped file, updated in chunks: the page cache holds what fits and the disk
              the rest. Bitwise the plain optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError, ResourceError
from veneer.ops.four_bit import dynamic_code
from veneer.train.config import TrainConfig
from veneer.train.optim import OPTIMIZERS, FlatParameters, FlatState, groups_of

CHUNK = 1 << 20
"""Numbers updated at a time: 16 MB of parameter, gradient and moments."""

BLOCK = 256
SMALL = 4096
DAMPING = 1e-8


@OPTIMIZERS.register("lora_fa")
def lora_fa(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """AdamW on the projected gradient of B; A never moves."""
    if "A" not in parameters.buffers:
        raise ConfigError("lora_fa needs a method with factors A and B", help="use optimizer: adamw")
    return _LoRAFA(parameters, config)


class _LoRAFA(torch.optim.AdamW):
    def __init__(self, parameters: FlatParameters, config: TrainConfig) -> None:
        groups = [{"params": [b], "ratio": 0.0 if n == "A" else 1.0} for n, b in parameters.buffers.items()]
        super().__init__(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self._parameters = parameters

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for a, grad_b, scale in self._parameters.low_rank_pairs():
            gram = a @ a.t() + DAMPING * torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
            grad_b.copy_(torch.linalg.solve(gram, grad_b.t()).t() / scale**2)
        super().step(closure)
        return None


class _FlatAdamW(FlatState):
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
            for part in _chunks(buffer.numel()):
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


class MappedAdamW(_FlatAdamW):
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


@OPTIMIZERS.register("adamw_mapped")
def adamw_mapped(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """AdamW whose moments live in a file of the run directory."""
    if folder is None:
        raise ConfigError("adamw_mapped needs a run directory for its file")
    return MappedAdamW(parameters, config, folder)


class AdamW8bit(_FlatAdamW):
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


@OPTIMIZERS.register("adamw8bit")
def adamw8bit(parameters: FlatParameters, config: TrainConfig, folder: Path | None) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits."""
    return AdamW8bit(parameters, config)


def _chunks(size: int) -> Iterator[slice]:
    for start in range(0, size, CHUNK):
        yield slice(start, min(start + CHUNK, size))
