"""P-tuning: virtual tokens that come out of a small network during training; arXiv 2103.10385.

rows = MLP(E), three layers with ReLU, or the same after a two-layer bidirectional LSTM. The network makes the rows depend on each
other while they are trained; afterwards only the rows are kept (`folded`), and it is a prompt like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from veneer.adapter import Adapter, HostSource, Part
from veneer.base.host import Host
from veneer.methods._abstract import Method, PeftForm
from veneer.methods.prompt import prompt_config, prompt_rows
from veneer.types import BaseShape, Factors, HostShape, Lowered, Primitive, Site, Tokens


@final
class PTuning(Method):
    """Virtual tokens behind a small network that is dropped after training."""

    kind: ClassVar[str] = "ptuning"
    site: ClassVar[Site] = "tokens"
    paper: ClassVar[str] = "2103.10385"
    summary: ClassVar[str] = "[MLP(E); E[x]]"
    use: ClassVar[str] = "as prompt tuning, where training the rows themselves is unstable"
    limits: ClassVar[str] = "native bases; not mergeable"
    why_not_mergeable: ClassVar[str] = "it changes the input"
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="P_TUNING",
        level="model",
        tensors={"rows": "prompt_embeddings"},
        decode=prompt_rows,
        encode=lambda tensors: {"prompt_embeddings": tensors["rows"]},
        fields={"num_tokens": "num_virtual_tokens"},
        config=lambda method, parts: {
            **prompt_config(method, parts),
            "encoder_hidden_size": method.encoder_size or parts[0].tensors["rows"].shape[1],
        },
        parse=lambda config, parts: {"encoder": "none"},
    )

    num_tokens: int = Field(20, ge=1, description="how many virtual tokens")
    encoder: Literal["mlp", "lstm", "none"] = Field("mlp", description="the network; none once it is folded")
    encoder_size: int | None = Field(None, ge=1, description="its width; by default the model's")

    def places(self, shape: BaseShape) -> tuple[str, ...]:
        return ("",)

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        hidden, n = shape.out_features, self.num_tokens
        width = self.encoder_size or hidden
        if self.encoder == "none":
            return {"rows": (n, hidden)}
        if self.encoder == "mlp":
            sizes = [("w1", (width, hidden)), ("w2", (width, width)), ("w3", (hidden, width))]
        else:
            sizes = [("w2", (2 * width, 2 * width)), ("w3", (hidden, 2 * width))]
        found: dict[str, tuple[int, ...]] = {"embedding": (n, hidden)}
        if self.encoder == "lstm":
            for layer in range(2):
                for way in ("forward", "backward"):
                    inputs = hidden if layer == 0 else 2 * width
                    found[f"lstm{layer}_{way}_in"] = (4 * width, inputs)
                    found[f"lstm{layer}_{way}_state"] = (4 * width, width)
                    found[f"lstm{layer}_{way}_in_bias"] = (4 * width,)
                    found[f"lstm{layer}_{way}_state_bias"] = (4 * width,)
        for name, size in sizes:
            found[name] = size
            found[name.replace("w", "b")] = size[:1]
        return found

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        tensors = {}
        for name, size in self.tensor_shapes(target, host.shape).items():
            if name in ("embedding", "rows"):
                tensors[name] = torch.randn(size, generator=generator)
            elif name.startswith("lstm"):
                tensors[name] = _uniform(size, size[0] // 4, generator)
            else:
                tensors[name] = _uniform(size, size[-1], generator)
        return tensors

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The virtual tokens, `[num_tokens, hidden]`; differentiable in everything behind them."""
        if "rows" in tensors:
            return tensors["rows"]
        x = tensors["embedding"]
        if self.encoder == "mlp":
            x = torch.relu(F.linear(x, tensors["w1"], tensors["b1"]))
        else:
            names = [name for name in tensors if name.startswith("lstm")]
            width = tensors["lstm0_forward_state"].shape[1]
            zeros = x.new_zeros(4, 1, width)
            weights = [tensors[name] for name in names]
            x = torch.lstm(x[None], (zeros, zeros), weights, True, 2, 0.0, False, True, True)[0][0]
        x = torch.relu(F.linear(x, tensors["w2"], tensors["b2"]))
        return F.linear(x, tensors["w3"], tensors["b3"])

    def folded(self, adapter: Adapter) -> Adapter:
        spec = self.model_copy(update={"encoder": "none"})
        parts = tuple(
            replace(p, tensors={"rows": self.rows(p.tensors).detach()}) if p.kind == self.kind else p
            for p in adapter.parts
        )
        return replace(adapter, spec=spec, parts=parts)

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        """x is the embeddings of a sequence, `[tokens, hidden]`."""
        return torch.cat([self.rows(part.tensors).to(x.dtype), x])

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        return (Tokens(self.rows(part.tensors)),)

    def lower_into(self, lowered: Lowered, part: Part, source: HostSource) -> Lowered:
        return replace(lowered, tokens=Tokens(self.rows(part.tensors)))


def _uniform(size: tuple[int, ...], fan: int, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(fan)
    return torch.empty(size).uniform_(-bound, bound, generator=generator)
