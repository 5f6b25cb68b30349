"""A small base without a decoder, adapters of every method on it, and the primitives carried out by their definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.adapter import Adapter, Part
from veneer.base.formats import load_all as load_formats
from veneer.base.host import DenseHost, Host
from veneer.base.quantized import QuantizedHost
from veneer.inits import INITS, InitStats
from veneer.inits import load_all as load_inits
from veneer.inject.create import create
from veneer.methods import METHODS, Method, load_all
from veneer.types import BaseShape, Bias, HostShape, InScale, Lowered, LowRank, OutScale, Override, Primitive

load_all()
load_inits()

HIDDEN, VOCAB, INNER = 16, 24, 20
SMALL: Mapping[str, Any] = {
    "rank": 3, "num_tokens": 4, "tokens": (1, 5, 7), "size": 5, "encoder_size": 6, "alpha": 5.0, "target_rank": 2, "block": 4,
}  # fmt: skip
SIZES = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "up_proj": (20, 16), "down_proj": (16, 20)}
KINDS = ("linear", "biased", "bf16", "conv1d", "embedding", "nf4", "bof4-s", "int8", "bf12")


def method(kind: str, **fields: Any) -> Method:
    """The method at a size that fits the small base."""
    cls = METHODS[kind]
    return cls(**{**{k: v for k, v in SMALL.items() if k in cls.model_fields}, **fields})


def host_of(kind: str, out: int, inp: int, seed: int = 0) -> Host:
    """One host of each kind, `[out, inp]`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, generator=generator) * inp**-0.5
    bias = torch.randn(out, generator=generator)
    if kind == "linear":
        return DenseHost(weight)
    if kind == "biased":
        return DenseHost(weight, bias)
    if kind == "bf16":
        return DenseHost(weight.bfloat16(), bias.bfloat16())
    if kind == "conv1d":
        return DenseHost(weight.t().contiguous(), bias, kind="conv1d")
    if kind == "embedding":
        return DenseHost(weight.t().contiguous(), kind="embedding")
    return QuantizedHost(load_formats()[kind](weight), torch.float32, bias)


@dataclass(frozen=True)
class World:
    """A base as `create` sees it: shapes and hosts."""

    shape: BaseShape
    hosts: Mapping[str, Host]

    def host(self, target: str) -> Host:
        return self.hosts[target]


def world(kind: str = "linear") -> World:
    """Two blocks of Llama's names, all projections of one kind."""
    hosts = {"model.embed_tokens": host_of("embedding", HIDDEN, VOCAB, 99)}
    plain = "linear" if kind == "embedding" else kind
    for layer in range(2):
        for seed, (name, (out, inp)) in enumerate(SIZES.items()):
            inside = "mlp" if name in ("up_proj", "down_proj") else "self_attn"
            hosts[f"model.layers.{layer}.{inside}.{name}"] = host_of(plain, out, inp, 10 * layer + seed)
    shapes: dict[str, HostShape] = {path: host.shape for path, host in hosts.items()}
    shape = BaseShape(hidden=HIDDEN, layers=2, heads=4, kv_heads=2, head_dim=4, vocab=VOCAB, hosts=shapes)
    return World(shape, hosts)


def stats_for(base: World) -> dict[str, InitStats]:
    """Something for every data-driven init to read."""
    found = {}
    for path, host in base.hosts.items():
        generator = torch.Generator().manual_seed(len(path))
        seen = torch.randn(64, host.shape.in_features, generator=generator)
        _, s, v = torch.linalg.svd(seen, full_matrices=False)
        noise = torch.randn(host.shape.out_features, host.shape.in_features, generator=generator)
        found[path] = InitStats(
            weight=host.weight().float() + 0.01 * noise, gradient=noise, components=v, energies=s,
            total=float(s.square().sum()), covariance=(seen.t() @ seen).double() / len(seen),
        )  # fmt: skip
    return found


def fresh(spec: Method, base: World, seed: int = 0) -> Adapter:
    return create(base, spec, torch.Generator().manual_seed(seed), stats=stats_for(base))


def stirred(adapter: Adapter, seed: int = 1) -> Adapter:
    """The adapter after some imaginary training: every trained tensor moved."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in adapter.parts:
        frozen = METHODS[part.kind]().frozen()
        moved = {
            name: tensor if name in frozen else tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in part.tensors.items()
        }
        parts.append(replace(part, tensors=moved))
    return replace(adapter, parts=tuple(parts))


def inputs(host: Host, rows: int = 5, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if host.shape.kind == "embedding":
        return torch.randint(host.shape.in_features, (rows,), generator=generator)
    return torch.randn(rows, host.shape.in_features, generator=generator).to(host.dtype)


def carried_out(primitives: Sequence[Primitive], x: Tensor, host: Host) -> Tensor:
    """y = ((x * in_scale) W^T + low rank) * out_scale + bias, one primitive after the other."""
    weight, bias = _weight(primitives, host), host.bias
    embedding = host.shape.kind == "embedding"
    for p in primitives:
        if isinstance(p, InScale):
            x = x * p.vector.to(x.dtype)
    y = F.embedding(x, weight.t()) if embedding else F.linear(x, weight)
    for p in primitives:
        if isinstance(p, LowRank):
            shrunk = F.embedding(x, p.A.t()) if embedding else x.to(p.A.dtype) @ p.A.t()
            y = y + (shrunk @ p.B.t()).to(y.dtype)
    for p in primitives:
        if isinstance(p, OutScale):
            y = y * p.vector.to(y.dtype)
            bias = bias * p.vector.to(y.dtype) if p.scales_bias and bias is not None else bias
    y = y if bias is None else y + bias
    for p in primitives:
        if isinstance(p, Bias):
            y = y + p.vector.to(y.dtype)
    return y


def _weight(primitives: Sequence[Primitive], host: Host) -> Tensor:
    """The weight `[out, in]`, or what replaces it, in the host's dtype."""
    found = [p.value for p in primitives if isinstance(p, Override)]
    if not found:
        return host.weight()
    return (found[0].t() if host.shape.kind in ("conv1d", "embedding") else found[0]).to(host.dtype)


def lowered_at(lowered: Lowered, target: str) -> tuple[Primitive, ...]:
    """Everything that happens at one target: the weight that replaces the base's, then the rest."""
    override = lowered.overrides.get(f"{target}.weight")
    return (*(() if override is None else (override,)), *lowered.weights.get(target, ()))


def own_parts(adapter: Adapter) -> list[Part]:
    """The parts of the adapter's own method that stand at a target."""
    return [p for p in adapter.parts if p.kind == adapter.spec.kind and p.target is not None]


def unshifted_inits() -> list[str]:
    return sorted(
        set(INITS) - {"pissa", "pissa_fast", "olora", "corda", "corda_kpm", "lora_ga", "lora_one", "loftq", "qpissa"}
    )
