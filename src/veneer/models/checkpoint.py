"""From a checkpoint's tensors to the decoder's, by names and shapes.

A checkpoint stores q, k and v apart, GPT-2 stores `[in, out]`; the decoder wants one `[out, in]` matrix per shared input.
`canonical` finds the checkpoint's names (with or without the model prefix) and lists everything that is missing, unexpected or
mis-shaped in one error. The surprise: old checkpoints carry buffers (causal masks, rotary tables) that are not weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from veneer.errors import FormatError, listed
from veneer.models.config import DecoderConfig, GroupSpec, Layout

BUFFERS = frozenset(
    {
        ("attn", "bias"),
        ("attn", "masked_bias"),
        ("attention", "bias"),
        ("attention", "masked_bias"),
        ("rotary_emb", "inv_freq"),
    }
)
"""Last two words of tensors that old checkpoints carry and no model reads."""

RENAMED: Mapping[str, Mapping[str, str]] = {"gpt_neox": {"embed_out.weight": "lm_head.weight"}}
"""What files of a family call otherwise than its modules are called."""


def shapes(config: DecoderConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Canonical tensor name -> shape, for every tensor that the checkpoint must have."""
    found: dict[str, tuple[int, ...]] = {}
    for native, name in layout.tensors.items():
        found[name] = _norm_or_table_shape(native, config)
    for group in layout.groups:
        for part in group.parts:
            out = part.stop - part.start
            conv = group.kind == "conv1d"
            found[f"{part.path}.weight"] = (group.in_features, out) if conv else (out, group.in_features)
            if group.bias:
                found[f"{part.path}.bias"] = (out,)
    return found


def _norm_or_table_shape(native: str, config: DecoderConfig) -> tuple[int, ...]:
    last = native.rsplit(".", 1)[-1].removesuffix("_bias")
    if last == "embed":
        return (config.vocab, config.hidden)
    if last == "positions":
        return (config.max_positions, config.hidden)
    if last in ("q_norm", "k_norm"):
        heads = config.heads if last == "q_norm" else config.kv_heads
        return (config.head_dim if config.qk_norm == "head" else heads * config.head_dim,)
    return (config.hidden,)


def canonical(
    config: DecoderConfig, layout: Layout, stored: Mapping[str, tuple[int, ...]], source: str
) -> dict[str, str]:
    """Canonical name -> the name in this checkpoint, whose tensors and shapes are `stored`.

    Raises `FormatError` with every missing, unexpected and mis-shaped tensor.
    """
    expected = shapes(config, layout)
    prefix = layout.embed_path.split(".", 1)[0] + "."
    names: dict[str, str] = {}
    problems: list[str] = []
    for name in stored:
        plain = RENAMED.get(config.family, {}).get(name, name)
        plain = plain if plain in expected else prefix + plain if prefix + plain in expected else plain
        if plain in names:
            problems.append(f"{names[plain]} and {name} are both {plain}")
        elif plain in expected:
            names[plain] = name
        elif tuple(plain.split(".")[-2:]) not in BUFFERS and plain != f"{layout.head_path}.weight":
            problems.append(f"{name} {list(stored[name])} is not part of a {config.family} model")
    for name, shape in expected.items():
        if name not in names:
            problems.append(f"{name} {list(shape)} is missing")
        elif stored[names[name]] != shape:
            problems.append(f"{name} has shape {list(stored[names[name]])}, config.json says {list(shape)}")
    if problems:
        raise FormatError(
            f"the tensors of {source} do not fit its config.json:\n{listed(sorted(problems))}",
            help="is this the complete checkpoint, with its own config.json?",
        )
    return names


def native_tensors(
    config: DecoderConfig, layout: Layout, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The decoder's tensors, native name and `[out, in]` value. `read` gives a checkpoint tensor by canonical name."""
    for native, name in layout.tensors.items():
        yield native, read(name)
    for group in layout.groups:
        yield from _group_tensors(group, read)


def native_shapes(config: DecoderConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Native tensor name -> shape, in the order of `native_tensors`."""
    stored = shapes(config, layout)
    found = {native: stored[name] for native, name in layout.tensors.items()}
    for group in layout.groups:
        found[group.name] = (group.out_features, group.in_features)
        if group.bias:
            found[f"{group.name}_bias"] = (group.out_features,)
    return found


def _group_tensors(group: GroupSpec, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    weights = [read(f"{part.path}.weight") for part in group.parts]
    if group.kind == "conv1d":
        weights = [weight.t() for weight in weights]
    yield group.name, (weights[0] if len(weights) == 1 else torch.cat(weights)).contiguous()
    if group.bias:
        yield f"{group.name}_bias", torch.cat([read(f"{part.path}.bias") for part in group.parts])
