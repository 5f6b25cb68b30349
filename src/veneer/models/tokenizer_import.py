"""Tokenizer files for the cache: copied where the checkpoint has a tokenizer.json, else made once by transformers.

Importing transformers costs seconds, so it happens at conversion only; later starts read the files made here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer.errors import Unsupported
from veneer.models.pre_tokenizer import Cut, cut_as
from veneer.models.tokenizer import MORE_TEMPLATES

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    f"{MORE_TEMPLATES}/*.jinja",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Names and patterns of names below a checkpoint's folder."""
SOURCES = ("tokenizer.model", "vocab.json")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that say how text becomes tokens."""
    return [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern)) if file.is_file()]


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The same files in another folder."""
    for file in tokenizer_files(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def copy_or_import(source: Path, folder: Path) -> None:
    """The tokenizer files of a checkpoint folder; nothing where it has none."""
    copy_tokenizer(source, folder)
    if not (folder / "tokenizer.json").exists() and any((source / name).is_file() for name in SOURCES):
        from transformers import AutoTokenizer

        with _quiet():
            AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)


def from_gguf(path: Path, folder: Path, cut: Cut | None, adds_bos: bool | None, adds_space: bool | None) -> None:
    """The tokenizer, its special tokens and the chat template out of a .gguf file's metadata.

    cut       how a byte-level BPE cuts text: transformers knows some of the names only, and takes GPT-2's way for the others
    adds_bos, adds_space  whether texts begin with BOS, and with a space (sentencepiece), None where the file does not say so
    """
    from transformers import PreTrainedTokenizerFast

    more: dict[str, Any] = {"add_bos_token": True} if adds_bos is None and cut is not None and cut.adds_bos else {}
    with _quiet():
        try:
            made = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name, **more)
        except (ValueError, KeyError) as error:
            raise Unsupported(
                f"the tokenizer in {path} cannot be read: {error}",
                help="load the checkpoint's folder or hub id instead: it has a tokenizer.json",
            ) from error
        made.save_pretrained(folder)
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text("utf-8"))
    if cut is not None:
        data = cut_as(data, cut)
    elif adds_space is False:
        data = _without_space(data)
    file.write_text(json.dumps(data, ensure_ascii=False), "utf-8")


def _without_space(data: dict[str, Any]) -> dict[str, Any]:
    """A sentencepiece tokenizer.json that begins no text with a space, and takes none away; transformers always does."""
    cut = data.get("pre_tokenizer") or {}
    if cut.get("type") == "Metaspace":
        data["pre_tokenizer"] = {**cut, "prepend_scheme": "never"}
    for key, steps, added in (("normalizer", "normalizers", "Prepend"), ("decoder", "decoders", "Strip")):
        if data.get(key) and steps in data[key]:
            data[key][steps] = [step for step in data[key][steps] if step["type"] != added]
    return data


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice about files that are not there."""
    from transformers.utils import logging

    loudness = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(loudness)
