"""Which precision to compute in: bf16 where this processor multiplies it faster than fp32, measured once and remembered.

The surprise: many processors accept bf16 and emulate it at a tenth of the speed, so asking the hardware what it supports is
not enough.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch

from veneer.errors import ConfigError
from veneer.files import cache_folder
from veneer.models.cache import read_json, remember
from veneer.registry import did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ROWS, WIDTH, COLUMNS = 256, 512, 1024
ROUNDS = 5


def resolve(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a name stands for; "auto" is bfloat16 where it is faster on this machine, else float32."""
    if isinstance(dtype, torch.dtype) and dtype in NAMES:
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type != "cpu" or bfloat16_is_faster() else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}", help=did_you_mean(str(dtype), ["auto", *DTYPES]))
    return DTYPES[str(dtype)]


def bfloat16_is_faster() -> bool:
    """Whether bf16 products take less time than fp32 ones here. Measured once per machine and torch version."""
    remembered = cache_folder() / "dtype.json"
    key = f"{_processor()} torch {torch.__version__}"
    known = read_json(remembered) if remembered.exists() else {}
    if key not in known:
        seconds = {name: _seconds(dtype) for name, dtype in DTYPES.items()}
        known[key] = seconds
        remember(remembered, known)
    return bool(known[key]["bfloat16"] < known[key]["float32"])


def _seconds(dtype: torch.dtype) -> float:
    """The fastest of a few products; the first one, which sets things up, does not count."""
    x, weight = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(COLUMNS, WIDTH, dtype=dtype)
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _processor() -> str:
    """The processor's name, so that a cache folder on a network disk serves several machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
