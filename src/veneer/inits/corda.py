"""CorDA: the weight's directions that matter for the inputs it sees, or those that don't; arXiv 2406.05223.

    C = mean of x x^T over the inputs + 0.01 mean(diag) I        W C = U S V^T        W = U S (V^T C^-1)
    B0 = U_k sqrt(S_k / s)        A0 = sqrt(S_k / s) V_k^T C^-1        k: the first r (corda) or the last r (corda_kpm)

corda      "instruction previewed": adapt what the training rows use most. C = I gives PiSSA.
corda_kpm  "knowledge preserving": adapt what general text uses least, so C comes from `data.general`.

Both shift the base. The first r minimise |(W - M) C| over all M of rank r.

The surprise: other implementations double the damping until C C^-1 is near I; in fp64 the first value is always enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.base.host import Host
from veneer.errors import ConfigError
from veneer.inits._abstract import GENERAL, InitStats, init, need
from veneer.types import Factors

DAMPING = 0.01
"""Share of the mean variance that is added to every direction."""


@init("corda", needs=("covariance",), paper="2406.05223")
def corda(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """The rank-r part of W that the training rows' inputs use most."""
    return _oriented(host, slice(0, rank), scale, _covariance(stats, "corda"))


@init("corda_kpm", needs=("covariance", GENERAL), paper="2406.05223")
def corda_kpm(host: Host, rank: int, scale: float, stats: InitStats | None, generator: torch.Generator) -> Factors:
    """The rank-r part of W that general text uses least."""
    return _oriented(host, slice(-rank, None), scale, _covariance(stats, "corda_kpm"))


def _covariance(stats: InitStats | None, name: str) -> Tensor:
    return need(stats.covariance if stats else None, "the inputs' covariance", name).double()


def _oriented(host: Host, kept: slice, scale: float, covariance: Tensor) -> Factors:
    variance = covariance.diagonal().mean()
    if not float(variance) > 0:
        raise ConfigError(
            f"init: corda saw no input at a layer of {host.shape.in_features} in, {host.shape.out_features} out",
            help="calibrate on other rows, or use init: pissa",
        )
    damped = covariance + DAMPING * variance * torch.eye(len(covariance), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(host.weight().double() @ damped, full_matrices=False)
    root = (s[kept] / scale).sqrt()
    a = root[:, None] * torch.linalg.solve(damped, vh[kept].t()).t()
    return Factors(a.float().contiguous(), (u[:, kept] * root).float(), shifted=True)
