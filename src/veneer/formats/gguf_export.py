"""Writing .gguf files: a whole model, or a LoRA adapter for one, as llama.cpp and Ollama read them.

A model is written tensor by tensor in f16, bf16 or q8_0 (32 values to a block with one fp16 scale); vectors stay fp32. llama.cpp
keeps some families in an order of its own, the same that `models/gguf.py` undoes: llama's q and k rows as pairs, GPT-NeoX's heads
taken apart, GPT-2's matrices transposed, Gemma's norm weights plus one. An adapter's B goes through the same order.

llama.cpp knows one alpha per adapter file and divides it by each tensor's own rank. Where that can't say the effective scales
(rsLoRA with mixed ranks, alpha patterns), they are folded into B. The surprise: alpha is then 0, which its loader takes for "no
scale", not for "nothing".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from veneer import methods
from veneer.adapter import Adapter
from veneer.errors import TargetError, Unsupported, listed
from veneer.files import replacing
from veneer.models.checkpoint import canonical, shapes
from veneer.models.config import DecoderConfig, Layout
from veneer.models.families import decoder_config, layout
from veneer.models.gguf import FAMILY, UNSCALED_GEMMA
from veneer.models.rope import scaled_frequencies
from veneer.types import LowRank

FileType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0"]
ARCH = {family: arch for arch, family in FAMILY.items()} | {"mistral": "llama"}
BLOCK = 32
YARN = ("rope_type", "factor", "original_max_position_embeddings", "max_position_embeddings")
"""What a file says of YaRN."""
EXACT = ("f32", "f16", "bf16")
LARGEST = {"f16": 65520.0, "q8_0": 127 * 65520.0}
"""From here on a value is infinite in that type: fp16 rounds 65520 up, and q8_0 has an fp16 scale."""
SLIDING = {"gemma2": 2, "gemma3": 6}
"""llama.cpp's architectures with a sliding window: every n-th layer sees everything. Phi-3's is read and disabled."""
ACTIVATIONS = {
    "gemma2": ("gelu_tanh",),
    "gemma3": ("gelu_tanh",),
    "gpt2": ("gelu_tanh",),
    "gptneox": ("gelu", "gelu_tanh"),
}
"""What is not silu."""
BY_HAND = "merge it and convert the checkpoint with llama.cpp's convert_hf_to_gguf.py"


class Model(Protocol):
    """A checkpoint to export: its config.json and its tensors by name."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Plan:
    """A model's place in llama.cpp's world: its architecture, and for each tensor a name and a reordering."""

    arch: str
    config: DecoderConfig
    layout: Layout
    names: Mapping[str, str]
    reorder: Mapping[str, Callable[[Tensor], Tensor]]


def plan(raw: Mapping[str, Any]) -> Plan:
    """How a model with this config.json is called and ordered in a .gguf file."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = decoder_config(dict(raw))
    where = layout(config)
    if config.family not in ARCH:
        raise Unsupported(f"the family '{config.family}' has no .gguf form here", help=BY_HAND)
    arch = ARCH[config.family]
    key = next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch)
    table = get_tensor_name_map(key, config.layers)
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in shapes(config, where)}
    strange = [name for name, stored in found.items() if stored is None]
    if strange:
        raise Unsupported(f"llama.cpp has no name for these tensors:\n{listed(strange)}", help=BY_HAND)
    names = {name: stored for name, stored in found.items() if stored is not None}
    return Plan(arch, config, where, names, _reorder(config, where))


def _reorder(config: DecoderConfig, where: Layout) -> dict[str, Callable[[Tensor], Tensor]]:
    """Checkpoint name -> what brings a tensor into llama.cpp's order."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for group in where.groups:
        if group.kind == "conv1d":
            found |= {f"{part.path}.weight": transposed for part in group.parts}
        if group.name.endswith(".qkv") and ARCH[config.family] == "llama":
            for part, heads in zip(group.parts[:2], (config.heads, config.kv_heads), strict=True):
                change = partial(halves_to_pairs, heads=heads)
                found |= {f"{part.path}.weight": change, f"{part.path}.bias": change}
        if group.name.endswith(".qkv") and config.qkv_order == "heads":
            change = partial(heads_to_thirds, heads=config.heads)
            found |= {f"{part.path}.{kind}": change for part in group.parts for kind in ("weight", "bias")}
    if config.norm == "rms1":
        found |= {name: plus_one for native, name in where.tensors.items() if native != "embed"}
    return found


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous()


def plus_one(tensor: Tensor) -> Tensor:
    return tensor + 1.0


def halves_to_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from the halves (i, i + dim/2) to (2i, 2i + 1) pairs."""
    split = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def heads_to_thirds(tensor: Tensor, heads: int) -> Tensor:
    """Rows from GPT-NeoX's (q, k, v) of each head to (all q, all k, all v)."""
    split = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
    return split.transpose(0, 1).reshape(tensor.shape)


def export_model(
    model: Model,
    path: str | os.PathLike[str],
    words: Mapping[str, Any],
    *,
    filetype: FileType = "f16",
    name: str = "model",
) -> None:
    """Write a model to the file `path`. `words` are the tokenizer's fields (`gguf_words.py`)."""
    from gguf import GGUFWriter, LlamaFileType

    where = plan(model.config)
    source = canonical(where.config, where.layout, {n: model.shape(n) for n in model.names()}, name)
    types = {n: _type_of(where, n, model.shape(source[n]), filetype) for n in source}
    with replacing(Path(path)) as part, closing(GGUFWriter(part, where.arch)) as writer:
        writer.add_name(name)
        writer.add_file_type(LlamaFileType[_FILE_TYPES[filetype]])
        writer.add_quantization_version(2)
        _add_config(writer, where)
        for key, value in words.items():
            _add(writer, key, value)
        extra = _rope_factors(where.config)
        for native, values in extra.items():
            writer.add_tensor_info(native, values.shape, values.dtype, values.nbytes)
        for n in source:
            _announce(
                writer, where.names[n], _ordered(where, n, torch.empty(model.shape(source[n]), device="meta")), types[n]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in extra.values():
            writer.write_tensor_data(values)
        for n in source:
            writer.write_tensor_data(_encoded(n, _ordered(where, n, model.tensor(source[n]).float()), types[n]))


_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def _ordered(where: Plan, name: str, tensor: Tensor) -> Tensor:
    change = where.reorder.get(name)
    return tensor if change is None else change(tensor)


def _type_of(where: Plan, name: str, shape: tuple[int, ...], filetype: FileType) -> FileType:
    """Vectors and position tables are fp32; rows that are no multiple of a q8_0 block are f16."""
    if len(shape) < 2 or name == where.layout.tensors.get("positions"):
        return "f32"
    columns = shape[0] if where.reorder.get(name) is transposed else shape[-1]
    return "f16" if filetype == "q8_0" and columns % BLOCK else filetype


def _announce(writer: Any, name: str, tensor: Tensor, filetype: FileType) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[filetype.upper()]
    block, size = GGML_QUANT_SIZES[kind]
    shape = tuple(tensor.shape)
    row = shape[-1] // block * size
    nbytes = int(np.prod(shape[:-1], dtype=np.int64)) * row
    plain = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}.get(filetype)
    if plain is not None:
        writer.add_tensor_info(name, shape, plain, nbytes)
    else:
        writer.add_tensor_info(name, (*shape[:-1], row), np.dtype(np.uint8), nbytes, raw_dtype=kind)


def _encoded(name: str, tensor: Tensor, filetype: FileType) -> Any:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if filetype in LARGEST and tensor.numel():
        low, high = torch.aminmax(tensor)
        largest = max(-float(low), float(high))
        if largest >= LARGEST[filetype]:
            raise Unsupported(
                f"'{name}' has values of {largest:.3g}, which {filetype} can't hold", help="--type bf16 or f32"
            )
    if filetype == "q8_0":
        return q8_0(tensor).numpy()
    return quantize(tensor.contiguous().numpy(), GGMLQuantizationType[filetype.upper()])


def q8_0(tensor: Tensor) -> Tensor:
    """Blocks of 32 values: an fp16 scale (largest / 127) and 32 signed bytes, halves away from zero; uint8 `[..., bytes]`."""
    blocks = tensor.float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = torch.where(scale > 0, blocks / scale, 0.0)
    codes = torch.trunc(scaled + 0.5 * scaled.sign()).to(torch.int8)
    packed = torch.cat([scale.half().view(torch.uint8), codes.view(torch.uint8)], dim=1)
    return packed.reshape(*tensor.shape[:-1], -1)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def _add_config(writer: Any, where: Plan) -> None:
    """The architecture's fields."""
    _refuse_unsaid(where)
    c, own = where.config, f"{where.arch}."
    layers_norm = "attention.layer_norm_epsilon" if c.norm == "layer" else "attention.layer_norm_rms_epsilon"
    fields: dict[str, Any] = {
        "block_count": c.layers,
        "context_length": c.max_positions,
        "embedding_length": c.hidden,
        "feed_forward_length": c.intermediate,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        layers_norm: c.norm_eps,
        "vocab_size": c.vocab,
    }
    if c.positions == "rope":
        fields |= {"rope.dimension_count": c.rope.dim, "rope.freq_base": c.rope.theta, **_rope_fields(c)}
    window = next((w for w in c.windows if w is not None), None)
    if window is not None and where.arch in SLIDING:
        fields["attention.sliding_window"] = window
    for key, value in (("attn_logit_softcapping", c.attention_softcap), ("final_logit_softcapping", c.logit_softcap)):
        if value is not None:
            fields[key] = float(value)
    if where.arch == "gptneox":
        fields["use_parallel_residual"] = c.block == "parallel"
    for key, value in fields.items():
        _add(writer, own + key, value)


def _refuse_unsaid(where: Plan) -> None:
    """What would be lost without a word: llama.cpp fixes it per architecture and a .gguf file has no field for it."""
    c, problems = where.config, _windows(where)
    if c.activation not in ACTIVATIONS.get(where.arch, ("silu",)):
        problems.append(f"the activation {c.activation}")
    capped = where.arch == "gemma2"
    if capped == (c.attention_softcap is None) or (capped and c.logit_softcap is None):
        problems.append("soft caps of scores and logits: Gemma 2 always has both, no other has one on scores")
    usual = c.head_dim**-0.5
    if UNSCALED_GEMMA.get(c.layers) == c.family:
        usual = (c.hidden // c.heads) ** -0.5
    if abs(c.attention_scale / usual - 1) > 1e-6:
        problems.append(f"an attention scale of {c.attention_scale:.4g}, expected {usual:.4g}")
    if c.local_rope is not None and (c.local_rope.theta != 10000.0 or c.local_rope.scaling):
        problems.append(f"local rotary positions with theta {c.local_rope.theta}")
    problems += _yarn_beyond(c)
    if problems:
        raise Unsupported(
            f"a .gguf file can't say this about the model, and llama.cpp computes another:\n{listed(problems)}",
            help="`veneer merge` writes a checkpoint, which says all of it",
        )


def _windows(where: Plan) -> list[str]:
    """Sliding windows that the architecture has elsewhere or not at all. One that no context fills is none."""
    c, every = where.config, SLIDING.get(where.arch)
    if every is None:
        found = {window for window in c.windows if window is not None and window < c.max_positions}
        return [f"a sliding window of {window}: llama.cpp's {where.arch} has none" for window in found]
    if [window is not None for window in c.windows] == [i % every > 0 for i in range(1, c.layers + 1)]:
        return []
    return [f"which layers have a sliding window: in llama.cpp's {where.arch} all but every {every}."]


def _yarn_beyond(c: DecoderConfig) -> list[str]:
    """Numbers of YaRN that are not llama.cpp's own, where they make a difference."""
    if c.rope.scaling.get("rope_type") != "yarn":
        return []
    said = {k: v for k, v in c.rope.scaling.items() if k in YARN}
    given, usual = (
        scaled_frequencies(rope, rope.dim, c.max_positions, 1) for rope in (c.rope, replace(c.rope, scaling=said))
    )
    if torch.allclose(given[0], usual[0], rtol=1e-6, atol=0) and abs(given[1] / usual[1] - 1) < 1e-6:
        return []
    numbers = (f"{k} {v}" for k, v in c.rope.scaling.items() if k not in YARN and v is not None)
    return [f"rotary scaling 'yarn' with {', '.join(numbers)}"]


def _rope_fields(c: DecoderConfig) -> dict[str, Any]:
    kind = c.rope.scaling.get("rope_type")
    if kind in (None, "llama3"):
        return {}
    if kind in ("linear", "yarn"):
        found: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": float(c.rope.scaling["factor"])}
        if kind == "yarn":
            original = int(c.rope.scaling["original_max_position_embeddings"])
            found |= {"rope.scaling.original_context_length": original}
        return found
    raise Unsupported(f"rotary scaling '{kind}' is not written to .gguf files", help=BY_HAND)


def _rope_factors(c: DecoderConfig) -> dict[str, Any]:
    """Llama 3 stretches low frequencies: llama.cpp stores the divisor of each."""
    s = c.rope.scaling
    if s.get("rope_type") != "llama3":
        return {}
    frequency = c.rope.theta ** (-torch.arange(0, c.rope.dim, 2, dtype=torch.float64) / c.rope.dim)
    wavelength = 2 * torch.pi / frequency
    old, low, high, factor = (
        s["original_max_position_embeddings"],
        s["low_freq_factor"],
        s["high_freq_factor"],
        s["factor"],
    )
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    divisor = 1 / ((1 - smooth) / factor + smooth)
    return {"rope_freqs.weight": divisor.float().numpy()}


def export_adapter(
    adapter: Adapter,
    raw: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    filetype: FileType = "f32",
    name: str = "adapter",
) -> None:
    """Write a LoRA for a model with this config.json to the file `path`. Everything that isn't one is refused, all at once."""
    from gguf import GGUFWriter

    if filetype not in EXACT:
        raise Unsupported(f"adapters are written in {', '.join(EXACT)}, not {filetype}")
    where = plan(raw)
    pairs = _products(methods.folded(adapter), where)
    alpha, pairs = _one_alpha(adapter, pairs)
    with replacing(Path(path)) as part, closing(GGUFWriter(part, where.arch)) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_name(name)
        for module, (a, b) in pairs.items():
            stored = where.names[f"{module}.weight"]
            b = b if where.reorder.get(f"{module}.weight") is transposed else _ordered(where, f"{module}.weight", b)
            for suffix, tensor in (("lora_a", a), ("lora_b", b)):
                _whole(writer, f"{stored}.{suffix}", tensor, filetype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _whole(writer: Any, name: str, tensor: Tensor, filetype: FileType) -> None:
    from gguf import GGMLQuantizationType

    encoded = _encoded(name, tensor, filetype)
    if filetype == "bf16":
        writer.add_tensor(name, encoded, raw_dtype=GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, encoded)


def _products(adapter: Adapter, where: Plan) -> dict[str, tuple[Tensor, Tensor]]:
    """Target -> (A, scale * B) in fp32, or one error with every part that is no low-rank update of a matrix llama.cpp adapts."""
    problems: list[str] = []
    if adapter.spec.model_dump().get("invocation"):
        problems.append(f"{adapter.spec.kind} switches on inside a sequence (aLoRA), the file would be always on")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hosts = where.layout.hosts(where.config)
    for part in adapter.parts:
        if part.site == "weight" and part.target is None:
            continue
        place = part.target or "the whole model"
        if part.site != "weight" or part.target not in hosts:
            problems.append(f"{part.kind} at {place} is no update of one of its matrices")
            continue
        if hosts[part.target].kind == "embedding" or (part.target == where.layout.head_path and where.config.tied_head):
            problems.append(f"{part.kind} at {place}: llama.cpp looks embeddings up without adapters")
            continue
        method = methods.method_of(adapter, part)
        try:
            primitives = method.lower(methods.complete(adapter, part), methods.Place(hosts[part.target]))
        except Unsupported:
            primitives = ()
        low = [p for p in primitives if isinstance(p, LowRank)]
        if not low or len(low) < len(primitives) or part.target in found:
            problems.append(f"{part.kind} at {place} is not a low-rank update by itself")
            continue
        a, b = torch.cat([p.A for p in low]).float(), torch.cat([p.B for p in low], dim=1).float()
        found[part.target] = (a.detach(), b.detach())
    if problems:
        raise TargetError(
            f"a .gguf adapter holds plain LoRA only, and this one has:\n{listed(problems)}",
            help="export --format gguf merges it into the model, whatever the method; `veneer serve` serves an aLoRA",
        )
    return found


def _one_alpha(
    adapter: Adapter, pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """alpha for the file: scale * rank where that is one number for all targets, else 0 with the scales left in B."""
    if any(set(p.tensors) != {"A", "B"} for p in adapter.parts):
        return 0.0, dict(pairs)
    alphas = {adapter.scale(target) * a.shape[0] for target, (a, _) in pairs.items()}
    if len(alphas) != 1:
        return 0.0, dict(pairs)
    plain = {t: (a, adapter.part(t).tensors["B"].float()) for t, (a, _) in pairs.items()}
    return alphas.pop(), plain
