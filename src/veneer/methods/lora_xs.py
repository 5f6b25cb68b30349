"""LoRA-XS: W + scale U_r S_r R V_r^T, arXiv 2405.17604: only R `[rank, rank]` is trained, between the strongest directions of W.

U_r S_r V_r^T is the best rank-r part of W. A = V_r^T and B = U_r S_r are frozen, so a layer trains rank^2 numbers whatever its
size, and the update is a LoRA with B' = B R, which is how it runs, serves and merges. R starts at zero: its gradient is B^T G
A^T, which doesn't depend on R, so nothing is lost against the paper's N(0, 1e-5), and the start is exactly the base.

The surprise: A and B are stored although they follow from W. Singular vectors have no fixed sign and no fixed basis where
singular values are close, so another machine's SVD would give another adapter.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from veneer.adapter import Part
from veneer.base.host import Host
from veneer.methods._lowrank import Factored, ScaledMethod
from veneer.types import Factors, HostShape, Site


@final
class LoRAXS(ScaledMethod, Factored):
    """A trained `[rank, rank]` matrix between frozen singular vectors of the weight."""

    kind: ClassVar[str] = "lora_xs"
    site: ClassVar[Site] = "weight"
    paper: ClassVar[str] = "2405.17604"
    summary: ClassVar[str] = "W + scale U_r S_r R V_r^T"
    use: ClassVar[str] = "thousands of adapters on one base: rank^2 trained numbers a layer"
    limits: ClassVar[str] = "the file holds the frozen factors too; linear layers"

    def refusal(self, target: str, shape: HostShape) -> str | None:
        if shape.kind not in ("linear", "conv1d"):
            return f"{shape.kind} layers take no LoRA-XS; linear layers do"
        return super().refusal(target, shape)

    def frozen(self) -> frozenset[str]:
        return frozenset({"A", "B"})

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        rank = self.rank_at(target)
        return {"A": (rank, shape.in_features), "B": (shape.out_features, rank), "R": (rank, rank)}

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        rank = self.rank_at(target)
        u, s, vh = torch.linalg.svd(host.weight().float(), full_matrices=False)
        b = (u[:, :rank] * s[:rank]).contiguous()
        return {"A": vh[:rank].contiguous(), "B": b, "R": torch.zeros(rank, rank)}

    def factors(self, part: Part) -> tuple[Tensor, Tensor]:
        """The LoRA that this part is: A and scale * B R."""
        assert part.target is not None
        t = part.tensors
        scale = self.scale(part.target, t["A"].shape[0])
        return t["A"].to(t["R"].dtype), scale * (t["B"].to(t["R"].dtype) @ t["R"])
