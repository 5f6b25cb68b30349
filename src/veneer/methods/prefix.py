"""Prefix tuning: trained keys and values that every layer sees before position 0; arXiv 2101.00190.

Keys are as they are after RoPE, the text's own tokens begin at position `num_tokens`. With `encoder` the prefix comes out of a
small network during training, KV = W2 tanh(W1 E), of which only the result is kept (`folded`).

The surprise: the start decides everything. Noise or zeros train badly; the keys and values of a real text (`init: text`) make it
work, and untrained they are exactly that text in the context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from veneer.adapter import Adapter, HostSource, Part
from veneer.base.host import Host
from veneer.errors import ConfigError
from veneer.methods._abstract import Method, PeftForm
from veneer.types import KV, BaseShape, Factors, HostShape, Lowered, Primitive, Site


def _encode(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    both = torch.stack([tensors["key"], tensors["value"]], dim=1)  # [layers, 2, tokens, heads, dim]
    return {"prompt_embeddings": both.permute(2, 0, 1, 3, 4).flatten(1).contiguous()}


def _decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    flat, layers, heads = tensors["prompt_embeddings"], config["num_layers"], config["num_attention_heads"]
    both = flat.view(config["num_virtual_tokens"], layers, 2, heads, config["token_dim"] // heads).permute(
        1, 2, 0, 3, 4
    )
    return {"key": both[:, 0].contiguous(), "value": both[:, 1].contiguous()}


def _config(method: Any, parts: Sequence[Part]) -> dict[str, Any]:
    layers, _, heads, dim = parts[0].tensors["key"].shape
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * dim,
        "encoder_hidden_size": heads * dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }


@final
class PrefixTuning(Method):
    """Keys and values before position 0, in every layer."""

    kind: ClassVar[str] = "prefix"
    site: ClassVar[Site] = "kv"
    paper: ClassVar[str] = "2101.00190"
    summary: ClassVar[str] = "attend over [P; K], [P'; V]"
    use: ClassVar[str] = "steering by example without touching a weight; start it from a text"
    limits: ClassVar[str] = "native bases; not mergeable; takes positions of the context"
    why_not_mergeable: ClassVar[str] = "it is an addition to the cache, not a change of a weight"
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="PREFIX_TUNING",
        level="model",
        tensors={"key": "prompt_embeddings"},
        encode=_encode,
        decode=_decode,
        fields={"num_tokens": "num_virtual_tokens"},
        config=_config,
        parse=lambda config, parts: {"encoder": 0},
    )

    num_tokens: int = Field(20, ge=1, description="how many virtual positions")
    encoder: int = Field(512, ge=0, description="width of the network behind it during training; 0: none")
    init: Literal["random", "text"] = Field("random", description="noise, or the keys and values of a text")
    init_text: str | tuple[int, ...] = Field("", description="the text (or its token ids) for init: text")

    @model_validator(mode="after")
    def _text_is_not_encoded(self) -> Self:
        if self.init == "text" and self.encoder:
            raise ValueError("keys and values of a text can't come out of a network: set encoder: 0 with init: text")
        return self

    def prepared(self, encode: Callable[[str], Sequence[int]]) -> Self:
        if not isinstance(self.init_text, str) or self.init != "text":
            return self
        return self.model_copy(update={"init_text": tuple(encode(self.init_text))})

    def places(self, shape: BaseShape) -> tuple[str, ...]:
        return ("",)

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        n, width = self.num_tokens, shape.in_features * shape.out_features
        if not self.encoder:
            size = (shape.layers, n, shape.in_features, shape.out_features)
            return {"key": size, "value": size}
        return {
            "embedding": (n, width),
            "w1": (self.encoder, width),
            "b1": (self.encoder,),
            "w2": (shape.layers, 2, shape.in_features, shape.out_features, self.encoder),
            "b2": (shape.layers, 2, shape.in_features, shape.out_features),
        }

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        """With init: text, `factors` are the text's keys (A) and values (B), each `[layers, tokens, heads, dim]`."""
        shapes = self.tensor_shapes(target, host.shape)
        if self.init == "text":
            if factors is None:
                raise ConfigError("init: text needs the keys and values of the text", help="the trainer gathers them")
            if factors.A.shape != shapes["key"] or factors.B.shape != shapes["value"]:
                raise ConfigError(f"the text gave {list(factors.A.shape)} keys, expected {list(shapes['key'])}")
            return {"key": factors.A.float().clone(), "value": factors.B.float().clone()}
        tensors = {name: torch.randn(size, generator=generator) * 0.02 for name, size in shapes.items()}
        if self.encoder:
            tensors["embedding"] = torch.randn(shapes["embedding"], generator=generator)
        return tensors

    def keys_and_values(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each `[layers, tokens, heads, dim]`; differentiable in everything behind them."""
        if "key" in tensors:
            return tensors["key"], tensors["value"]
        inner = torch.tanh(F.linear(tensors["embedding"], tensors["w1"], tensors["b1"]))
        both = torch.einsum("nc,lkhdc->lknhd", inner, tensors["w2"]) + tensors["b2"][:, :, None]
        return both[:, 0], both[:, 1]

    def folded(self, adapter: Adapter) -> Adapter:
        if not self.encoder:
            return adapter
        with torch.no_grad():
            parts = tuple(
                replace(p, tensors=dict(zip(("key", "value"), self.keys_and_values(p.tensors), strict=True)))
                if p.kind == self.kind
                else p
                for p in adapter.parts
            )
        return replace(adapter, spec=self.model_copy(update={"encoder": 0}), parts=parts)

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        """x is what attention sees without it, `[layers, 2, tokens, heads, dim]`; the prefix comes first."""
        return torch.cat([torch.stack(self.keys_and_values(part.tensors), dim=1).to(x.dtype), x], dim=2)

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        keys, values = self.keys_and_values(part.tensors)
        return tuple(KV(key, value) for key, value in zip(keys, values, strict=True))

    def lower_into(self, lowered: Lowered, part: Part, source: HostSource) -> Lowered:
        keys, values = self.keys_and_values(part.tensors)
        return replace(lowered, kv={i: KV(k, v) for i, (k, v) in enumerate(zip(keys, values, strict=True))})
