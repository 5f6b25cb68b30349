"""Two adapters side by side: what their configurations say, and how their updates differ.

A low-rank update s B A is never made dense. With B = Q R and A^T = P S (thin QR), s B A = Q (s R S^T) P^T: the
singular values are those of a rank x rank core. The difference of two updates is [s1 B1, -s2 B2] [A1; A2], the same
again with the ranks added.

overlap = |U1^T U2|_F^2 / min(k1, k2) over the output directions of the two updates (1: one contains the other, 0:
orthogonal), where k counts singular values above 1e-6 of the largest. The surprise: overlap says nothing about size,
and a scaled copy has overlap 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from veneer.adapter import Adapter, Part

if TYPE_CHECKING:
    from torch import Tensor

NEGLIGIBLE = 1e-6


@dataclass(frozen=True, slots=True)
class TargetDifference:
    """One part of both adapters.

    norm         Frobenius norms of the two updates (of the tensors themselves for methods without a scaled product)
    rank         numerical ranks, None for methods without a scaled product
    stable_rank  |delta|_F^2 / |delta|_2^2, None likewise
    distance     |delta1 - delta2|_F / max(norm)
    cosine       of the two updates as vectors; None where one is zero
    overlap      of their output subspaces; None where one is zero or there is no product
    """

    target: str
    kind: str
    norm: tuple[float, float]
    rank: tuple[int, int] | None
    stable_rank: tuple[float, float] | None
    distance: float
    cosine: float | None
    overlap: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """How two adapters differ.

    config       field -> (value in one, value in other), where they differ
    only_one     targets that only the first adapts; `only_other` likewise
    targets      the targets that both adapt
    """

    same: bool
    config: Mapping[str, tuple[Any, Any]]
    only_one: tuple[str, ...]
    only_other: tuple[str, ...]
    targets: tuple[TargetDifference, ...]


def difference(one: Adapter, other: Adapter) -> Difference:
    """Compare two adapters; no base is needed."""
    mine, theirs = _parts(one), _parts(other)
    shared = [key for key in mine if key in theirs and _comparable(mine[key], theirs[key])]
    return Difference(
        same=one.digest == other.digest,
        config=_config(one, other),
        only_one=tuple(_label(key) for key in mine if key not in shared),
        only_other=tuple(_label(key) for key in theirs if key not in shared),
        targets=tuple(_compare(one, other, mine[key], theirs[key]) for key in shared),
    )


def _parts(adapter: Adapter) -> dict[tuple[str, str], Part]:
    return {(part.target or "", part.kind): part for part in adapter.parts}


def _label(key: tuple[str, str]) -> str:
    target, kind = key
    return target or f"({kind})"


def _comparable(one: Part, other: Part) -> bool:
    """Two products of one size, or the same tensors of the same shapes."""
    if _is_product(one) and _is_product(other):
        return all(_outer(one, name) == _outer(other, name) for name in ("A", "B"))
    shapes = [{name: tuple(tensor.shape) for name, tensor in part.tensors.items()} for part in (one, other)]
    return shapes[0] == shapes[1]


def _is_product(part: Part) -> bool:
    return all(name in part.tensors and part.tensors[name].dim() == 2 for name in ("A", "B"))


def _outer(part: Part, name: str) -> int:
    return part.tensors[name].shape[1 if name == "A" else 0]


def _config(one: Adapter, other: Adapter) -> dict[str, tuple[Any, Any]]:
    sides = []
    for adapter in (one, other):
        known = adapter.provenance
        fields = {"kind": adapter.spec.kind, **adapter.spec.model_dump(mode="json")}
        told = {"base": known.base, "base_name": known.base_name, "trained_on": known.trained_on, "data": known.data}
        sides.append({**fields, **told, "chat_template": known.chat_template, "parents": list(known.parents)})
    names = dict.fromkeys([*sides[0], *sides[1]])
    pairs = {name: (sides[0].get(name), sides[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _compare(one: Adapter, other: Adapter, mine: Part, theirs: Part) -> TargetDifference:
    if _is_product(mine) and _is_product(theirs):
        return _compare_products(mine, _factors(one, mine), _factors(other, theirs))
    import torch

    flat = [
        torch.cat([part.tensors[name].double().flatten() for name in sorted(part.tensors)]) for part in (mine, theirs)
    ]
    norms = float(flat[0].norm()), float(flat[1].norm())
    gap = float((flat[0] - flat[1]).norm())
    dot = float(flat[0] @ flat[1])
    return TargetDifference(
        mine.target or f"({mine.kind})",
        mine.kind,
        norms,
        None,
        None,
        _ratio(gap, max(norms)),
        _cosine(dot, norms),
        None,
    )


def _compare_products(part: Part, mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> TargetDifference:
    import torch

    (a1, b1), (a2, b2) = mine, theirs
    values1, left1 = _spectrum(a1, b1)
    values2, left2 = _spectrum(a2, b2)
    gap, _ = _spectrum(torch.cat([a1, a2]), torch.cat([b1, -b2], dim=1))
    norms = float(values1.norm()), float(values2.norm())
    ranks = _rank(values1), _rank(values2)
    dot = float(((b1.T @ b2) * (a1 @ a2.T)).sum())
    overlap = None
    if min(ranks) > 0:
        shared = float((left1[:, : ranks[0]].T @ left2[:, : ranks[1]]).square().sum())
        overlap = min(1.0, shared / min(ranks))
    return TargetDifference(
        target=part.target or f"({part.kind})",
        kind=part.kind,
        norm=norms,
        rank=ranks,
        stable_rank=(_stable_rank(values1), _stable_rank(values2)),
        distance=_ratio(float(gap.norm()), max(norms)),
        cosine=_cosine(dot, norms),
        overlap=overlap,
    )


def _factors(adapter: Adapter, part: Part) -> tuple[Tensor, Tensor]:
    """A `[rank, in]` and scale * B `[out, rank]` in fp64, the frozen start of a shifted init subtracted."""
    import torch

    a, b = part.tensors["A"].double(), part.tensors["B"].double()
    scale = adapter.spec.scale(part.target or "", a.shape[0])
    if "A0" in part.tensors:
        a = torch.cat([a, part.tensors["A0"].double()])
        b = torch.cat([b, -part.tensors["B0"].double()], dim=1)
    return a, scale * b


def _spectrum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of B A, largest first, and its left singular vectors `[out, rank]`."""
    import torch

    q, r = torch.linalg.qr(b)
    _, s = torch.linalg.qr(a.T)
    u, values, _ = torch.linalg.svd(r @ s.T, full_matrices=False)
    return values, q @ u


def _rank(values: Tensor) -> int:
    return int((values > NEGLIGIBLE * values.max()).sum()) if values.numel() else 0


def _stable_rank(values: Tensor) -> float:
    return _ratio(float(values.square().sum()), float(values.max()) ** 2)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _cosine(dot: float, norms: tuple[float, float]) -> float | None:
    return max(-1.0, min(1.0, dot / (norms[0] * norms[1]))) if min(norms) > 0 else None
