"""Adapters of loralib, the LoRA paper's own code (`lora.lora_state_dict`), read from safetensors.

Keys are `<path>.lora_A` and `<path>.lora_B`. The file knows neither alpha nor the kinds of layers, so the caller says them; a
rank or targets that are given are checked.

A MergedLinear holds one update per enabled part of a fused projection: A `[k r, in]`, B `[k out/n, r]`, and
delta_j = alpha/r B_j A_j on the rows of part j. Here it becomes one plain LoRA of rank k r, with B block-diagonal and zero rows
where a part is not enabled.

The surprise: its released files are pickles, which are never opened here; `torch.load(..., weights_only=True)` and
`safetensors.torch.save_file` turn them into what is read.
"""

from __future__ import annotations

import os
import re
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
    alpha: float,
    rank: int | None = None,
    targets: Sequence[str] | None = None,
    merged: Mapping[str, Sequence[bool]] | None = None,
    embeddings: Sequence[str] = (),
    storage: Literal["linear", "conv1d"] = "linear",
) -> Adapter:
    """The adapter in a safetensors file with loralib's names. Everything that does not fit is one FormatError.

    alpha       loralib's lora_alpha: the scale is alpha / rank
    rank        what every layer must have, if given
    targets     last names of the adapted modules ("c_attn"), if given: each must be in the file, and nothing else may be
    merged      names of MergedLinear modules -> which parts are enabled: {"c_attn": (True, False, True)}. It can't be
                guessed: q and v look like q and k
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
    if not found.factors and not found.problems:
        found.problems.append("no tensor in it is called PATH.lora_A or PATH.lora_B")
    if found.problems:
        raise FormatError(
            f"{file} does not fit what was said about it:\n{listed(sorted(found.problems))}",
            help="save lora_state_dict(model); for a MergedLinear say `merged`, for an embedding `embeddings`",
        )
    return Adapter(_spec(parts, found, alpha), tuple(parts), Provenance(extra={"from": "loralib"}))


def _sorted(tensors: Mapping[str, Tensor], targets: Sequence[str] | None) -> _Found:
    found = _Found(problems=first_non_finite(tensors))
    for key, tensor in tensors.items():
        target, _, leaf = key.rpartition(".")
        if not target or leaf not in ("lora_A", "lora_B", "bias"):
            found.problems.append(f"'{key}' is not a factor of a LoRA")
        elif leaf == "bias":
            found.biases[target] = tensor
        elif targets is None or _is_named(target, targets):
            found.factors.setdefault(target, {})[leaf] = tensor
        else:
            found.problems.append(f"'{key}' is none of the targets {', '.join(targets)}")
    for name in targets or ():
        if not any(_is_named(target, (name,)) for target in found.factors):
            found.problems.append(f"'{name}' was named as a target, but no tensor is there")
    return found


def _plain(
    target: str, tensors: Mapping[str, Tensor], rank: int | None, mask: Sequence[bool] | None, problems: list[str]
) -> dict[str, Tensor] | None:
    """A and B of a plain LoRA, or None with the reason in `problems`."""
    missing = {"lora_A", "lora_B"} - tensors.keys()
    if missing:
        problems.append(f"{target} lacks {', '.join(sorted(missing))}")
        return None
    a, b = tensors["lora_A"], tensors["lora_B"]
    enabled = 1 if mask is None else sum(mask)
    shapes = f"{target}: A is {list(a.shape)} and B is {list(b.shape)}"
    if a.dim() != 2 or b.dim() != 2 or 0 in (*a.shape, *b.shape):
        problems.append(f"{shapes}, expected matrices")
    elif not enabled or a.shape[0] != b.shape[1] * enabled or b.shape[0] % enabled:
        said = "one layer" if mask is None else f"{enabled} of {len(mask)} parts enabled"
        problems.append(f"{shapes}, which is not {said}")
    elif rank is not None and b.shape[1] != rank:
        problems.append(f"{target}: the rank is {b.shape[1]}, {rank} was given")
    else:
        return {"A": a, "B": b if mask is None else _block_diagonal(b, mask, b.shape[1])}
    return None


def _block_diagonal(b: Tensor, mask: Sequence[bool], rank: int) -> Tensor:
    """`[k out/n, r]` to `[out, k r]`: block j on the rows of the j-th enabled part."""
    height = b.shape[0] // sum(mask)
    whole = b.new_zeros(height * len(mask), rank * sum(mask))
    for j, part in enumerate(i for i, on in enumerate(mask) if on):
        whole[part * height : (part + 1) * height, j * rank : (j + 1) * rank] = b[j * height : (j + 1) * height]
    return whole


def _spec(parts: Sequence[Part], found: _Found, alpha: float) -> LoRA:
    """A LoRA whose scale is alpha / r at every target, r loralib's own, also where parts were laid side by side."""
    wide = {p.target: p.tensors["A"].shape[0] for p in parts if p.kind == "lora" and p.target is not None}
    own = {target: found.factors[target]["lora_B"].shape[1] for target in wide}
    rank = max(own.values())
    keys = {target: "^" + re.escape(target) for target in wide}
    return LoRA(
        rank=rank,
        alpha=alpha,
        targets=tuple(wide),
        rank_pattern={keys[t]: r for t, r in wide.items() if r != rank},
        alpha_pattern={keys[t]: alpha * r / own[t] for t, r in wide.items() if r != own[t]},
        bias="lora_only" if found.biases else "none",
    )


def _is_named(target: str, names: Sequence[str]) -> bool:
    return any(target == name or target.endswith(f".{name}") for name in names)


def _by_name(table: Mapping[str, Sequence[bool]], target: str) -> Sequence[bool] | None:
    for name, value in table.items():
        if _is_named(target, (name,)):
            return value
    return None
