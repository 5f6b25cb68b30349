"""What do 4 and 8 bits cost, and what do starts that know the original weight give back? No time is measured.

formats     relative error |W - q(W)| / |W| and bits a weight of every base format, on Gaussian data and on the base
starts      what is left of NF4's error: LoftQ after 1 and 5 steps, QPiSSA (the residual quantised, a base of its own), and QPiSSA
            as veneer stores it (on the base that stays); on white weights, on a spectrum i^-0.7, and on the base

The surprise: LoftQ's later steps and QPiSSA need a base of their own for each adapter. On the shared one, the first step of LoftQ
is all there is to get.

    python benchmarks/quantization.py [--base smollm2-135m] [--rank 16] [--layers 30]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, markdown, publish
from torch import Tensor

from veneer.base.formats import load_all
from veneer.base.quantized import QuantizedHost
from veneer.inits import INITS, InitStats
from veneer.inits import load_all as load_inits
from veneer.inits.loftq import alternate
from veneer.inits.spectral import best_factors
from veneer.inject.targets import layer_of, matching
from veneer.models.load import load_base

SIDE = 1024


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def there_and_back(name: str) -> Callable[[Tensor], Tensor]:
    quantise = load_all()[name]
    return lambda weight: quantise(weight).dequantise(torch.empty(weight.shape))


def gaussian_formats(seeds: int) -> dict[str, dict[str, float]]:
    """Mean and spread of the relative error over seeds, and bits a weight."""
    found = {}
    for name, form in sorted(load_all().items()):
        errors = []
        for seed in range(seeds):
            weight = torch.randn(SIDE, SIDE, generator=generator(seed))
            errors.append(float((weight - there_and_back(name)(weight)).norm() / weight.norm()))
        bits = 8 * form.nbytes(SIDE, SIDE) / SIDE**2
        found[name] = {"error": statistics.mean(errors), "spread": statistics.pstdev(errors), "bits": bits}
    return found


def left(weight: Tensor, rank: int) -> dict[str, float]:
    """What is left of NF4's error, as norms over that of NF4 alone."""
    nf4 = there_and_back("nf4")
    held = nf4(weight)
    plain = torch.linalg.norm(weight - held)
    found = {"relative_error": float(plain / torch.linalg.norm(weight))}
    for steps in (1, 5):
        base, factors = alternate(weight, nf4, rank, 1.0, steps)
        found[f"loftq_{steps}"] = float(torch.linalg.norm(weight - base - factors.B @ factors.A) / plain)
    a, b = best_factors(weight, rank, 1.0)
    rest = weight - b @ a
    found["qpissa_own_base"] = float(torch.linalg.norm(rest - nf4(rest)) / plain)
    host = QuantizedHost(load_all()["nf4"](weight), torch.float32)
    start = INITS["qpissa"](host, rank, 1.0, InitStats(weight=weight), generator(0))
    assert start.taken is not None
    ours = held + start.B @ start.A - start.taken[1] @ start.taken[0]
    found["qpissa_shared_base"] = float(torch.linalg.norm(weight - ours) / plain)
    return found


def decaying() -> Tensor:
    """Singular values i^-0.7 between random orthogonal matrices."""
    u, v = (torch.linalg.qr(torch.randn(SIDE, SIDE, generator=generator(i))).Q for i in (1, 2))
    return u * torch.arange(1, SIDE + 1).float() ** -0.7 @ v.t()


def synthetic(rank: int) -> dict[str, dict[str, float]]:
    white = torch.randn(SIDE, SIDE, generator=generator(1))
    found = {f"white, rank {r}": left(white, r) for r in (8, 16, 64)}
    return found | {f"i^-0.7, rank {rank}": left(decaying(), rank)}


def real(name: str, rank: int, layers: int) -> dict[str, Any]:
    """Errors pooled over all projections (norm over norm), ratios as median and range over the layers."""
    base = load_base(name, dtype="float32")
    targets = [t for t in matching("all-linear", base.shape) if (layer_of(t) or 0) < layers]
    errors = {form: [0.0, 0.0] for form in load_all()}
    bits = dict.fromkeys(errors, 0.0)
    ratios: list[dict[str, float]] = []
    numbers = 0
    for target in targets:
        weight = base.host(target).weight().float()
        numbers += weight.numel()
        for form in errors:
            errors[form][0] += float((weight - there_and_back(form)(weight)).square().sum(dtype=torch.float64))
            errors[form][1] += float(weight.square().sum(dtype=torch.float64))
            bits[form] += 8 * load_all()[form].nbytes(*weight.shape)
        ratios.append(left(weight, rank))
    return {
        "base": name,
        "layers": len(targets),
        "rank": rank,
        "formats": {f: {"error": (e / w) ** 0.5, "bits": bits[f] / numbers} for f, (e, w) in sorted(errors.items())},
        "starts": {key: _spread(r[key] for r in ratios) for key in ratios[0]},
    }


def _spread(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "least": ordered[0], "most": ordered[-1]}


def page(found: dict[str, Any]) -> str:
    """Both tables."""
    gauss, own = found["gaussian"], found["real"]
    head = ["format", "bits a weight", "error, Gaussian", f"bits, {own['base']}", f"error, {own['base']}"]
    rows = []
    for name, row in gauss.items():
        held = own["formats"][name]
        rows.append([name, f"{row['bits']:.3f}", f"{row['error']:.4f}", f"{held['bits']:.3f}", f"{held['error']:.4f}"])
    text = markdown(head, rows) + "\nWhat is left of NF4's error, 1 = all of it:\n\n"
    keys = ("relative_error", "loftq_1", "loftq_5", "qpissa_own_base", "qpissa_shared_base")
    head = [
        "weights",
        "NF4's own error",
        "LoftQ, 1 step",
        "5 steps, own base",
        "QPiSSA, own base",
        "qpissa, shared base",
    ]
    rows = [[name, *(f"{row[key]:.4f}" for key in keys)] for name, row in found["synthetic"].items()]
    cells = [own["starts"][key] for key in keys]
    told = [f"{c['median']:.4f} ({c['least']:.4f}-{c['most']:.4f})" for c in cells]
    return text + markdown(head, [*rows, [f"{own['base']}, rank {own['rank']}, {own['layers']} layers", *told]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=10**6, help="only the first so many blocks")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for quantization.json and .md")
    asked = parser.parse_args()
    load_inits()
    found = {
        "gaussian": gaussian_formats(5),
        "synthetic": synthetic(asked.rank),
        "real": real(asked.base, asked.rank, asked.layers),
    }
    publish("quantization", found, page(found), asked.out)


if __name__ == "__main__":
    main()
