"""The names in PEFT's tensor file, in both directions (peft 0.21).

    base_model.model.<module path>.<tensor>            tensors of a module
    base_model.<tensor>                                 shared by all modules (VeRA's projections)
    prompt_embeddings                                   prompt methods
    base_model.model.<module path>.weight               a module saved whole, or a bias
    base_model.model.<path>.token_adapter.trainable_tokens_delta

Older files carry wrappers (`_orig_mod.`, `_fsdp_wrapped_module.`, `modules_to_save.<adapter>.`) and the adapter's name
(`lora_A.default.weight`); both are read past. The surprise: an embedding's factors and DoRA's magnitudes have no `.weight`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.methods import PeftForm

PREFIX = "base_model.model."
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.")
_SAVED_MODULE = re.compile(r"\.modules_to_save(?:\.[^.]+)?(?=\.(?:weight|bias)$)")


@dataclass
class Sorted:
    """The keys of a file by what they are.

    modules   module path -> PEFT suffix -> tensor, for the method itself
    shared    suffix -> tensor, without a module
    rows      module path -> replaced embedding rows
    whole     module path -> "weight" or "bias" -> tensor saved whole
    strange   keys that mean nothing to us
    """

    modules: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    shared: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    strange: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)


def suffixes(form: PeftForm) -> set[str]:
    """Everything that may follow a module path in a key of this method."""
    return {*form.tensors.values(), *form.embedding.values(), *form.optional.values()}


def sort_keys(tensors: Mapping[str, Tensor], form: PeftForm) -> Sorted:
    """Take every key apart. Nothing is dropped: what is not understood is in `strange`."""
    found = Sorted()
    patterns = [(suffix, _pattern(suffix)) for suffix in sorted(suffixes(form), key=len, reverse=True)]
    shared = [(suffix, _pattern(suffix)) for suffix in form.shared.values()]
    for key, tensor in _without_bystanders(tensors).items():
        name = _WRAPPERS.sub("", key)
        inner = name.removeprefix(PREFIX)
        own = _match(inner, patterns)
        if own is not None:
            _put(
                found.modules[own[0]] if own[0] or form.level == "module" else found.shared, own[1], tensor, found, key
            )
        elif (top := _match(name.removeprefix("base_model."), shared)) is not None and not top[0]:
            _put(found.shared, top[1], tensor, found, key)
        elif (row := _match(inner, [(TOKEN_ROWS, _pattern(TOKEN_ROWS))])) is not None:
            _put(found.rows, row[0], tensor, found, key)
        elif inner.endswith((".weight", ".bias")):
            path, _, leaf = _SAVED_MODULE.sub("", inner).rpartition(".")
            _put(found.whole[path.removesuffix(".base_layer")], leaf, tensor, found, key)
        else:
            found.strange.append(key)
    return found


def _without_bystanders(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file without what PEFT writes beside a module saved whole when it also saves embedding layers: its copy, twice.

    `lm_head.modules_to_save.weight` is what was trained, `lm_head.original_module.weight` what was there before, and
    `lm_head.weight` the first once more.
    """
    saved = {_SAVED_MODULE.sub("", key): key for key in tensors if _SAVED_MODULE.search(key)}

    def stands_by(key: str) -> bool:
        if ".original_module." in key:
            return key.replace(".original_module.", ".") in saved
        return key in saved and torch.equal(tensors[key], tensors[saved[key]])

    return {key: tensor for key, tensor in tensors.items() if not stands_by(key)}


def natural(paths: Iterable[str]) -> list[str]:
    """Module paths in counting order: layers.2 before layers.10."""
    return sorted(paths, key=lambda path: [(s.isdigit(), int(s) if s.isdigit() else 0, s) for s in path.split(".")])


def _put(place: dict[str, Tensor], name: str, tensor: Tensor, found: Sorted, key: str) -> None:
    if name in place:
        found.twice.append(key)
    place[name] = tensor


def _pattern(suffix: str) -> re.Pattern[str]:
    """`lora_A.weight` also as `lora_A.<adapter>.weight`; names without `.weight` also with it."""
    name = suffix.removesuffix(".weight")
    weight = r"\.weight" if suffix.endswith(".weight") else r"(?:\.weight)?"
    return re.compile(rf"(?:^|(?P<path>.*)\.){re.escape(name)}(?:\.(?!weight$)[^.]+)?{weight}$")


def _match(name: str, patterns: Iterable[tuple[str, re.Pattern[str]]]) -> tuple[str, str] | None:
    for suffix, pattern in patterns:
        hit = pattern.match(name)
        if hit is not None:
            return hit["path"] or "", suffix
    return None
