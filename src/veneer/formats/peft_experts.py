"""LoRA on 3-D expert parameters (PEFT's `target_parameters`), one part per expert here, packed there.

PEFT stacks the experts of one parameter: A `[E r, in]` read as `[E, r, in]` (expert slowest), B `[out, r E]` read as
`[out, r, E]` (expert fastest). Here expert e is a part of its own at `<module>.<parameter>.<e>`, with plain A and B.

The surprise: the parameter's name is not in PEFT's keys. Several parameters of one module nest in the order in which the module
registers them, the first innermost: `experts.base_layer.lora_A` is gate_up_proj, `experts.lora_A` is down_proj.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Part

_REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""The order in which transformers' expert modules register their parameters; the file cannot say it."""
_A, _B = "lora_A.weight", "lora_B.weight"


def unpack(
    modules: Mapping[str, dict[str, Tensor]], config: Mapping[str, Any], problems: list[str]
) -> dict[str, dict[str, Tensor]]:
    """The modules of a file with every packed parameter replaced by one entry per expert."""
    wanted = [str(name) for name in config.get("target_parameters") or ()]
    if not wanted:
        return dict(modules)
    found: dict[str, dict[str, Tensor]] = {}
    nests: dict[str, dict[int, dict[str, Tensor]]] = {}
    for path, tensors in modules.items():
        module = re.sub(r"(\.base_layer)+$", "", path)
        if _of_module(module, wanted):
            nests.setdefault(module, {})[path.count(".base_layer")] = tensors
        else:
            found[path] = tensors
    for name in wanted:
        if not any(name in _of_module(module, wanted) for module in nests):
            problems.append(f"target_parameters names '{name}', but no tensor is there")
    for module, depths in nests.items():
        names = _in_order([name.rpartition(".")[2] for name in _of_module(module, wanted)])
        if names is None or sorted(depths) != list(range(len(names))):
            problems.append(f"{module} has {len(depths)} packed parameters, whose names cannot be told from the file")
            continue
        for depth, tensors in depths.items():
            parameter = f"{module}.{names[len(names) - 1 - depth]}"
            found.update(_experts(parameter, tensors, int(config.get("r", 8)), problems))
    return found


def pack(parts: Sequence[Part], parameters: Sequence[str]) -> dict[str, Tensor]:
    """PEFT's tensors of the expert parts, by what follows `base_model.model.`."""
    stacks: dict[str, list[Part]] = {}
    for part in parts:
        stacks.setdefault(parameter_of(part.target, parameters) or "", []).append(part)
    packed: dict[str, Tensor] = {}
    by_module: dict[str, list[str]] = {}
    for parameter in stacks:
        module, _, name = parameter.rpartition(".")
        by_module.setdefault(module, []).append(name)
    for module, names in by_module.items():
        ordered = _in_order(names) or sorted(names)
        for depth, name in enumerate(reversed(ordered)):
            experts = sorted(stacks[f"{module}.{name}"], key=lambda p: int((p.target or "").rpartition(".")[2]))
            path = module + ".base_layer" * depth
            packed[f"{path}.{_A}"] = torch.cat([p.tensors["A"] for p in experts])
            packed[f"{path}.{_B}"] = torch.stack([p.tensors["B"] for p in experts], dim=2).flatten(1)
    return packed


def parameter_of(target: str | None, parameters: Sequence[str]) -> str | None:
    """The full name of the 3-D parameter that `target` is one expert of, or None."""
    parameter, _, expert = (target or "").rpartition(".")
    if not expert.isdigit():
        return None
    return parameter if any(parameter == name or parameter.endswith(f".{name}") for name in parameters) else None


def _of_module(module: str, wanted: Sequence[str]) -> list[str]:
    """The wanted parameters that this module carries."""
    owners = [(name, name.rpartition(".")[0]) for name in wanted]
    return [name for name, owner in owners if owner and (module == owner or module.endswith(f".{owner}"))]


def _in_order(names: Sequence[str]) -> list[str] | None:
    """Names in registration order, or None where it isn't known."""
    if len(names) == 1:
        return list(names)
    return sorted(names, key=_REGISTERED.index) if set(names) <= set(_REGISTERED) else None


def _experts(
    parameter: str, tensors: Mapping[str, Tensor], rank: int, problems: list[str]
) -> dict[str, dict[str, Tensor]]:
    a, b = tensors.get(_A), tensors.get(_B)
    if a is None or b is None:
        problems.append(f"{parameter} lacks {_B if b is None else _A}")
        return {}
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
        problems.append(f"{parameter}: A is {list(a.shape)} and B is {list(b.shape)}, not experts of rank {rank}")
        return {}
    count = a.shape[0] // rank
    stacked, wide = a.view(count, rank, -1), b.view(b.shape[0], rank, count)
    return {f"{parameter}.{e}": {_A: stacked[e].clone(), _B: wide[:, :, e].contiguous()} for e in range(count)}
