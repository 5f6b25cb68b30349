"""The index of a checkpoint in several files: which file has which tensor, and everything that is wrong with it.

The index and the files have to agree to the tensor. Readers that take whatever a file has let the last file win where two have
a tensor of one name, and go on without one that is not where the index puts it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.errors import FormatError, listed

INDEX = "model.safetensors.index.json"


def weight_map(index: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from a parsed index of `folder`."""
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise FormatError(f"{folder}: the index has no weight_map of names to files", help="fetch it again")
    return where


def strays(where: Mapping[str, str], folder: Path) -> dict[str, str]:
    """File name -> why it can't be read, for files that an index names."""
    wrong = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            wrong[name] = f"'{name}' is not the name of a safetensors file of this folder"
        elif not (folder / name).is_file():
            wrong[name] = f"{name} is missing"
    return wrong


def misplaced(where: Mapping[str, str], found: Mapping[str, Collection[str]]) -> list[str]:
    """Where an index and its files differ; `found` has the tensor names of every file that could be read."""
    problems = [
        f"'{tensor}' is not in {name}, where the index puts it"
        for tensor, name in where.items()
        if name in found and tensor not in found[name]
    ]
    for name, tensors in found.items():
        problems += [f"'{tensor}' in {name} is not in the index" for tensor in tensors if where.get(tensor) != name]
    return problems


def twins(found: Mapping[str, Collection[str]]) -> list[str]:
    """Tensors that several files have, where no index says which of them counts."""
    first: dict[str, str] = {}
    return [
        f"'{tensor}' is in {first[tensor]} and in {name}"
        for name, tensors in found.items()
        for tensor in tensors
        if first.setdefault(tensor, name) != name
    ]


def refuse(folder: Path, problems: Sequence[str]) -> None:
    """FormatError where there are any."""
    if problems:
        raise FormatError(f"{folder} is not a whole checkpoint:\n{listed(problems)}", help="fetch it again")
