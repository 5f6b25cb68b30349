"""The chat template that an adapter folder carries, as transformers writes it beside PEFT's files.

`chat_template.jinja`, or the `chat_template` of `tokenizer_config.json` (a text, or a list with one called "default"). It becomes
`Provenance.chat_template`, which serving uses for the adapter's chat requests in place of the base's. A template that is not
valid, or another one than `veneer.json` says the data was rendered with, is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.adapter import Adapter
from veneer.errors import FormatError
from veneer.formats.checkpoint import plain_file, read_json

TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
MAX_TEMPLATE = 1 << 18


def with_template(adapter: Adapter, folder: Path) -> Adapter:
    """The adapter with the template of its folder; itself where there is none."""
    found = carried(folder)
    known = adapter.provenance.chat_template
    if found is None or found[1] == known:
        return adapter
    file, template = found
    if known is not None:
        raise FormatError(
            f"{folder}: the chat template in {file} is not the one that veneer.json says its data was rendered with",
            help=f"delete {file}, or veneer.json if the template was changed on purpose",
        )
    return replace(adapter, provenance=replace(adapter.provenance, chat_template=template))


def carried(folder: Path) -> tuple[str, str] | None:
    """The file that holds a template, and the template; None where no file does."""
    if _there(folder / TEMPLATE):
        path = plain_file(folder, TEMPLATE)
        size = path.stat().st_size
        if size > MAX_TEMPLATE:
            raise FormatError(f"{path} has {size:,} bytes; a chat template has at most {MAX_TEMPLATE:,}")
        try:
            return TEMPLATE, _valid(path.read_text("utf-8"), path)
        except UnicodeDecodeError as error:
            raise FormatError(f"{path} is not UTF-8 text: {error}") from error
    if _there(folder / SETTINGS):
        path = plain_file(folder, SETTINGS)
        template = _default(read_json(path).get("chat_template"), path)
        return None if template is None else (SETTINGS, _valid(template, path))
    return None


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _default(stated: Any, path: Path) -> str | None:
    """The one template, or of several the one called default."""
    if stated is None or isinstance(stated, str):
        return stated
    named = [entry for entry in stated if isinstance(entry, dict)] if isinstance(stated, list) else []
    found = [entry.get("template") for entry in named if entry.get("name") == "default"]
    if len(found) != 1 or not isinstance(found[0], str):
        raise FormatError(
            f'{path}: chat_template is neither a text nor a list of templates with one called "default"',
            help=f"put the template into {TEMPLATE}",
        )
    return found[0]


def _valid(template: str, path: Path) -> str:
    from veneer.models.chat import ChatTemplate  # brings jinja2, which few adapters need

    try:
        ChatTemplate(template, {})
    except FormatError as error:
        raise FormatError(f"{path}: {error.message}", help="repair it, or delete it") from error
    return template
