"""What to tell a user whose keys are none that we know: the nearest format, and which keys to rename."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

ALIASES = {
    "messages": ("dialog", "dialogue", "chat", "turns", "message", "conversation"),
    "conversations": ("conversation",),
    "instruction": ("instructions", "task"),
    "output": ("response", "answer"),
    "prompt": ("question", "query", "input", "source", "request"),
    "completion": ("response", "answer", "output", "target", "chosen", "label", "reply"),
    "text": ("content", "body", "document", "sentence"),
}


def advice(
    keys: Sequence[str],
    lines: Sequence[int],
    formats: Mapping[str, tuple[str, ...]],
    chosen: str | None,
    other: str | None,
) -> tuple[str, str]:
    """(what is wrong, the next step) for rows at `lines` whose keys are not those of `chosen` (None: of any format)."""
    many = f" (and {len(lines) - 1} more like it)" if len(lines) > 1 else ""
    found = f"found the keys {', '.join(keys)}{many}" if keys else f"an empty object{many}"
    if other is not None and chosen is not None:
        what = f"{found}, which is the format '{other}', but the file is read as '{chosen}'"
        return what, f"one format a file: split the file, or set format: {other} if that is what it is"
    wanted = f"format '{chosen}' needs {_and(formats[chosen])}" if chosen else "no format has these"
    candidates = {chosen: formats[chosen]} if chosen else formats
    name, renames = nearest(keys, candidates)
    if name is None:
        known = "; ".join(f"{known} ({_and(required)})" for known, required in candidates.items())
        return f"{found}; {wanted}", f"rename the keys; known: {known}"
    steps = " and ".join(f"'{old}' to '{new}'" for old, new in renames.items())
    fields = ", ".join(f"{new}: .{old}" for old, new in renames.items()) + "".join(
        f", {key}" for key in formats[name] if key not in renames.values()
    )
    what = f"{found}; {wanted}; nearest is '{name}': rename {steps}"
    return what, f"with JSON lines: jq -c '{{{fields}}}' old.jsonl > new.jsonl"


def nearest(keys: Sequence[str], formats: Mapping[str, tuple[str, ...]]) -> tuple[str | None, dict[str, str]]:
    """The format that these keys can be renamed to, and the renames, found -> wanted.

    >>> nearest(["question", "answer"], {"prompt/completion": ("prompt", "completion"), "text": ("text",)})
    ('prompt/completion', {'question': 'prompt', 'answer': 'completion'})
    """
    best: tuple[str | None, dict[str, str]] = (None, {})
    fewest = -1.0
    for name, required in formats.items():
        renames = _renames(keys, required)
        if renames is None:
            continue
        exact = (len(required) - len(renames)) / len(required)
        score = exact + len(required) / 10
        if score > fewest:
            best, fewest = (name, renames), score
    return best


def _renames(keys: Sequence[str], required: Sequence[str]) -> dict[str, str] | None:
    """found -> wanted for each wanted key that is not there, or None where one has no candidate."""
    free = [key for key in keys if key not in required]
    renames: dict[str, str] = {}
    for wanted in required:
        if wanted in keys:
            continue
        lowered = {key.lower(): key for key in free if key not in renames}
        match = next((lowered[alias] for alias in (wanted, *ALIASES[wanted]) if alias in lowered), None)
        close = difflib.get_close_matches(wanted, list(lowered), n=1, cutoff=0.75)
        if match is None and not close:
            return None
        renames[match if match is not None else lowered[close[0]]] = wanted
    return renames


def _and(keys: Sequence[str]) -> str:
    return " and ".join(f"'{key}'" for key in keys)
