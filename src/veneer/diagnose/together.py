"""Whether an adapter and a base belong together, and what the adapter does to the base's weights."""

from __future__ import annotations

from typing import Protocol

from veneer.adapter import Adapter
from veneer.base.host import Host
from veneer.base.identity import KnownBase, compare
from veneer.diagnose.adapter import factors
from veneer.diagnose.finding import Finding
from veneer.errors import BaseMismatch
from veneer.ops.spectra import low_rank_singular_values

OVERWHELMING = 0.5
"""||delta|| / ||W|| above which an adapter replaces a layer more than it adapts it."""


class Loaded(KnownBase, Protocol):
    """A base with its weights at hand."""

    def host(self, target: str) -> Host: ...


def pair_findings(adapter: Adapter, base: Loaded, template: str | None = None) -> list[Finding]:
    """Findings about an adapter on a base. `template` is the base's chat template."""
    unmatched = [t for t in adapter.targets if t not in base.shape.hosts and _needs_host(adapter, t)]
    if unmatched:
        what = f"{len(unmatched)} of {len(adapter.targets)} targets are not layers of {base.name}, first {unmatched[0]}"
        cause = "the adapter belongs to another architecture, or its module paths carry another prefix"
        return [Finding("error", "adapter on base", what, cause, "use the base it was trained on")]
    try:
        verdict = compare(adapter, base)
    except BaseMismatch as error:
        cause = "the weights are another revision, another fine-tune, or another model of the same shape"
        return [Finding("error", "adapter on base", error.message, cause, error.help or "use its own base")]
    found = []
    if verdict.outcome == "unverified":
        cause = "files of other tools do not record the weights they were trained on"
        fix = "load it on its base and save it again to record the base"
        found.append(
            Finding("note", "adapter on base", "base unverified: only names and shapes were compared", cause, fix)
        )
    return found + _tied(adapter, base) + _overwhelming(adapter, base) + _templates(adapter, template)


def _needs_host(adapter: Adapter, target: str) -> bool:
    return any(p.target == target and p.site == "weight" for p in adapter.parts)


def _tied(adapter: Adapter, base: Loaded) -> list[Finding]:
    shape = base.shape
    tied = {t for t, h in shape.hosts.items() if h.kind == "embedding"} | {shape.head}
    touched = sorted(t for t in tied & set(adapter.targets) if _needs_host(adapter, t))
    if not shape.tied_head or not touched:
        return []
    what = f"it adapts {' and '.join(touched)} of a base whose head is its embedding"
    fix = "fine as an adapter; `veneer merge` needs --untie"
    return [Finding("note", "adapter on base", what, "one tensor serves both ends of the model", fix)]


def _overwhelming(adapter: Adapter, base: Loaded) -> list[Finding]:
    ratios: dict[str, float] = {}
    for part in adapter.parts:
        pair = factors(adapter, part)
        if pair is not None and part.target is not None and part.target in base.shape.hosts:
            weight = float(base.host(part.target).weight().float().norm())
            ratios[part.target] = float(low_rank_singular_values(pair[1], pair[0]).norm()) / max(weight, 1e-30)
    large = [t for t, ratio in ratios.items() if ratio > OVERWHELMING]
    if not large:
        return []
    top = max(large, key=lambda t: ratios[t])
    what = f"the update is larger than half the weight in {len(large)} places (most: {top}, {ratios[top]:.1f} times)"
    fix = "scale it down (PATH@0.5), or train again with a lower learning rate or alpha"
    return [Finding("warning", "adapter on base", what, "too high a learning rate or scale, or too long a run", fix)]


def _templates(adapter: Adapter, template: str | None) -> list[Finding]:
    trained = adapter.provenance.chat_template
    if trained is None or template is None or trained == template:
        return []
    cause = "the tokenizer was updated since, or the adapter was trained with a template of its own"
    fix = "answer with the template it was trained with: it is in the adapter's veneer.json"
    return [Finding("warning", "adapter on base", "trained with another chat template than the base's", cause, fix)]
