"""loralib's state dict (microsoft/LoRA, arXiv 2106.09685): `path.lora_A`, `path.lora_B`, and nothing else.

Alpha is not in the file and has to be given; the rank is in the shapes, and a given one must agree. Only a safetensors copy of the
state dict is read, never the pickle.

The surprise: `MergedLinear` packs q|k|v in one layer and adapts only some parts of it: A `[rank * enabled, in]`, B
`[out / parts * enabled, rank]`. It is read exactly, as one LoRA of the fused layer: A as it is, B block by block with zeros
elsewhere, and alpha multiplied with the rank so that the scale stays alpha / rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from veneer.adapter import Adapter, Part, Provenance
from veneer.errors import FormatError, listed
from veneer.formats.checkpoint import first_non_finite, open_tensors
from veneer.methods.lora import LoRA

ENDINGS = (".lora_A", ".lora_B")


def load_loralib(
    path: Path, *, alpha: float, rank: int | None = None, enabled: Sequence[bool] = (True, False, True)
) -> Adapter:
    """The adapter in a loralib state dict saved as safetensors.

    alpha    loralib's `lora_alpha`: the scale is alpha / rank
    rank     what the file must have, if given
    enabled  which parts of a fused layer are adapted (loralib's `enable_lora`)
    """
    file = open_tensors(path)
    tensors = {name: file.tensor(name).clone() for name in file.tensors}
    pairs, problems = _pairs(tensors)
    problems += first_non_finite(tensors)
    found: dict[str, tuple[Tensor, Tensor, int]] = {}
    for target, (a, b) in pairs.items():
        try:
            found[target] = _factors(a, b, enabled)
        except FormatError as error:
            problems.append(f"{target}: {error.message}")
    ranks = sorted({own for _, _, own in found.values()})
    problems += [f"the rank is {own}, {rank} was given" for own in ranks if rank is not None and own != rank]
    if not pairs and not problems:
        problems.append("no tensor in it is called PATH.lora_A or PATH.lora_B")
    if problems:
        raise FormatError(
            f"{path} is not a loralib state dict:\n{listed(problems)}", help="save lora_state_dict(model)"
        )
    return _adapter(found, alpha, ranks[-1])


def _pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        target, dot, kind = name.rpartition(".")
        if f"{dot}{kind}" not in ENDINGS or not target:
            problems.append(f"'{name}' is not a factor of a LoRA")
        elif tensor.dim() != 2 or 0 in tensor.shape or not tensor.is_floating_point():
            problems.append(f"'{name}' is {tensor.dtype} {list(tensor.shape)}, expected a matrix of numbers")
        elif f"{target}{ENDINGS[0]}" not in tensors or f"{target}{ENDINGS[1]}" not in tensors:
            problems.append(f"'{target}' has only one of its two factors")
        else:
            pairs[target] = tensors[f"{target}{ENDINGS[0]}"], tensors[f"{target}{ENDINGS[1]}"]
    return pairs, problems


def _factors(a: Tensor, b: Tensor, enabled: Sequence[bool]) -> tuple[Tensor, Tensor, int]:
    """A `[rank, in]`, B `[out, rank]` of the whole layer, and loralib's own rank."""
    own = b.shape[1]
    if a.shape[0] == own:
        return a, b, own
    active = [index for index, on in enumerate(enabled) if on]
    if a.shape[0] != own * len(active) or b.shape[0] % len(active):
        raise FormatError(
            f"A is {list(a.shape)} and B is {list(b.shape)}, which fit neither one layer nor {len(active)} parts of a fused one"
        )
    size = b.shape[0] // len(active)
    wide = torch.zeros(size * len(enabled), a.shape[0], dtype=b.dtype)
    for block, part in enumerate(active):
        rows = b[block * size : (block + 1) * size]
        wide[part * size : (part + 1) * size, block * own : (block + 1) * own] = rows
    return a, wide, own


def _adapter(found: Mapping[str, tuple[Tensor, Tensor, int]], alpha: float, rank: int) -> Adapter:
    """One LoRA over all targets; those of another stored rank get a rank and an alpha of their own."""
    ranks = {target: a.shape[0] for target, (a, _, _) in found.items() if a.shape[0] != rank}
    alphas = {t: alpha * found[t][0].shape[0] / found[t][2] for t in found if found[t][0].shape[0] != found[t][2]}
    spec = LoRA(
        rank=rank,
        alpha=alpha,
        targets=tuple(found),
        rank_pattern={_anchored(t): own for t, own in ranks.items()},
        alpha_pattern={_anchored(t): own for t, own in alphas.items()},
    )
    parts = tuple(Part("lora", "weight", target, {"A": a, "B": b}) for target, (a, b, _) in found.items())
    return Adapter(spec, parts, Provenance(extra={"from": "loralib"}))


def _anchored(target: str) -> str:
    """A pattern key that matches this target only (patterns are regular expressions after an optional prefix)."""
    return "^" + target.replace(".", r"\.")
