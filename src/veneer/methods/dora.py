"""DoRA: W' = diag(m / c) (W + scale B A), c_j the norm of row j of the bracket; arXiv 2402.09353.

m starts as the row norms of W, so W' = W. The norm c is a constant in the backward pass, as the paper advises. The bias is never
scaled. With dropout its whole change is of the dropped-out input d(x), as in PEFT: x W^T + (m/c - 1) d(x) W^T + m/c d(x) A^T B^T.

The surprise: c needs no dense product. c_j^2 = |w_j|^2 + 2 s b_j.(A w_j) + s^2 b_j (A A^T) b_j^T takes one `[out, rank]` product
with the frozen weight, and |w_j|^2 is kept per host. Lowering happens once per optimiser step, and so does this.
"""

from __future__ import annotations

from typing import ClassVar, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from veneer.adapter import Part
from veneer.base.host import Host
from veneer.methods._abstract import PeftForm
from veneer.methods._lowrank import LowRankMethod
from veneer.types import Factors, HostShape, LowRank, OutScale, Primitive, Site

_squares: WeakKeyDictionary[Host, Tensor] = WeakKeyDictionary()


@final
class DoRA(LowRankMethod):
    """A low-rank update of the direction of each output row, and a length for each row."""

    kind: ClassVar[str] = "dora"
    site: ClassVar[Site] = "weight"
    paper: ClassVar[str] = "2402.09353"
    summary: ClassVar[str] = "m (W + scale B A) / |row|"
    use: ClassVar[str] = "LoRA at a low rank falls short, and a few percent of a step are to spare"
    limits: ClassVar[str] = "can't be added to another update on the same rows"
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="LORA",
        when={"use_dora": True},
        ranked=True,
        tensors={"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
        embedding={"A": "lora_embedding_A", "B": "lora_embedding_B", "magnitude": "lora_magnitude_vector"},
        hosts=("linear", "conv1d", "embedding", "conv"),
        fields={"dropout": "lora_dropout", "bias": "bias"},
    )

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        return {**super().tensor_shapes(target, shape), "magnitude": (shape.out_features,)}

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        tensors = super().start(target, host, factors, generator)
        part = Part(self.kind, self.site, target, tensors, host.shape.kind)
        return {**tensors, "magnitude": row_norms(*self.factors(part), host)}

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        weight, bias = self.merged(part, host)
        if host.shape.kind == "embedding":
            return host.product(x, weight).to(host.dtype)
        return host.product(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        a, b = self.factors(part)
        return LowRank(a, b), OutScale(part.tensors["magnitude"] / row_norms(a, b, host), scales_bias=False)

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        a, b = self.factors(part)
        scale = part.tensors["magnitude"].float() / row_norms(a, b, host)
        return scale[:, None] * (host.weight().float() + b.float() @ a.float()), host.bias


@torch.no_grad()
def row_norms(a: Tensor, b: Tensor, host: Host) -> Tensor:
    """|row| of W + B A for each output row, fp32 `[out]`, without forming it. The scale is in `b`."""
    a, b = a.detach(), b.detach().float()
    if host not in _squares:
        wide = torch.promote_types(host.dtype, torch.float32)
        _squares[host] = torch.linalg.vector_norm(host.weight(), dim=1, dtype=wide).square().float()
    cross = (host.weight() @ a.to(host.dtype).t()).float()
    gram = a.float() @ a.float().t()
    squared = _squares[host] + 2 * (b * cross).sum(1) + (b @ gram * b).sum(1)
    return squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
