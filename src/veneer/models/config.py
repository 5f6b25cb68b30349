"""The shape of a decoder, as plain data: everything that tells one family from another.

`DecoderConfig` is filled by `families.py` from a checkpoint's config.json. `Layout` says which checkpoint tensors make up each
native tensor; projections that share an input are stored as one (q|k|v, gate|up), so one product serves them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.types import BaseShape, HostKind, HostShape


@dataclass(frozen=True)
class Rope:
    """Rotary positions. `scaling` is the checkpoint's own dict ("llama3", "linear", "yarn", "longrope", "dynamic")."""

    theta: float = 10000.0
    dim: int = 0
    scaling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder. Names follow the field; shapes as in the checkpoint.

    norm               "rms" (x / rms * w), "rms1" (x / rms * (1 + w), Gemma), "layer" (LayerNorm)
    block              "sequential": h += attn(norm h); h += mlp(norm h).  "parallel": h += attn(norm1 h) + mlp(norm2 h) (NeoX)
    pre_norms          norms before attention and MLP (False for OLMo 2)
    post_norms         norms on their outputs, before the residual add (Gemma 2/3, OLMo 2)
    qk_norm            None, "head" (per head, Qwen 3 and Gemma 3) or "full" (over all heads, OLMo 2)
    qkv_order          "parts" (rows q, then k, then v) or "heads" (per head q, k, v: NeoX)
    positions          "rope" or "learned" (GPT-2)
    windows            per layer: sliding window in tokens, or None for full attention
    local_layers       per layer: True where `local_rope` is used in place of `rope` (Gemma 3)
    embed_scale        factor on input embeddings (Gemma sqrt(hidden), rounded to the checkpoint's dtype by the decoder)
    attention_scale    factor on q.k
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    norm: Literal["rms", "rms1", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    block: Literal["sequential", "parallel"] = "sequential"
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: Literal["head", "full"] | None = None
    qkv_order: Literal["parts", "heads"] = "parts"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    positions: Literal["rope", "learned"] = "rope"
    rope: Rope = Rope()
    local_rope: Rope | None = None
    local_layers: tuple[bool, ...] = ()
    windows: tuple[int | None, ...] = ()
    attention_scale: float = 0.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    tied_head: bool = True
    head_bias: bool = False

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def is_local(self, layer: int) -> bool:
        return bool(self.local_layers) and self.local_layers[layer]


@dataclass(frozen=True)
class PartSpec:
    """One checkpoint module inside a group: its path and its output rows."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class GroupSpec:
    """Projections that share an input, stored as one `[sum of out, in]` matrix.

    kind is how the *checkpoint* stores the parts ("conv1d" is `[in, out]`); natively every group is `[out, in]`.
    """

    name: str
    in_features: int
    parts: tuple[PartSpec, ...]
    kind: HostKind = "linear"
    bias: bool = False

    @property
    def out_features(self) -> int:
        return self.parts[-1].stop


@dataclass(frozen=True)
class Layout:
    """Where every native tensor comes from.

    groups   the projections, in forward order; native names `layers.{i}.{qkv,o,up,down}` (+ "_bias") and `head`
    tensors  native name -> checkpoint tensor name, for embeddings and norms:
             `embed`, `positions`, `layers.{i}.{attn_norm,mlp_norm,post_attn_norm,post_mlp_norm,q_norm,k_norm}` (+ "_bias"),
             `final_norm` (+ "_bias")
    A tied head has no group: it is `embed`.
    """

    groups: tuple[GroupSpec, ...]
    tensors: dict[str, str]
    embed_path: str
    head_path: str

    def hosts(self, config: DecoderConfig) -> dict[str, HostShape]:
        """Module path -> shape, in checkpoint order, the embedding first and the head last."""
        found = {self.embed_path: HostShape("embedding", config.vocab, config.hidden)}
        for group in self.groups:
            for part in group.parts:
                found[part.path] = HostShape(group.kind, group.in_features, part.stop - part.start, group.bias)
        if config.tied_head:
            found[self.head_path] = HostShape("linear", config.hidden, config.vocab)
        return found

    def base_shape(self, config: DecoderConfig) -> BaseShape:
        return BaseShape(
            hidden=config.hidden,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocab=config.vocab,
            hosts=self.hosts(config),
            tied_head=config.tied_head,
            head=self.head_path,
            norms={
                self.tensors[name].removesuffix(".weight"): HostShape(
                    "norm", config.hidden, config.hidden, f"{name}_bias" in self.tensors
                )
                for name in self.norms
            },
            embed_scale=config.embed_scale,
        )

    @property
    def norms(self) -> tuple[str, ...]:
        """Native names of the norms of hidden width, in forward order; those of heads are left out."""
        return tuple(name for name in self.tensors if name.endswith(("attn_norm", "mlp_norm", "final_norm")))
