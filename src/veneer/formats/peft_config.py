"""adapter_config.json: ranks, alphas, patterns and targets, said so that PEFT computes our scales at our targets.

PEFT: scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, where `rank_pattern` and `alpha_pattern` may replace r and
lora_alpha per module. A pattern's key matches as `(.*\\.)?(KEY)$`, the first hit wins, and PEFT ignores unknown keys in silence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, PositiveInt

from veneer.adapter import Adapter, Part
from veneer.methods import Method, PeftForm
from veneer.types import effective_scale

RULES = {False: "alpha/r", True: "alpha/sqrt(r)"}
"""use_rslora -> our name of the rule."""

HONOURED = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out", "bias", "layers_to_transform", "layers_pattern",
    "trainable_token_indices", "init_lora_weights", "init_weights", "init_ia3_weights", "r", "lora_alpha", "use_rslora",
    "rank_pattern", "alpha_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "use_dora", "num_transformer_submodules",
    "token_dim", "num_attention_heads", "num_layers", "num_virtual_tokens", "tinit", "tfinal", "total_step", "mask_type",
    "random_seed", "oft_block_size", "use_cayley_neumann", "eps", "module_dropout", "save_projection", "projection_prng_key",
    "velora_config",
}  # fmt: skip
"""Keys that are read, or that only say how training began or was arranged."""

CHANGES_THE_FUNCTION = {
    "layer_replication", "use_qalora", "lora_bias", "kasa_config", "monteclora_config", "arrow_config", "use_bdlora",
    "megatron_config", "coft",
}  # fmt: skip
"""Keys that make another function of the same tensors. Only their empty value is read."""


class Containers(BaseModel):
    """What is taken apart before a method looks at it; a method's own fields have their types there."""

    model_config = ConfigDict(strict=True, extra="ignore")

    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int | list[bool]] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    tinit: int | None = None
    tfinal: int | None = None
    total_step: int | None = None
    num_layers: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None


def target_modules(targets: Sequence[str], decoder: re.Pattern[str]) -> list[str] | str:
    """A list where no longer path can end in one of the names, else a regular expression for exactly these.

    A list entry `fc` would also match `block.fc`. Paths of the decoder families start at the root, so for them a list is exact,
    and more readers understand it.
    """
    names = list(dict.fromkeys(targets))
    if all(decoder.fullmatch(name) for name in names):
        return names
    return "|".join(re.escape(name) for name in names)


def ranked_config(adapter: Adapter, own: Sequence[Part]) -> dict[str, Any]:
    """r, lora_alpha, use_rslora and the patterns that give each part its rank and its scale."""
    spec = cast(Method, adapter.spec)
    rule = spec.model_dump()["scaling"]
    rslora = rule == RULES[True]
    ranks = {p.target: p.tensors["A"].shape[0] for p in own if p.target is not None}
    alphas = {t: _alpha(spec, t, rank) for t, rank in ranks.items()}
    rank = _usual(list(ranks.values()), spec.model_dump()["rank"])
    alpha = _usual(list(alphas.values()), spec.model_dump()["alpha"])
    return {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": rslora,
        "rank_pattern": {_anchored(t): r for t, r in ranks.items() if r != rank},
        "alpha_pattern": {_anchored(t): a for t, a in alphas.items() if a != alpha},
        "init_lora_weights": True,
    }


def ranked_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of rank and scale. PEFT's defaults are r = 8 and lora_alpha = 8."""
    return {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "scaling": RULES[bool(config.get("use_rslora", False))],
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
    }


def check_ranked(spec: Method, parts: Sequence[Part], problems: list[str]) -> None:
    """The ranks in the config must be those of the tensors, and every pattern must match a target."""
    own, dump = [p for p in parts if p.kind == spec.kind and p.target is not None], spec.model_dump()
    for part in own:
        assert part.target is not None
        a, b = part.tensors["A"], part.tensors["B"]
        if a.dim() < 2 or (a.dim() > 2) != (part.host == "conv") or b.dim() != 2 or a.shape[0] != b.shape[1]:
            problems.append(
                f"{part.target}: A is {list(a.shape)} and B is {list(b.shape)}, expected [r, in] and [out, r]"
            )
        elif a.shape[0] != spec.rank_at(part.target):
            problems.append(f"{part.target} has rank {a.shape[0]}, the config says {spec.rank_at(part.target)}")
        for name, tensor in part.tensors.items():
            if name not in ("A", "B") and tensor.shape != b.shape[:1]:
                problems.append(f"{part.target}: {name} is {list(tensor.shape)}, expected {list(b.shape[:1])}")
        if ("bias" in part.tensors) != bool(dump.get("lora_bias", False)):
            problems.append(f"{part.target}: lora_bias is {dump.get('lora_bias')}, and the tensors say otherwise")
    for key in [*dump["rank_pattern"], *dump["alpha_pattern"]]:
        if not any(re.match(rf"(.*\.)?({key})$", p.target or "") for p in own):
            problems.append(f"the pattern '{key}' matches no target")


def check_fields(config: Mapping[str, Any], form: PeftForm, problems: list[str]) -> list[str]:
    """Refuse keys that change the function in ways we don't have; return the names of those that are merely unknown."""
    for key in sorted(CHANGES_THE_FUNCTION - set(form.fields.values())):
        if config.get(key):
            problems.append(f"{key} = {config[key]!r} is not something veneer can honour")
    for table in ("rank_pattern", "alpha_pattern"):
        for key in config.get(table) or {}:
            try:
                re.compile(key)
            except re.error as error:
                problems.append(f"{table}: '{key}' is not a regular expression: {error}")
    known = HONOURED | CHANGES_THE_FUNCTION | set(form.fields.values()) | set(form.when)
    return sorted(key for key, value in config.items() if key not in known and value)


def _alpha(spec: Method, target: str, rank: int) -> float:
    """The alpha that gives our scale under PEFT's rule."""
    dump = spec.model_dump()
    if dump["scaling"] in RULES.values():
        for key, value in dump["alpha_pattern"].items():
            if re.match(rf"(.*\.)?({key})$", target):
                return float(value)
        return float(dump["alpha"])
    return spec.scale(target, rank) / effective_scale(RULES[False], 1.0, rank)


def _usual(values: Sequence[Any], own: Any) -> Any:
    """The method's own value where any target has it, else the most common one."""
    return own if own in values else Counter(values).most_common(1)[0][0]


def _anchored(target: str) -> str:
    return f"^{re.escape(target)}"
