"""The model card of what is exported: README.md with the front matter that model hubs read.

base, method, data by its hash, metrics, lineage, licence. What isn't known is said to be unknown; nothing is guessed. The licence
of an adapter is its maker's to choose, so it is unknown until somebody says it; the base's is named beside it.

The surprise: a merged checkpoint doesn't keep its base's card in the base's place, because it would claim the base's figures for
another model. That card lies beside it as README.base.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from veneer import __version__
from veneer.adapter import Adapter
from veneer.formats.peft import expressible
from veneer.formats.veneer_json import scales

NAME = "README.md"
UNKNOWN = "unknown"

Form: TypeAlias = Literal["adapter", "merged", "gguf", "gguf-adapter", "ollama"]
LIBRARIES: Mapping[Form, str | None] = {
    "merged": "transformers",
    "gguf": "gguf",
    "gguf-adapter": "gguf",
    "ollama": None,
}
WHAT: Mapping[Form, str] = {
    "adapter": "An adapter: a small update of a frozen base model, in PEFT's files.",
    "merged": "A model: the base with the adapter added to its weights.",
    "gguf": "A .gguf model: the base with the adapter added to its weights.",
    "gguf-adapter": "An adapter for llama.cpp, to be used with the base as a .gguf file.",
    "ollama": "Files for Ollama: a .gguf model and a Modelfile.",
}


@dataclass(frozen=True)
class Story:
    """What is known besides the adapter itself. Everything may be missing.

    metrics       figure by name, as it was recorded
    data          split -> SHA-256 of its rows
    licence       of what is exported, if somebody said it
    base_licence  of the base, with who says so: ("Apache-2.0", "veneer's catalogue")
    parents       digest -> a name for it, where one is known
    facts         further lines of the card: what -> text
    """

    name: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    licence: str | None = None
    base_licence: tuple[str, str] | None = None
    parents: Mapping[str, str | None] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


def card(adapter: Adapter, story: Story, form: Form = "adapter", base_name: str | None = None) -> str:
    """The text of README.md. `base_name` is what the user calls the base, where the adapter doesn't say."""
    base = adapter.provenance.base_name or base_name
    sections = [
        _front_matter(adapter, story, form, base),
        f"# {_line(story.name) or 'Unnamed'}\n\n{WHAT[form]}\n",
        _table("Base", _base(adapter, base, story)),
        _table("Method", _method(adapter)),
        _table("Data", _data(adapter, story)),
        _table("Metrics", _metrics(story, form)),
        *([_table("How it was written", story.facts)] if story.facts else []),
        _table("Lineage", _lineage(adapter, story)),
        _table("Licence", _licence(story)),
    ]
    return "\n".join([*sections, f"Written by veneer {__version__}. What is unknown was not recorded.\n"])


def _front_matter(adapter: Adapter, story: Story, form: Form, base: str | None) -> str:
    library = ("peft" if expressible(adapter) else None) if form == "adapter" else LIBRARIES[form]
    fields: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "adapter" if "adapter" in form else "finetune",
        "library_name": library,
        "license": (story.licence or UNKNOWN).lower(),
        "tags": ["veneer", adapter.spec.kind],
        "metrics": sorted(story.metrics) or None,
    }
    known = {key: value for key, value in fields.items() if value is not None}
    if base is None:
        del known["base_model_relation"]
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---\n"


def _base(adapter: Adapter, base: str | None, story: Story) -> dict[str, str]:
    told = adapter.provenance
    return {
        "name": base or UNKNOWN,
        "identity (SHA-256 of its weights)": told.base or UNKNOWN,
        "trained on": told.trained_on or UNKNOWN,
        "chat template": "kept with the adapter" if told.chat_template else UNKNOWN,
        "licence": f"{story.base_licence[0]} (says {story.base_licence[1]})" if story.base_licence else UNKNOWN,
    }


def _method(adapter: Adapter) -> dict[str, str]:
    chosen = {k: v for k, v in adapter.spec.model_dump(mode="json").items() if v not in (None, [], {}, ())}
    different = sorted(set(scales(adapter).values()))
    found = {
        "kind": adapter.spec.kind,
        "targets": str(len(adapter.targets)),
        "parameters": f"{adapter.num_parameters:,}",
    }
    if different:
        found["effective scale"] = ", ".join(f"{scale:g}" for scale in different[:8])
    return found | {"fields": json.dumps(chosen, ensure_ascii=False, default=str)}


def _data(adapter: Adapter, story: Story) -> dict[str, str]:
    by_split = {f"{split} (SHA-256)": digest for split, digest in story.data.items()}
    return by_split or {"training rows (SHA-256)": adapter.provenance.data or UNKNOWN}


def _metrics(story: Story, form: Form) -> dict[str, str]:
    found = {name: f"{value:.6g}" for name, value in sorted(story.metrics.items())}
    if found and form not in ("adapter", "gguf-adapter"):
        found["measured on"] = "the base with the adapter beside it, before the two were merged"
    return found


def _lineage(adapter: Adapter, story: Story) -> dict[str, str]:
    parents = {digest: None for digest in adapter.provenance.parents} | dict(story.parents)
    found = {"digest": adapter.digest}
    for number, (digest, name) in enumerate(parents.items(), 1):
        found[f"made from, {number}"] = f"{name} ({digest})" if name else digest
    if not parents:
        found["made from"] = "no other adapter is recorded"
    rule = adapter.provenance.extra.get("combination")
    if isinstance(rule, Mapping):
        found["combined by"] = f"{rule.get('rule', UNKNOWN)}, relative error {rule.get('error', UNKNOWN)}"
    return found


def _licence(story: Story) -> dict[str, str]:
    return {"licence": story.licence or f"{UNKNOWN}: whoever made it has not said; the base's terms hold in any case"}


def _table(title: str, rows: Mapping[str, str]) -> str:
    if not rows:
        return f"## {title}\n\n{UNKNOWN}: none was recorded.\n"
    lines = [f"| {_line(key)} | {_line(text)} |" for key, text in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines, ""])


def _line(text: str) -> str:
    """One cell of a table, whatever a stranger's file says."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def licence_in(folder: Path | None) -> tuple[str, str] | None:
    """The licence that the card in a model's folder states, with who says so; None where it states none."""
    if folder is None or not (folder / NAME).is_file():
        return None
    text = (folder / NAME).read_text("utf-8", errors="replace")[:65536]
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return None
    try:
        fields = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except (yaml.YAMLError, RecursionError):
        return None
    found = fields.get("license") if isinstance(fields, dict) else None
    return (found, "its own card") if isinstance(found, str) and found.strip() else None
