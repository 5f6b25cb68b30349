"""How versions, records and differences of the library are printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from veneer.cli._output import bytes_text, count_text, say, say_table

if TYPE_CHECKING:
    from veneer.library import Alias, Difference, Record, Version


def fields(version: Version) -> dict[str, Any]:
    return {"ref": version.ref, **version._asdict()}


def base_text(version: Version) -> str:
    name = version.base_name or "not recorded"
    return name if version.belongs in ("equal", "other precision") else f"{name} ({version.belongs})"


def alias_text(alias: Alias) -> str:
    return alias.alias + share_text(alias)


def share_text(alias: Alias) -> str:
    return "" if alias.alias == "production" or alias.weight == 0 else f" ({alias.weight:.0%})"


def say_record(record: Record) -> None:
    version = record.version
    facts = {
        "version": version.ref,
        "aliases": ", ".join(alias_text(a) for a in record.aliases) or "none",
        "digest": version.digest,
        "base": f"{base_text(version)} {(version.base or '')[:12]}".strip(),
        "method": version.method,
        "configuration": _short(record.spec),
        "parameters": f"{count_text(version.parameters)} in {version.targets} targets",
        "added": f"{version.created[:19]} from {version.source}",
        "parents": ", ".join(ref or digest[:12] for digest, ref in record.parents.items()) or "none",
        "made from it": ", ".join(record.children) or "none",
        "metrics": ", ".join(f"{key} {value:.6g}" for key, value in record.metrics.items()) or "none",
        **{key: _text(value) for key, value in record.provenance.items() if key not in ("base", "base_name")},
    }
    width = max(map(len, facts))
    for key, value in facts.items():
        say(f"{key:<{width}}  {value}")
    rows = [(file.path, bytes_text(file.bytes), file.blob) for file in record.files]
    say_table(("file", "size", "sha256"), rows)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(spec: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in spec.items() if value not in (None, [], {}, "none"))


def say_difference(found: Difference, one: str, other: str) -> None:
    if found.same:
        say(f"{one} and {other} are the same adapter")
        return
    rows = [(key, json.dumps(a), json.dumps(b)) for key, (a, b) in found.config.items()]
    if rows:
        say_table(("field", one, other), rows)
    for ref, targets in ((one, found.only_one), (other, found.only_other)):
        if targets:
            say(f"only {ref}: {', '.join(targets[:8])}{f' and {len(targets) - 8} more' if len(targets) > 8 else ''}")
    say_table(
        ("target", "norm", "norm", "rank", "rank", "distance", "cosine", "overlap"),
        [
            (
                t.target,
                *(f"{norm:.4g}" for norm in t.norm),
                *(("", "") if t.rank is None else map(str, t.rank)),
                f"{t.distance:.4f}",
                "" if t.cosine is None else f"{t.cosine:.4f}",
                "" if t.overlap is None else f"{t.overlap:.4f}",
            )
            for t in found.targets
        ],
    )
