"""What is checked and written down about an adapter on its way into the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from veneer.adapter import Adapter
from veneer.errors import ConfigError, FormatError
from veneer.library.blobs import DIGEST
from veneer.library.records import Version
from veneer.library.source import Staged

if TYPE_CHECKING:
    from veneer.base.identity import KnownBase, Verdict


def belonging(adapter: Adapter, base: KnownBase | None, allow: str | None) -> Verdict | None:
    """How the adapter and the base belong together; None without a base. BaseMismatch unless `allow` says why."""
    if allow is not None and not allow.strip():
        raise ConfigError("a base mismatch needs a reason", help="--allow-base-mismatch 'same weights, renamed layers'")
    if base is None:
        return None
    from veneer.base.identity import compare

    return compare(adapter, base, allow=allow)


def facts_of(staged: Staged, base: KnownBase | None, verdict: Verdict | None) -> dict[str, Any]:
    """What the catalogue says about an adapter, besides its name, number and date."""
    adapter = staged.adapter
    ranks = {part.tensors["A"].shape[0] for part in adapter.parts if "A" in part.tensors and "B" in part.tensors}
    return {
        "digest": adapter.digest,
        "base": adapter.provenance.base if base is None else base.identity,
        "base_name": adapter.provenance.base_name if base is None else base.name,
        "belongs": "unchecked" if verdict is None else verdict.outcome,
        "method": adapter.spec.kind,
        "rank": int(max(ranks)) if ranks else None,
        "targets": len(adapter.targets),
        "parameters": adapter.num_parameters,
        "bytes": sum(file.bytes for file in staged.files),
    }


def story_of(adapter: Adapter, verdict: Verdict | None) -> dict[str, Any]:
    """What the manifest says besides: it is read by `show`."""
    return {
        "spec": {"kind": adapter.spec.kind, **adapter.spec.model_dump(mode="json")},
        "provenance": provenance_of(adapter),
        "belonging": None if verdict is None else {"outcome": verdict.outcome, "detail": verdict.detail},
    }


def check_parents(adapter: Adapter) -> tuple[str, ...]:
    """The digests of the adapters that this one says it was made from."""
    strange = [parent for parent in adapter.provenance.parents if DIGEST.fullmatch(parent) is None]
    if strange:
        raise FormatError(f"the adapter names a parent that is not a digest: {strange[0][:80]!r}")
    return adapter.provenance.parents


def provenance_of(adapter: Adapter) -> dict[str, Any]:
    """Where the adapter came from, without the sampled values (they stay in its own file)."""
    known = adapter.provenance
    told = {
        "base": known.base,
        "base_name": known.base_name,
        "trained_on": known.trained_on,
        "data": known.data,
        "chat_template": known.chat_template,
        "extra": dict(known.extra) or None,
    }
    return {key: value for key, value in told.items() if value is not None}


def unchanged(there: Version, facts: Mapping[str, Any], dropped: Sequence[str]) -> tuple[str, ...]:
    """What to say about an adapter that is in the library already. `dropped` was given with it and isn't kept."""
    notes = [f"this adapter is {there.ref} already"]
    if facts["base"] != there.base:
        notes.append(
            f"it stays with the base it was accepted for ({there.base_name or 'none'}): a version never changes"
        )
    if dropped:
        notes.append(f"given and not kept, as a version never changes: {', '.join(dropped)}")
    return tuple(notes)
