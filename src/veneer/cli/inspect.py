"""Show what an adapter is: method, targets, parameters, scales, the spectrum of its updates, and where it came from.

    veneer inspect runs/tickets/adapter
    veneer inspect adapters/legal --json

Stable rank is sum sigma^2 / sigma_1^2 and effective rank exp(entropy of sigma): how many directions an update really uses. Both
come from the update itself, so they don't depend on how it is factored.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli._options import Json
from veneer.cli._output import bytes_text, count_text, say, say_json, say_table

if TYPE_CHECKING:
    from veneer.adapter import Adapter


def command(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.")],
    as_json: Json = False,
) -> None:
    from veneer.adapter import Adapter

    facts = _facts(Adapter.load(adapter))
    if as_json:
        say_json(facts)
    else:
        _tell(facts)


def _facts(adapter: Adapter) -> dict[str, Any]:
    tensors = [t for part in adapter.parts for t in part.tensors.values()]
    origin = asdict(adapter.provenance)
    origin["base_samples"] = len(adapter.provenance.base_samples)
    return {
        "kind": adapter.spec.kind,
        "spec": adapter.spec.model_dump(mode="json"),
        "digest": adapter.digest,
        "parameters": adapter.num_parameters,
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors}),
        "targets": [_place(adapter, index) for index in range(len(adapter.parts))],
        "provenance": origin,
    }


def _place(adapter: Adapter, index: int) -> dict[str, Any]:
    from veneer.diagnose.adapter import factors
    from veneer.ops.spectra import low_rank_singular_values, spectrum

    part = adapter.parts[index]
    found: dict[str, Any] = {
        "target": part.target,
        "kind": part.kind,
        "site": part.site,
        "parameters": part.num_parameters,
        "shapes": {name: list(t.shape) for name, t in part.tensors.items()},
    }
    pair = factors(adapter, part)
    if pair is not None:
        b, a = pair[1].double(), pair[0].double()
        measured = asdict(spectrum(low_rank_singular_values(b, a)))
        found |= {"rank": a.shape[0], "scale": adapter.scale(str(part.target)), "spectrum": measured}
    return found


def _tell(facts: dict[str, Any]) -> None:
    spec = ", ".join(f"{k}={v}" for k, v in facts["spec"].items() if v not in (None, {}, [], (), 0.0))
    say(f"{facts['kind']}: {spec}")
    size = f"{count_text(facts['parameters'])} parameters, {bytes_text(facts['bytes'])} ({', '.join(facts['dtypes'])})"
    say(f"{size}, {len(facts['targets'])} parts, digest {facts['digest'][:12]}")
    rows = []
    for place in facts["targets"]:
        measured = place.get("spectrum")
        numbers = ["", "", "", "", ""]
        if measured is not None:
            numbers = [
                str(place["rank"]),
                f"{place['scale']:.4g}",
                f"{measured['frobenius']:.3g}",
                f"{measured['stable_rank']:.2f}",
                f"{measured['effective_rank']:.2f}",
            ]
        rows.append([place["target"] or "(whole model)", place["kind"], *numbers, count_text(place["parameters"])])
    say_table(["target", "kind", "rank", "scale", "norm", "stable rank", "effective rank", "parameters"], rows)
    origin = facts["provenance"]
    base = f"{origin['base_name'] or 'unnamed'} {(origin['base'] or 'unverified')[:12]}"
    say(f"base: {base}, trained on {origin['trained_on'] or 'unknown'}")
    if origin["data"]:
        say(f"data: {origin['data'][:12]}")
    for parent in origin["parents"]:
        say(f"parent: {parent[:12]}")
