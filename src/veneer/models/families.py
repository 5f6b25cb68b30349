"""One row per family of decoders: where the names are in a checkpoint, and what its config.json means.

`decoder_config` reads a config.json (of transformers 4 or 5) into a `DecoderConfig`; `layout` gives the module paths,
which are transformers' own, so adapter files agree with PEFT's. A new family is a new row. The surprise: a value that
would change the arithmetic and that the decoder does not implement is refused by name here, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from veneer.errors import FormatError, Unsupported, listed
from veneer.models.config import DecoderConfig, GroupSpec, Layout, PartSpec, Rope
from veneer.models.rotary import ATTACH, Raw, read_rope
from veneer.registry import Registry
from veneer.types import HostKind

ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Family:
    """One row. Module names are below the layer.

    keys      our config.json key -> the family's, where it differs
    defaults  what transformers takes for an absent key
    biases    which of qkv_bias, o_bias, mlp_bias the checkpoint has: True, or the config.json key that says so
    only      config.json key -> the values that the decoder implements
    more      further DecoderConfig fields, from the raw config
    """

    layer: str
    embed: str
    final_norm: str
    head: str
    qkv: tuple[str, ...]
    o: str
    up: tuple[str, ...]
    down: str
    norms: Mapping[str, str]
    positions: str | None = None
    kind: HostKind = "linear"
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    more: Callable[[Raw], dict[str, Any]] = lambda raw: {}


def _layer_windows(raw: Raw) -> list[bool]:
    """Per layer: does it slide? From `layer_types`, which `_with_layer_types` has filled."""
    unknown = sorted(set(raw["layer_types"]) - {"sliding_attention", "full_attention"})
    if unknown or len(raw["layer_types"]) != raw["num_hidden_layers"]:
        raise Unsupported(
            f"layer_types has {len(raw['layer_types'])} entries for {raw['num_hidden_layers']} layers"
            + (f" and the unknown kinds {', '.join(unknown)}" if unknown else ""),
            help=ATTACH,
        )
    return [kind == "sliding_attention" for kind in raw["layer_types"]]


def _same_window(raw: Raw) -> dict[str, Any]:
    """Mistral, Phi-3: one window for all layers."""
    window = raw.get("sliding_window")
    return {"windows": (window,) * raw["num_hidden_layers"]} if window else {}


def _qwen_windows(raw: Raw) -> dict[str, Any]:
    """Qwen 2 and 3: windows only where `use_sliding_window`, on layers from `max_window_layers` up unless listed."""
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    first, count = raw.get("max_window_layers", 28), raw["num_hidden_layers"]
    kinds = raw.get("layer_types") or [
        "sliding_attention" if window and i >= first else "full_attention" for i in range(count)
    ]
    slides = _layer_windows({**raw, "layer_types": kinds})
    return {"windows": tuple(window if slide else None for slide in slides)} if window and any(slides) else {}


def _gemma(raw: Raw, pattern: int) -> dict[str, Any]:
    """Gemma 2 and 3: every `pattern`-th layer sees everything, the others a window; scores scaled by a set number."""
    kinds = raw.get("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(raw["num_hidden_layers"])
    ]
    slides = _layer_windows({**raw, "layer_types": kinds})
    window = raw.get("sliding_window", 4096)
    return {
        "windows": tuple(window if slide else None for slide in slides),
        "embed_scale": raw["hidden_size"] ** 0.5,
        "attention_scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
    }


def _gemma2(raw: Raw) -> dict[str, Any]:
    return _gemma(raw, 2) | {
        "attention_softcap": raw.get("attn_logit_softcapping", 50.0),
        "logit_softcap": raw.get("final_logit_softcapping", 30.0),
    }


def _gemma3(raw: Raw) -> dict[str, Any]:
    fields = _gemma(raw, raw.get("sliding_window_pattern", 6))
    nested = raw.get("rope_parameters") or {}
    far = {
        "rope_theta": raw.get("rope_theta", 1e6),
        **(nested.get("full_attention") or {}),
        **(raw.get("rope_scaling") or {}),
    }
    near = {"rope_theta": raw.get("rope_local_base_freq", 1e4), **(nested.get("sliding_attention") or {})}
    return fields | {
        "rope": read_rope({**raw, "rope_scaling": None, "rope_parameters": far}),
        "local_rope": read_rope({**raw, "rope_scaling": None, "rope_parameters": near}),
        "local_layers": tuple(window is not None for window in fields["windows"]),
        "logit_softcap": raw.get("final_logit_softcapping"),
    }


def _gpt2(raw: Raw) -> dict[str, Any]:
    scaled = raw.get("scale_attn_weights", True)
    return {"attention_scale": (raw["n_embd"] // raw["n_head"]) ** -0.5 if scaled else 1.0, "rope": Rope()}


def _neox(raw: Raw) -> dict[str, Any]:
    rope = {
        **raw,
        "rope_theta": raw.get("rotary_emb_base", 10000.0),
        "partial_rotary_factor": raw.get("rotary_pct", 0.25),
    }
    return {"block": "parallel" if raw.get("use_parallel_residual", True) else "sequential", "rope": read_rope(rope)}


LLAMA = Family(
    layer="model.layers.{}",
    embed="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    norms={"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048},
    biases={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    only={"sliding_window": (None,)},
)
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def _like_llama(**changes: Any) -> Family:
    """The llama row with changes; `defaults` is merged, so a row says only what is its own."""
    merged = {**LLAMA.defaults, **changes.pop("defaults", {})}
    return Family(
        **{
            **{name: getattr(LLAMA, name) for name in LLAMA.__dataclass_fields__},
            "only": {},
            **changes,
            "defaults": merged,
        }
    )


FAMILIES: Registry[Family] = Registry("decoder family")
FAMILIES["llama"] = LLAMA
FAMILIES["mistral"] = _like_llama(
    biases={},
    only={"layer_types": (None,)},
    defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    more=_same_window,
)
FAMILIES["qwen2"] = _like_llama(
    biases={"qkv_bias": True},
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    more=_qwen_windows,
)
FAMILIES["qwen3"] = _like_llama(
    norms={**LLAMA.norms, **QK_NORMS},
    biases={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    fixed={"qk_norm": "head"},
    more=_qwen_windows,
)
GEMMA = {
    "biases": {"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    "keys": {"hidden_act": "hidden_activation"},
    "only": {"use_bidirectional_attention": (None, False)},
}
GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
FAMILIES["gemma2"] = _like_llama(
    **GEMMA,
    norms=GEMMA_NORMS,
    defaults={**GEMMA_DEFAULTS, "max_position_embeddings": 8192},
    fixed={"norm": "rms1", "post_norms": True},
    more=_gemma2,
)
FAMILIES["gemma3_text"] = _like_llama(
    **{**GEMMA, "only": {"use_bidirectional_attention": (None, False), "attn_logit_softcapping": (None,)}},
    norms={**GEMMA_NORMS, **QK_NORMS},
    defaults={**GEMMA_DEFAULTS, "max_position_embeddings": 131072},
    fixed={"norm": "rms1", "post_norms": True, "qk_norm": "head"},
    more=_gemma3,
)
FAMILIES["phi3"] = _like_llama(
    qkv=("self_attn.qkv_proj",),
    up=("mlp.gate_up_proj",),
    biases={},
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    more=_same_window,
)
FAMILIES["olmo2"] = _like_llama(
    norms={"post_attn_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"} | QK_NORMS,
    biases={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    defaults={"rms_norm_eps": 1e-5},
    only={"clip_qkv": (None,)},
    fixed={"pre_norms": False, "post_norms": True, "qk_norm": "full"},
)
FAMILIES["gpt_neox"] = Family(
    layer="gpt_neox.layers.{}",
    embed="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
    qkv=("attention.query_key_value",),
    o="attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    norms=LLAMA.norms,
    keys={"rms_norm_eps": "layer_norm_eps", "num_key_value_heads": "num_attention_heads"},
    defaults={
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "attention_bias": True,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    fixed={"norm": "layer", "norm_bias": True, "qkv_order": "heads", "gated": False},
    biases={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": True},
    more=_neox,
)
FAMILIES["gpt2"] = Family(
    layer="transformer.h.{}",
    embed="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    head="lm_head",
    qkv=("attn.c_attn",),
    o="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    norms={"attn_norm": "ln_1", "mlp_norm": "ln_2"},
    kind="conv1d",
    keys={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
    defaults={
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "n_positions": 1024,
        "tie_word_embeddings": True,
    },
    fixed={"norm": "layer", "norm_bias": True, "gated": False, "positions": "learned"},
    biases={"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    only={"scale_attn_by_inverse_layer_idx": (None, False), "add_cross_attention": (None, False)},
    more=_gpt2,
)


ONLY: Mapping[str, tuple[Any, ...]] = {"is_causal": (None, True)}
"""`Family.only` of every family."""

PARTIAL = ("phi3", "gpt_neox")
"""Families that turn a part of each head where config.json says so; the others ignore that in transformers."""


def decoder_config(hf_config: Raw) -> DecoderConfig:
    """A checkpoint's config.json as a `DecoderConfig`.

    Raises `Unsupported` for a family or a value outside the table, `FormatError` for missing sizes, all at once.
    """
    name = str(hf_config.get("model_type"))
    if name not in FAMILIES:
        raise Unsupported(f"model type '{name}' is not one of {', '.join(FAMILIES)}", help=ATTACH)
    family = FAMILIES[name]
    raw = {**family.defaults, **hf_config}
    _refuse(name, family, raw)

    def value(key: str) -> Any:
        return raw.get(family.keys.get(key, key))

    hidden, heads = value("hidden_size"), value("num_attention_heads")
    fields: dict[str, Any] = {
        "family": name,
        "hidden": hidden,
        "layers": value("num_hidden_layers"),
        "heads": heads,
        "kv_heads": value("num_key_value_heads") or heads,
        "head_dim": value("head_dim") or hidden // heads,
        "intermediate": value("intermediate_size") or 4 * hidden,
        "vocab": value("vocab_size"),
        "max_positions": value("max_position_embeddings"),
        "norm_eps": float(value("rms_norm_eps")),
        "activation": ACTIVATIONS[value("hidden_act") or "silu"],
        "tied_head": bool(value("tie_word_embeddings")),
    }
    fields["attention_scale"] = fields["head_dim"] ** -0.5
    for bias, source in family.biases.items():
        fields[bias] = source if isinstance(source, bool) else bool(raw.get(source, False))
    fields.update(family.fixed)
    fields.update(family.more(raw))
    if "rope" not in fields:
        fields["rope"] = read_rope(raw)
    found = DecoderConfig(**fields)
    if name not in PARTIAL and found.positions == "rope" and found.rope.dim != found.head_dim:
        raise Unsupported(
            f"config.json turns {found.rope.dim} of a head's {found.head_dim} dimensions (partial_rotary_factor), which a "
            f"{name} model does not do",
            help=f"take it out of config.json if the model was not made so; else {ATTACH}",
        )
    return found


def _refuse(name: str, family: Family, raw: Raw) -> None:
    """Every reason why this config.json can't be run natively, in one error."""
    required = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"]
    keys = [family.keys.get(key, key) for key in required]
    missing = [key for key in keys if not raw.get(key) and key != "n_inner"]
    if missing:
        raise FormatError(f"config.json of a {name} model has no {', '.join(missing)}", help="is the file complete?")
    problems = [
        f"{key} is {raw.get(key)!r}, implemented: {', '.join(map(repr, values))}"
        for key, values in {**ONLY, **family.only}.items()
        if raw.get(key) not in values
    ]
    act = raw.get(family.keys.get("hidden_act", "hidden_act")) or "silu"
    if act not in ACTIVATIONS:
        problems.append(f"the activation is {act!r}, implemented: {', '.join(ACTIVATIONS)}")
    heads, kv_heads = raw[keys[2]], raw.get(family.keys.get("num_key_value_heads", "num_key_value_heads"))
    if heads % (kv_heads or heads):
        problems.append(f"{heads} heads are not a multiple of {kv_heads} key-value heads")
    if raw.get("quantization_config"):
        problems.append("its weights are stored quantised (quantization_config)")
    if problems:
        raise Unsupported(f"this {name} model cannot be run natively:\n{listed(problems)}", help=ATTACH)


def layout(config: DecoderConfig) -> Layout:
    """Module paths and tensor names of `config`'s family, one group per shared input."""
    family = FAMILIES[config.family]
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    qkv = [q, kv, kv] if len(family.qkv) == 3 else [q + 2 * kv]
    up = [config.intermediate * (2 if config.gated else 1) // len(family.up)] * len(family.up)
    groups: list[GroupSpec] = []
    tensors = {"embed": f"{family.embed}.weight"}
    if family.positions is not None:
        tensors["positions"] = f"{family.positions}.weight"
    for index in range(config.layers):
        prefix, native = family.layer.format(index), f"layers.{index}"
        for name, width, paths, sizes, bias in (
            ("qkv", config.hidden, family.qkv, qkv, config.qkv_bias),
            ("o", q, (family.o,), [config.hidden], config.o_bias),
            ("up", config.hidden, family.up, up, config.mlp_bias),
            ("down", config.intermediate, (family.down,), [config.hidden], config.mlp_bias),
        ):
            parts = _parts([f"{prefix}.{path}" for path in paths], sizes)
            groups.append(GroupSpec(f"{native}.{name}", width, parts, family.kind, bias))
        for name, path in family.norms.items():
            tensors |= _norm(f"{native}.{name}", f"{prefix}.{path}", config.norm_bias)
    tensors |= _norm("final_norm", family.final_norm, config.norm_bias)
    if not config.tied_head:
        head = _parts([family.head], [config.vocab])
        groups.append(GroupSpec("head", config.hidden, head, "linear", config.head_bias))
    return Layout(tuple(groups), tensors, family.embed, family.head)


def _parts(paths: list[str], sizes: list[int]) -> tuple[PartSpec, ...]:
    """Parts one after another: `sizes[i]` output rows for `paths[i]`."""
    stops = list(accumulate(sizes))
    return tuple(PartSpec(path, stop - size, stop) for path, size, stop in zip(paths, sizes, stops, strict=True))


def _norm(native: str, path: str, bias: bool) -> dict[str, str]:
    names = {native: f"{path}.weight"}
    return names | {f"{native}_bias": f"{path}.bias"} if bias else names
