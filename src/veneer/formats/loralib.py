"""Adapters of loralib, the LoRA paper's own code (`lora.lora_state_dict`), read from safetensors.

Keys are `<path>.lora_A` and `<path>.lora_B`. The file knows neither alpha nor r nor the kinds of layers, so the caller says them.

A MergedLinear holds one update per enabled part of a fused projection: A `[k r, in]`, B `[k out/n, r]`, and
delta_j = alpha/r B_j A_j on the rows of part j. Here it becomes one plain LoRA of rank k r, with B block-diagonal and zero rows
where a part is not enabled.

The surprise: its released files are pickles, which are never opened here; `torch.load(..., weights_only=True)` and
`safetensors.torch.save_file` turn them into what is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from veneer.adapter import Adapter, Part, Provenance
from veneer.errors import FormatError, NotFound, listed
from veneer.formats.checkpoint import first_non_finite, open_tensors
from veneer.formats.peft_names import natural
from veneer.methods.lora import LoRA
from veneer.types import HostKind


@dataclass
class _Found:
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def load_loralib(
    path: str | os.PathLike[str],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    merged: Mapping[str, Sequence[bool]] | None = None,
    embeddings: Sequence[str] = (),
    storage: Literal["linear", "conv1d"] = "linear",
) -> Adapter:
    """The adapter in a safetensors file with loralib's names. Everything that does not fit is one FormatError.

    targets     last names of the adapted modules ("c_attn"); each must be in the file, and nothing else may be
    merged      names of MergedLinear modules -> which parts are enabled: {"c_attn": (True, False, True)}
    embeddings  names of adapted embeddings, which look like linear layers in the file
    storage     how the base stores its projections: GPT-2's are "conv1d"
    """
    file = Path(path)
    if not file.is_file():
        raise NotFound(f"there is no file at {file}")
    opened = open_tensors(file)
    tensors = {name: opened.tensor(name).clone() for name in opened.tensors}
    found = _sorted(tensors, targets)
    parts = []
    for target in natural(found.factors):
        mask = _by_name(merged or {}, target)
        plain = _plain(target, found.factors[target], rank, mask, found.problems)
        kind: HostKind = "embedding" if _is_named(target, embeddings) else storage
        if plain is not None:
            parts.append(Part("lora", "weight", target, plain, kind))
    parts += [Part("full", "override", target, {"bias": found.biases[target]}) for target in natural(found.biases)]
    if found.problems:
        raise FormatError(f"{file} does not fit what was said about it:\n{listed(sorted(found.problems))}")
    return Adapter(_spec(parts, rank, alpha), tuple(parts), Provenance(extra={"from": "loralib"}))


def _sorted(tensors: Mapping[str, Tensor], targets: Sequence[str]) -> _Found:
    found = _Found(problems=first_non_finite(tensors))
    for key, tensor in tensors.items():
        target, _, leaf = key.rpartition(".")
        if leaf in ("lora_A", "lora_B") and _is_named(target, targets):
            found.factors.setdefault(target, {})[leaf] = tensor
        elif leaf == "bias":
            found.biases[target] = tensor
        else:
            found.problems.append(f"'{key}' is none of the targets {', '.join(targets)}")
    for name in targets:
        if not any(_is_named(target, (name,)) for target in found.factors):
            found.problems.append(f"'{name}' was named as a target, but no tensor is there")
    return found


def _plain(
    target: str, tensors: Mapping[str, Tensor], rank: int, mask: Sequence[bool] | None, problems: list[str]
) -> dict[str, Tensor] | None:
    """A and B of a plain LoRA, or None with the reason in `problems`."""
    missing = {"lora_A", "lora_B"} - tensors.keys()
    if missing:
        problems.append(f"{target} lacks {', '.join(sorted(missing))}")
        return None
    a, b = tensors["lora_A"], tensors["lora_B"]
    enabled = 1 if mask is None else sum(mask)
    if (
        a.dim() != 2
        or b.dim() != 2
        or b.shape[1] != rank
        or a.shape[0] != rank * enabled
        or b.shape[0] % max(enabled, 1)
    ):
        said = f"r = {rank}" + ("" if mask is None else f" and {enabled} of {len(mask)} parts enabled")
        problems.append(f"{target}: A is {list(a.shape)} and B is {list(b.shape)}, which is not {said}")
        return None
    return {"A": a, "B": b if mask is None else _block_diagonal(b, mask, rank)}


def _block_diagonal(b: Tensor, mask: Sequence[bool], rank: int) -> Tensor:
    """`[k out/n, r]` to `[out, k r]`: block j on the rows of the j-th enabled part."""
    height = b.shape[0] // sum(mask)
    whole = b.new_zeros(height * len(mask), rank * sum(mask))
    for j, part in enumerate(i for i, on in enumerate(mask) if on):
        whole[part * height : (part + 1) * height, j * rank : (j + 1) * rank] = b[j * height : (j + 1) * height]
    return whole


def _spec(parts: Sequence[Part], rank: int, alpha: float) -> LoRA:
    """A LoRA whose scale is alpha / rank at every target, also where parts were laid side by side."""
    own = [p for p in parts if p.kind == "lora" and p.target is not None]
    wide = {p.target: p.tensors["A"].shape[0] for p in own if p.tensors["A"].shape[0] != rank}
    keys = {target: "^" + target.replace(".", r"\.") for target in wide if target is not None}
    return LoRA(
        rank=rank,
        alpha=alpha,
        targets=tuple(p.target for p in own if p.target is not None),
        rank_pattern={keys[t]: r for t, r in wide.items() if t is not None},
        alpha_pattern={keys[t]: alpha * r / rank for t, r in wide.items() if t is not None},
        bias="lora_only" if len(own) < len(parts) else "none",
    )


def _is_named(target: str, names: Sequence[str]) -> bool:
    return any(target == name or target.endswith(f".{name}") for name in names)


def _by_name(table: Mapping[str, Sequence[bool]], target: str) -> Sequence[bool] | None:
    for name, value in table.items():
        if _is_named(target, (name,)):
            return value
    return None
