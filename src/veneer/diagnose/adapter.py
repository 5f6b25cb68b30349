"""What an adapter's own tensors and fields give away, without a base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from veneer.adapter import Adapter, Part
from veneer.diagnose.finding import Finding
from veneer.errors import VeneerError
from veneer.methods import complete, method_of
from veneer.ops.spectra import low_rank_singular_values

LARGE_SCALE = 32.0
SMALL_SCALE = 1e-2
UNEVEN = 1e3
"""Ratio of the largest to the median update norm that says that one layer ran away."""


def file_findings(path: Path) -> tuple[Adapter | None, list[Finding]]:
    """Load an adapter folder, and say why where that fails."""
    try:
        return Adapter.load(path), []
    except VeneerError as error:
        cause = "the folder is damaged, incomplete, or not an adapter"
        return None, [Finding("error", str(path), error.message, cause, error.help or "fetch or train it again")]


def adapter_findings(adapter: Adapter) -> list[Finding]:
    """Non-finite and dead tensors, updates that are zero, scales that surprise, patterns that match nothing."""
    found = _non_finite(adapter)
    if found:
        return found
    return [*_zero(adapter), *_scales(adapter), *_uneven(adapter), *_patterns(adapter)]


def _non_finite(adapter: Adapter) -> list[Finding]:
    bad = [
        f"{part.target or 'the whole model'} {name}"
        for part in adapter.parts
        for name, tensor in part.tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if not bad:
        return []
    cause = "a training run went on after its loss was no longer finite, or the file is damaged"
    return [
        Finding("error", "adapter", f"values are not finite: {_some(bad)}", cause, "go back to the last checkpoint")
    ]


def _zero(adapter: Adapter) -> list[Finding]:
    """Parts that change nothing, and tensors of a product that are zero on both sides."""
    places = [p for p in adapter.parts if p.target is not None]
    idle = [p for p in places if _is_idle(adapter, p)]
    if idle and len(idle) == len(adapter.parts):
        cause = "it was saved before its first step, its learning rate is zero, or the wrong folder was saved"
        return [
            Finding("error", "adapter", "it changes nothing: every update is zero", cause, "train it, or find its run")
        ]
    stuck = [p for p in idle if all(not bool(p.tensors[n].any()) for n in ("A", "B") if n in p.tensors)]
    found = []
    if (stuck and len(stuck) < len(idle)) or (stuck and "A" in stuck[0].tensors):
        cause = "A and B are both zero, so neither ever gets a gradient"
        names = [str(p.target) for p in stuck]
        found.append(Finding("error", "adapter", f"dead for good: {_some(names)}", cause, "use another init"))
    rest = [str(p.target) for p in idle if p not in stuck]
    if rest:
        cause = "no gradient reached these layers: they are frozen, unused, or below the last layer that training ran"
        fix = "leave them out of targets, or look for the layer that cuts them off"
        found.append(
            Finding(
                "warning", "adapter", f"no update in {len(rest)} of {len(places)} places: {_some(rest)}", cause, fix
            )
        )
    return found


def _is_idle(adapter: Adapter, part: Part) -> bool:
    """Whether the part leaves every weight as it is, as far as its own tensors tell."""
    direct = factors(adapter, part)
    if direct is not None and "magnitude" not in part.tensors:
        return not bool(direct[1].any()) or not bool(direct[0].any())
    if part.tensors.keys() <= {"in_scale", "out_scale"}:
        return all(bool((t == 1).all()) for t in part.tensors.values())
    return part.tensors.keys() == {"bias"} and part.site == "weight" and not bool(part.tensors["bias"].any())


def factors(adapter: Adapter, part: Part) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A and scale * B in fp32 of a part that has them, else None. A part that keeps its start has it subtracted."""
    t = {name: tensor.detach().float() for name, tensor in complete(adapter, part).tensors.items()}
    if part.target is None or not t.keys() >= {"A", "B"} or t["A"].dim() != 2 or "d" in t:
        return None
    scale = method_of(adapter, part).scale(part.target, t["A"].shape[0])
    if "A0" in t:
        return torch.cat([t["A"], t["A0"]]), scale * torch.cat([t["B"], -t["B0"]], dim=1)
    return t["A"], scale * t["B"]


def _scales(adapter: Adapter) -> list[Finding]:
    scaled = {
        p.target: adapter.scale(p.target)
        for p in adapter.parts
        if p.target and "A" in p.tensors and p.kind == adapter.spec.kind
    }
    fields = adapter.spec.model_dump()
    found = []
    for word, odd in (
        ("large", [t for t, s in scaled.items() if s > LARGE_SCALE]),
        ("small", [t for t, s in scaled.items() if s < SMALL_SCALE]),
    ):
        if odd:
            rule = fields.get("scaling", "alpha/r")
            cause = f"alpha {fields.get('alpha')} with {rule}, rank {fields.get('rank')}" + (
                "; an alpha meant for alpha/r is sqrt(r) times stronger under alpha/sqrt(r)"
                if rule == "alpha/sqrt(r)"
                else ""
            )
            what = f"the effective scale is {word}: {scaled[odd[0]]:.4g} at {_some(odd)}"
            found.append(
                Finding(
                    "warning", "adapter", what, cause, "set alpha and scaling on purpose (a scale of 1 to 4 is usual)"
                )
            )
    return found


def _uneven(adapter: Adapter) -> list[Finding]:
    norms: dict[str, float] = {}
    for part in adapter.parts:
        pair = factors(adapter, part)
        if pair is not None and part.target is not None:
            norms[part.target] = float(low_rank_singular_values(pair[1], pair[0]).norm())
    values = sorted(norms.values())
    if len(values) < 3 or values[len(values) // 2] == 0:
        return []
    median, top = values[len(values) // 2], max(norms, key=lambda t: norms[t])
    if norms[top] < UNEVEN * median:
        return []
    what = f"the update of {top} is {norms[top] / median:.0f} times the median"
    return [
        Finding("warning", "adapter", what, "one layer ran away during training", "lower the learning rate, or clip")
    ]


def _patterns(adapter: Adapter) -> list[Finding]:
    fields = adapter.spec.model_dump()
    idle = [
        f"{name} '{key}'"
        for name in ("rank_pattern", "alpha_pattern")
        for key in fields.get(name) or {}
        if not any(re.match(rf"(.*\.)?({key})$", target) for target in adapter.targets)
    ]
    if not idle:
        return []
    cause = "the key is a regular expression for the end of a module path, and no target ends that way"
    return [Finding("warning", "adapter", f"patterns that match nothing: {_some(idle)}", cause, "correct the keys")]


def _some(names: Sequence[str], limit: int = 3) -> str:
    told = ", ".join(str(n) for n in names[:limit])
    return told if len(names) <= limit else f"{told} and {len(names) - limit} more"
