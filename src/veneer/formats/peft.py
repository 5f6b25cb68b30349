"""PEFT's adapter folders, in both directions: adapter_config.json and adapter_model.safetensors (peft 0.21).

What is written makes PEFT reproduce exactly our targets and our effective scale: the list of targets is explicit (a regular
expression where a list could match more), ranks and alphas that differ are keyed by anchored full names. What PEFT cannot say is
left to `veneer.json`; a method that PEFT lacks gets no adapter_config.json at all, so PEFT refuses rather than misreads.

The surprise: reading needs no model. Targets, ranks and kinds are all in the tensors' names and shapes, and the config has to
agree with them; what does not agree is one error that lists everything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from veneer.adapter import Adapter, Part, Provenance
from veneer.errors import FormatError, complaints, listed
from veneer.formats.peft_config import (
    Containers,
    check_fields,
    check_ranked,
    ranked_config,
    ranked_fields,
    target_modules,
)
from veneer.formats.peft_experts import pack, parameter_of, unpack
from veneer.formats.peft_names import PREFIX, TOKEN_ROWS, Sorted, natural, sort_keys
from veneer.methods import Method, PeftForm, load_all

CONFIG = "adapter_config.json"
R = TypeVar("R", bound=BaseModel)
TENSORS = "adapter_model.safetensors"
_DECODER = re.compile(
    r"(model\.layers\.\d+\..+|transformer\.h\.\d+\..+|gpt_neox\.layers\.\d+\..+"
    r"|model\.embed_tokens|model\.norm|transformer\.w[tp]e|transformer\.ln_f|gpt_neox\.embed_in|lm_head|embed_out)"
)

CHANGES_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of init_lora_weights (pissa_niter_N too) with which PEFT changes the base's weights. The others leave them alone."""
_ON_RESIDUAL = "if the base you name is that changed base, set init_lora_weights to true in the config"
_CONVERT = (
    "save it from PEFT with model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START), where START is the "
    f"adapter saved before its first step with init_lora_weights=True; {_ON_RESIDUAL}"
)
_LOFTQ = f"merge it with PEFT, on the base it was trained on; {_ON_RESIDUAL}"

_EMBEDDINGS = ("model.embed_tokens", "transformer.wte", "gpt_neox.embed_in")
_VOCABULARY = frozenset({"embed_tokens", "wte", "embed_in", "lm_head", "embed_out"})
"""The last names of input and output embeddings: PEFT's `save_embedding_layers` writes them whole, where they grew too."""


def expressible(adapter: Adapter) -> bool:
    """Whether PEFT's format has words for all of `adapter`."""
    spec = cast(Method, adapter.spec)
    form = spec.peft
    if form is None or not _experts_are_alike(adapter, spec):
        return False
    if form.level == "module" and any(p.kind == spec.kind and p.host not in form.hosts for p in adapter.parts):
        return False
    return all(
        p.kind in (spec.kind, "token_rows") or (p.kind == "full" and _full_is_sayable(p, spec)) for p in adapter.parts
    )


def to_peft(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter that is `expressible`."""
    spec = cast(Method, adapter.spec)
    form = spec.peft
    assert form is not None
    own = [p for p in adapter.parts if p.kind == spec.kind]
    dump = spec.model_dump(mode="json")
    parameters = dump.get("parameters", ())
    experts = [p for p in own if parameter_of(p.target, parameters)]
    own_targets = frozenset(p.target for p in own if p.target is not None)
    tensors: dict[str, Tensor] = {}
    for part in adapter.parts:
        if part not in experts:
            tensors.update(_named(part, spec, form, own_targets))
    tensors.update({f"{PREFIX}{name}": tensor for name, tensor in pack(experts, parameters).items()})
    config = _common_config(adapter, form, own)
    config.update({key: None if dump[ours] == [] else dump[ours] for ours, key in form.fields.items()})
    if form.level == "module":
        plain = [p.target for p in own if p.target is not None and p not in experts]
        config["target_modules"] = target_modules(plain, _DECODER)
        config["fan_in_fan_out"] = any(p.host == "conv1d" for p in own)
        config.update(_companion_config(adapter, spec, own_targets))
    if form.ranked:
        config.update(ranked_config(adapter, own))
    if form.config is not None:
        config.update(form.config(spec, own))
    return config, tensors


@dataclass
class _Reading:
    """What has been understood so far, and what has not."""

    parts: list[Part] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Adapter:
    """The adapter in a PEFT folder. `where` names the folder in errors."""
    method = _method_for(config, where)
    form = method.peft
    assert form is not None
    _check_start(config, where)
    _checked(Containers, config, where)
    found = sort_keys(tensors, form)
    reading = _Reading()
    if "parameters" in form.fields:
        found.modules = unpack(found.modules, config, reading.problems)
    reading.problems += [f"'{key}' is not a tensor of {method.kind}" for key in found.strange]
    reading.problems += [f"'{key}' stands for a tensor that is there already" for key in found.twice]
    ignored = check_fields(config, form, reading.problems)
    _own_parts(method, form, config, found, reading)
    _companion_parts(config, found, reading)
    fields = _fields(form, config, reading)
    if reading.problems:
        raise _damaged(where, reading.problems)
    spec = _checked(method, fields, where)
    if form.ranked:
        check_ranked(spec, reading.parts, reading.problems)
    if reading.problems:
        raise _damaged(where, reading.problems)
    extra: dict[str, Any] = {"from": "peft"}
    if ignored:
        extra["peft_keys_without_effect"] = ignored
    if untied := _untied_embedding(config, reading.parts):
        extra["input_side_only"] = untied
    if config.get("task_type"):
        extra["task_type"] = config["task_type"]
    base_name = config.get("base_model_name_or_path") or None
    return Adapter(spec, tuple(reading.parts), Provenance(base_name=base_name, extra=extra))


def _checked(record: type[R], fields: Mapping[str, Any], where: str) -> R:
    try:
        return record(**fields)
    except ValidationError as error:
        raise _damaged(where, complaints(error.errors())) from error


def _damaged(where: str, problems: Sequence[str]) -> FormatError:
    return FormatError(
        f"{where} is not a whole adapter:\n{listed(sorted(set(problems)))}", help="fetch it again, or save it again"
    )


def _method_for(config: Mapping[str, Any], where: str) -> type[Method]:
    wanted = config.get("peft_type")
    forms = [m for m in load_all().values() if m.peft is not None and m.peft.peft_type == wanted]
    for method in forms:
        assert method.peft is not None
        if all(config.get(key, False) == value for key, value in method.peft.when.items()):
            return method
    known = sorted({m.peft.peft_type for m in load_all().values() if m.peft is not None})
    raise FormatError(
        f"{where}/{CONFIG} has peft_type {wanted!r}, which veneer does not have",
        help=f"known: {', '.join(known)}",
    )


def _check_start(config: Mapping[str, Any], where: str) -> None:
    """Refuse factors that belong on a residual: these starts take their own first update out of the base.

    PEFT computes the residual again when it loads such a folder, or (LoRA-GA, CorDA) cannot; on the plain base the factors
    are another function. `path_initial_model_for_weight_conversion` writes the same adapter for the plain base.
    """
    start = str(config.get("init_lora_weights", True)).lower()
    if config.get("peft_type") == "LORA" and start.startswith(CHANGES_THE_BASE):
        raise FormatError(
            f"{where}/{CONFIG} has init_lora_weights '{start}': its factors belong on the base less their first update, "
            "not on the base itself",
            help=_CONVERT if start != "loftq" else _LOFTQ,
        )


def _own_parts(
    method: type[Method], form: PeftForm, config: Mapping[str, Any], found: Sorted, reading: _Reading
) -> None:
    conv1d = bool(config.get("fan_in_fan_out"))
    if form.level == "model":
        _part(method, form, config, None, found.shared, reading)
        return
    if form.shared:
        shared = {ours: found.shared[theirs] for ours, theirs in form.shared.items() if theirs in found.shared}
        if len(shared) == len(form.shared):
            reading.parts.append(Part(method.kind, method.site, None, shared))
        elif found.shared or not form.remade(config):
            missing = sorted(set(form.shared.values()) - set(found.shared))
            reading.problems.append(f"the shared {', '.join(missing)} are missing: save with save_projection")
    for path in natural(found.modules):
        _part(method, form, config, path, found.modules[path], reading, conv1d=conv1d)
    if not found.modules:
        reading.problems.append(f"no tensor of {method.kind} is in the file")


def _part(
    method: type[Method],
    form: PeftForm,
    config: Mapping[str, Any],
    path: str | None,
    tensors: Mapping[str, Tensor],
    reading: _Reading,
    *,
    conv1d: bool = False,
) -> None:
    on_embedding = bool(set(tensors) & (set(form.embedding.values()) - set(form.tensors.values())))
    names = form.embedding if on_embedding else form.tensors
    place = path or "the file"
    if form.decode is None:
        missing = sorted(set(names.values()) - set(tensors))
        stray = sorted(set(tensors) - {*names.values(), *form.optional.values()})
        reading.problems += [f"{place} lacks {name}" for name in missing]
        reading.problems += [f"{place} has {name}, which does not belong there" for name in stray]
        if missing or stray:
            return
        both = {**names, **form.optional}
        own = {ours: tensors[theirs] for ours, theirs in both.items() if theirs in tensors}
    else:
        try:
            own = form.decode(tensors, config)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reading.problems.append(f"{place}: the tensors do not fit the config ({error})")
            return
    host = "embedding" if on_embedding else "conv1d" if conv1d else "linear"
    if "A" in own and own["A"].dim() > 2:
        host = "conv"
        own = {name: t if name == "A" else t.flatten(1) if name == "B" else t.flatten() for name, t in own.items()}
    if method.site == "override":
        host = "embedding"
    reading.parts.append(Part(method.kind, method.site, path, own, cast(Any, host)))


def _companion_parts(config: Mapping[str, Any], found: Sorted, reading: _Reading) -> None:
    saved = list(config.get("modules_to_save") or ())
    biases = config.get("bias", "none") != "none"
    for path in natural(found.whole):
        tensors = found.whole[path]
        wanted = any(path.endswith(name) for name in saved)  # PEFT's rule: `norm` takes input_layernorm too
        copied = path in found.modules or path.rpartition(".")[2] in _VOCABULARY or _is_tied_copy(path, config, found)
        if wanted or copied or (biases and set(tensors) == {"bias"}):
            reading.parts.append(Part("full", "override", path, dict(tensors)))
        else:
            reading.problems.append(f"'{PREFIX}{path}' is saved whole, but modules_to_save does not name it")
    for name in saved:
        if not any(path.endswith(name) for path in found.whole):
            reading.problems.append(f"modules_to_save names '{name}', but the file has no tensor of it")
    indices = config.get("trainable_token_indices")
    for path in natural(found.rows):
        chosen = indices if isinstance(indices, list) else _by_suffix(indices or {}, path)
        rows = found.rows[path]
        if chosen is None or rows.dim() != 2 or rows.shape[0] != len(chosen):
            reading.problems.append(f"{path} has {tuple(rows.shape)} token rows, trainable_token_indices says {chosen}")
            continue
        ids = torch.tensor(chosen, dtype=torch.int64)
        reading.parts.append(Part("token_rows", "override", path, {"rows": rows, "tokens": ids}, "embedding"))
    if indices and not found.rows:
        reading.problems.append("trainable_token_indices is set, but the file has no token rows")


def _untied_embedding(config: Mapping[str, Any], parts: Sequence[Part]) -> str | None:
    """A whole embedding that PEFT would replace on the input side only, also where the base's head is tied to it.

    Only `modules_to_save` makes such a copy; what PEFT writes into the base's own embedding reaches a tied head.
    """
    whole = [p.target for p in parts if p.kind == "full" and p.target is not None and "weight" in p.tensors]
    if config.get("ensure_weight_tying") or any(path in ("lm_head", "embed_out") for path in whole):
        return None
    saved = tuple(config.get("modules_to_save") or ())
    return next((path for path in whole if path in _EMBEDDINGS and path.endswith(saved)), None)


def _is_tied_copy(path: str, config: Mapping[str, Any], found: Sorted) -> bool:
    """Whether this is the head that PEFT stores beside a whole embedding when it keeps the two tied."""
    weight = found.whole[path].get("weight")
    twins = [own["weight"] for other, own in found.whole.items() if other != path and "weight" in own]
    return bool(config.get("ensure_weight_tying")) and weight is not None and any(torch.equal(weight, t) for t in twins)


def _by_suffix(table: Mapping[str, Any], path: str) -> list[int] | None:
    for name, value in table.items():
        if path == name or path.endswith(f".{name}"):
            return list(value)
    return None


def _fields(form: PeftForm, config: Mapping[str, Any], reading: _Reading) -> dict[str, Any]:
    """The method's own fields as the config says them."""
    own = [p for p in reading.parts if p.kind not in ("full", "token_rows") or form.peft_type == "TRAINABLE_TOKENS"]
    fields = {ours: config[key] for ours, key in form.fields.items() if config.get(key) is not None}
    if form.level == "module" and form.peft_type != "TRAINABLE_TOKENS":
        packed = config.get("target_parameters") or ()
        targets = tuple(p.target for p in own if p.target is not None and parameter_of(p.target, packed) is None)
        fields["targets"] = targets
        gone = [
            key for key, mask in (config.get("rank_pattern") or {}).items() if isinstance(mask, list) and not any(mask)
        ]
        named = (*targets, *(key.removesuffix(".lora_E") for key in gone))
        reading.problems += _target_problems(config.get("target_modules"), named)
    if form.ranked:
        fields.update(ranked_fields(config))
        fields["modules_to_save"] = tuple(config.get("modules_to_save") or ())
        rows = [p for p in reading.parts if p.kind == "token_rows"]
        if len(rows) == 1:
            fields["trainable_tokens"] = tuple(rows[0].tensors["tokens"].tolist())
    if form.parse is not None:
        fields.update(form.parse(config, own))
    return fields


def _target_problems(wanted: object, targets: Sequence[str]) -> list[str]:
    """A list of names, a regular expression, or `all-linear`: each entry must match, each target be matched."""
    if wanted is None or wanted == "all-linear":
        return []
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            return [f"target_modules is not a regular expression: {error}"]
        return [f"{t} has tensors, but target_modules does not match it" for t in targets if not pattern.fullmatch(t)]
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        return [f"target_modules is {wanted!r}, expected names"]

    names = set(wanted)
    hits = {target: {name for name in _endings(target) if name in names} for target in targets}
    named = set().union(*hits.values())
    problems = [f"target_modules names '{n}', but no tensor is there" for n in wanted if n not in named]
    return problems + [f"{t} has tensors, but target_modules does not name it" for t in targets if not hits[t]]


def _endings(target: str) -> list[str]:
    """`a.b.c`, `b.c`, `c`: the names that a list may give a module."""
    pieces = target.split(".")
    return [".".join(pieces[start:]) for start in range(len(pieces))]


def _named(part: Part, spec: Method, form: PeftForm, own_targets: frozenset[str]) -> dict[str, Tensor]:
    """The part's tensors under PEFT's keys."""
    if part.kind == "full" and spec.kind != "full":
        infix = ".base_layer" if part.target in own_targets else ""
        return {f"{PREFIX}{part.target}{infix}.{name}": tensor for name, tensor in part.tensors.items()}
    if part.kind == "token_rows" and spec.kind != "token_rows":
        return {f"{PREFIX}{part.target}.{TOKEN_ROWS}": part.tensors["rows"]}
    if part.target is None and form.level == "module":
        return {f"base_model.{form.shared[name]}": tensor for name, tensor in part.tensors.items()}
    prefix = "" if part.target is None else f"{PREFIX}{part.target}."
    if form.encode is not None:
        return {f"{prefix}{name}": tensor for name, tensor in form.encode(part.tensors).items()}
    names = {**(form.embedding if part.host == "embedding" else form.tensors), **form.optional}
    tensors = _as_convolutions(part.tensors) if part.host == "conv" else part.tensors
    return {f"{prefix}{names[name]}": tensor for name, tensor in tensors.items()}


def _as_convolutions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B `[out, r, 1, 1]` and a magnitude `[1, out, 1, 1]`, with as many axes as A has; a bias stays a vector."""
    ones = (1,) * (tensors["A"].dim() - 2)
    views = {"B": lambda t: t.reshape(*t.shape, *ones), "magnitude": lambda t: t.reshape(1, -1, *ones)}
    return {name: views[name](t) if name in views else t for name, t in tensors.items()}


def _common_config(adapter: Adapter, form: PeftForm, own: Sequence[Part]) -> dict[str, Any]:
    decoder = all(t is not None and _DECODER.fullmatch(t) for t in adapter.targets)
    return {
        "peft_type": form.peft_type,
        "task_type": adapter.provenance.extra.get("task_type") or ("CAUSAL_LM" if decoder else None),
        "base_model_name_or_path": adapter.provenance.base_name,
        "inference_mode": True,
        "auto_mapping": None,
        "revision": None,
        **form.when,
    }


def _companion_config(adapter: Adapter, spec: Method, own_targets: frozenset[str]) -> dict[str, Any]:
    replaced = [p for p in adapter.parts if p.kind == "full" and p.target not in own_targets]
    whole = [p.target for p in replaced if not _is_bias(p)]
    rows = {p.target: p.tensors["tokens"].tolist() for p in adapter.parts if p.kind == "token_rows"}
    found: dict[str, Any] = {"modules_to_save": whole or None}
    if rows and spec.kind != "token_rows":
        found["trainable_token_indices"] = rows
    return found


def _is_bias(part: Part) -> bool:
    return set(part.tensors) == {"bias"}


def _experts_are_alike(adapter: Adapter, spec: Method) -> bool:
    """PEFT's packed experts share r and lora_alpha."""
    dump = spec.model_dump()
    experts = [p for p in adapter.parts if p.kind == spec.kind and parameter_of(p.target, dump.get("parameters", ()))]
    plain = [spec.scale(p.target or "", dump["rank"]) for p in experts]
    return len(set(plain)) < 2 and all(p.tensors["A"].shape[0] == dump["rank"] for p in experts)


def _full_is_sayable(part: Part, spec: Method) -> bool:
    if _is_bias(part):
        return bool(spec.model_dump().get("bias", "none") != "none")
    return "modules_to_save" in type(spec).model_fields
