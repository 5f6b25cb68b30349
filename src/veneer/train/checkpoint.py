"""Everything a run needs to go on bitwise: parameters, moments, random state and the cursor, in one file.

One safetensors file whose header carries the cursor as JSON, put in place by an atomic rename: after a kill there is the old
checkpoint or the new one, never half of each. The order of the data is a function of (seed, epoch), so the cursor is a number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from veneer import files
from veneer.errors import ConfigError, FormatError, ResourceError
from veneer.methods import Regime
from veneer.train.optim import FlatParameters, FlatState

FILE = "state.safetensors"


@dataclass
class Cursor:
    """How far a run has come.

    step         optimiser steps done
    best         lowest held-out loss so far, None before the first evaluation
    best_step    when that was
    stale        evaluations since
    fingerprint  of everything that decides the run: configuration, data, base
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    fingerprint: str = ""


def write(
    folder: Path,
    cursor: Cursor,
    parameters: FlatParameters,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
    regime: Regime | None = None,
) -> None:
    """Put a checkpoint into `folder`, replacing the one before."""
    tensors = {} if regime is None else {f"regime.{name}": t.contiguous() for name, t in regime.state.items()}
    for name, buffer in parameters.buffers.items():
        tensors[f"parameters.{name}"] = buffer.detach()
        for key, value in optimizer.state[buffer].items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
    for name, generator in generators.items():
        tensors[f"generator.{name}"] = generator.get_state()
    data = save(tensors, metadata={"cursor": json.dumps(asdict(cursor))})
    write_bytes(folder / FILE, data)


def read(
    folder: Path,
    parameters: FlatParameters,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
    fingerprint: str,
    regime: Regime | None = None,
) -> Cursor:
    """Restore the state that `write` saved. A checkpoint of another run is refused."""
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            cursor = Cursor(**json.loads(file.metadata()["cursor"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is not a checkpoint: {error}", help="start again without --resume") from error
    if cursor.fingerprint != fingerprint:
        raise ConfigError(
            f"{path} belongs to another run: configuration, data or base have changed since step {cursor.step}",
            help="restore them, or start again without --resume in a new folder",
        )
    for name, buffer in parameters.buffers.items():
        with torch.no_grad():
            buffer.copy_(tensors[f"parameters.{name}"])
        prefix = f"optimizer.{name}."
        _restore(optimizer, buffer, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for name, generator in generators.items():
        generator.set_state(tensors[f"generator.{name}"])
    if regime is not None:
        regime.load({k.removeprefix("regime."): v for k, v in tensors.items() if k.startswith("regime.")})
    return cursor


def _restore(optimizer: torch.optim.Optimizer, buffer: Tensor, saved: Mapping[str, Tensor]) -> None:
    """Put saved moments back: into the tensors that the optimiser made (they may be mapped), else as they are."""
    if isinstance(optimizer, FlatState):
        optimizer.state[buffer] = optimizer.fresh(buffer) | {"step": torch.zeros(())}
        for name, value in saved.items():
            optimizer.state[buffer][name].copy_(value)
    else:
        optimizer.state[buffer] = dict(saved)


def exists(folder: Path) -> bool:
    """Whether there is anything to resume."""
    return (folder / FILE).is_file()


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path` all at once; a full disk or a kill leaves what was there."""
    try:
        files.write(path, data)
    except OSError as error:
        raise ResourceError(
            f"{path} could not be written: {error.strerror}; what was there before is intact",
            help="free some space or choose another --out, then run again with --resume",
        ) from error


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for a JSON value."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
