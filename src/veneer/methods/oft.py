"""OFT: y = (x R) W^T + b with R orthogonal: inputs are rotated, lengths and angles of W's rows stay; arXiv 2306.07280,
2506.19847.

R is block-diagonal. Each block is the Cayley transform (I - Q)(I + Q)^-1 of a skew matrix Q, of which the upper triangle is
trained, b (b - 1) / 2 numbers a block of size b. Q starts at zero, so R = I. The merged weight is W R^T: its singular values are
W's.

PEFT's default is a truncated series, I + 2Q + 2Q^2 + ... (`neumann`), which is only nearly orthogonal and rotates the other way
round; its files say which one was trained, and so does `cayley`.

The surprise: the update multiplies W, so natively (trained, served, in a mixed batch) it is a replaced weight W R^T: each adapter
in memory holds a dense tensor for each of its layers. Merge it to serve it for free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from veneer.adapter import Part
from veneer.base.host import Host
from veneer.methods._abstract import Method, PeftForm
from veneer.methods._lowrank import Names
from veneer.types import Factors, HostShape, Override, Primitive, Site


def _parse(config: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    found: dict[str, Any] = {"block": config.get("oft_block_size", 32), "blocks": config.get("r", 0)}
    return found | {"cayley": "neumann" if config.get("use_cayley_neumann", True) else "exact"}


def _decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    if "oft_block_size" not in config:
        raise ValueError("oft_block_size is missing: the file is older than PEFT 0.15, whose OFT was another one")
    version = str(config.get("peft_version") or "0")
    if config.get("use_cayley_neumann", True) and tuple(map(int, version.split(".")[:2])) < (0, 18):
        raise ValueError(f"the series of PEFT before 0.18 was another one, and the file is by version {version}")
    if tensors["oft_R.weight"].dim() != 2:
        raise ValueError(f"oft_R is {list(tensors['oft_R.weight'].shape)}, expected [blocks, b (b - 1) / 2]")
    return {"skew": tensors["oft_R.weight"]}


def _config(method: Any, parts: Sequence[Part]) -> dict[str, Any]:
    size = {"r": method.blocks, "oft_block_size": 0 if method.blocks else method.block}
    return size | {"use_cayley_neumann": method.cayley == "neumann", "peft_version": "0.18.0", "bias": "none"}


@final
class OFT(Method):
    """A rotation of a layer's input, in blocks."""

    kind: ClassVar[str] = "oft"
    site: ClassVar[Site] = "weight"
    paper: ClassVar[str] = "2306.07280"
    summary: ClassVar[str] = "W R^T, R orthogonal"
    use: ClassVar[str] = "features of the base should stay: a rotation keeps lengths and angles"
    limits: ClassVar[str] = "the block divides the layer's inputs; natively a dense copy per adapter; linear layers"
    dense: ClassVar[bool] = True
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="OFT",
        tensors={"skew": "oft_R.weight"},
        encode=lambda t: {"oft_R.weight": t["skew"]},
        decode=_decode,
        fields={"share": "block_share", "terms": "num_cayley_neumann_terms"},
        hosts=("linear",),
        config=_config,
        parse=_parse,
    )

    block: int = Field(32, ge=0, description="size of a block; it has to divide the layer's inputs")
    blocks: int = Field(0, ge=0, description="number of blocks a layer, in place of their size")
    share: bool = Field(False, description="one block for all places of a layer")
    cayley: Literal["exact", "neumann"] = Field("exact", description="exactly orthogonal, or PEFT's truncated series")
    terms: int = Field(5, ge=2, description="terms of the series")
    targets: Names = Field(("all-linear",), description="which layers carry the adapter")
    exclude: Names = Field((), description="layers to leave out")
    layers: str | tuple[int, ...] | None = Field(None, description="block numbers, or last:N, first:N")

    @model_validator(mode="after")
    def _has_a_size(self) -> Self:
        if not self.block and not self.blocks:
            raise ValueError("give the size of a block (`block`) or their number (`blocks`)")
        return self

    def refusal(self, target: str, shape: HostShape) -> str | None:
        if shape.kind not in ("linear", "conv1d"):
            return f"{shape.kind} layers take no OFT; linear layers do"
        asked = self.blocks or self.block
        if shape.in_features % asked:
            what = f"{self.blocks} blocks do" if self.blocks else f"a block of {self.block} does"
            near = _divisor(shape.in_features, asked)
            return f"{what} not divide its {shape.in_features} inputs; {near} would"
        return None

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        size, wide = self.blocks or self.block, shape.in_features
        size = size if wide % size == 0 else _divisor(wide, size)  # PEFT's rule, for its files
        size = wide // size if self.blocks else size
        return {"skew": (1 if self.share else wide // size, size * (size - 1) // 2)}

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        return {"skew": torch.zeros(self.tensor_shapes(target, host.shape)["skew"])}

    def rotation(self, part: Part, wide: int) -> Tensor:
        """The blocks of R, `[wide / b, b, b]`."""
        packed = part.tensors["skew"]
        size = (1 + math.isqrt(1 + 8 * packed.shape[1])) // 2
        rows, columns = torch.triu_indices(size, size, 1)
        upper = packed.new_zeros(packed.shape[0], size, size).index_put((_each(packed), rows, columns), packed)
        skew = upper - upper.mT
        one = torch.eye(size, dtype=packed.dtype, device=packed.device).expand_as(skew)
        if self.cayley == "exact":
            turned: Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
        else:
            turned = _series(one, skew, self.terms)
        return turned.expand(wide // size, size, size)

    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        blocks = self.rotation(part, x.shape[-1])
        return host.apply(_turned(x.to(blocks.dtype), blocks).to(x.dtype))

    def _weight(self, part: Part, host: Host, dtype: torch.dtype) -> Tensor:
        return _turned(host.weight().to(dtype), self.rotation(part, host.shape.in_features).to(dtype).mT)

    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        weight = self._weight(part, host, part.tensors["skew"].dtype)
        return (Override((weight.t() if host.shape.kind == "conv1d" else weight).contiguous()),)

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        return self._weight(part, host, torch.float32), host.bias


def _each(packed: Tensor) -> Tensor:
    """`[blocks, 1]`: the first index of every entry of a packed triangle."""
    return torch.arange(packed.shape[0], device=packed.device)[:, None]


def _turned(x: Tensor, blocks: Tensor) -> Tensor:
    """x R for x `[..., in]`."""
    count, size, _ = blocks.shape
    return torch.einsum("...nk,nkc->...nc", x.unflatten(-1, (count, size)), blocks).flatten(-2)


def _series(one: Tensor, skew: Tensor, terms: int) -> Tensor:
    """PEFT's truncation of (I + Q)(I - Q)^-1: I + 2Q + 2Q^2 + ... with the last power once."""
    total, power = one + 2 * skew, skew
    if terms == 2:
        return total
    for _ in range(2, max(3, terms - 1)):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew


def _divisor(wide: int, asked: int) -> int:
    """The divisor of `wide` next to `asked`, the smaller one of two equally near."""
    return min((d for d in range(1, wide + 1) if wide % d == 0), key=lambda d: (abs(d - asked), d))
