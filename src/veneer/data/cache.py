"""Encoded data on disk, mapped, and keyed by everything that went into it.

The key is a hash of the file's bytes, the format, template, tokenizer, mask policy and length policy: an entry is never stale. It
appears all at once (`files.py`), so of two processes that encode the same data each finds a whole entry.

The surprise: a template that writes the date into its prompt keeps that of the day when the data was encoded, so a run that is
resumed after midnight goes on with the tokens that it began with.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from veneer.data.masking import TextTokenizer, TrainOn
from veneer.data.read import file_digest, load
from veneer.data.tokens import Dataset, OnTooLong, check_choices, encode
from veneer.files import cache_folder, replacing

LAYOUT = 2
"""Raise when encoding changes what it gives for the same input."""

ARRAYS = ("tokens", "weights", "offsets", "lines", "bytes")

log = logging.getLogger(__name__)


def prepare(
    path: str | Path,
    tokenizer: TextTokenizer,
    *,
    format: str = "auto",
    max_length: int,
    on_too_long: OnTooLong = "error",
    train_on: TrainOn = "assistant",
    cache: Path | None = None,
) -> Dataset:
    """`encode(load(path))`, from the cache where the same was asked before. `cache` is its root (None: `cache_folder()`)."""
    check_choices(max_length, on_too_long, train_on)
    made_from = {
        "layout": LAYOUT,
        "data": file_digest(Path(path)),
        "kind": Path(path).suffix.lower(),
        "format": format,
        "tokenizer": tokenizer.digest,
        "template": tokenizer.template,
        "max_length": max_length,
        "on_too_long": on_too_long,
        "train_on": train_on,
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    place = (cache_folder() if cache is None else cache) / "tokens" / key[:2] / key
    found = _read(place, str(path))
    if found is not None:
        return found
    made = encode(load(path, format), tokenizer, max_length=max_length, on_too_long=on_too_long, train_on=train_on)
    try:
        _write(place, made)
    except OSError as error:
        log.warning("can't keep encoded data in %s (%s); it will be encoded again next time", place.parent, error)
        return made
    return _read(place, str(path)) or made


def _read(place: Path, name: str) -> Dataset | None:
    """The entry, its arrays mapped; None where there is none or it is damaged."""
    try:
        meta = json.loads((place / "meta.json").read_text())
        arrays = {array: np.load(place / f"{array}.npy", mmap_mode="r", allow_pickle=False) for array in ARRAYS}
        dataset = Dataset(
            name=name, sha256=meta["sha256"], notes=meta["notes"], ignored=tuple(meta["ignored"]), **arrays
        )
        whole = len(dataset.tokens) == len(dataset.weights) == int(dataset.offsets[-1]) == meta["tokens"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        log.warning("the cached data in %s is damaged (%s) and is made again", place, error)
        return None
    return dataset if whole and len(dataset.offsets) == len(dataset) + 1 else None


def _write(place: Path, dataset: Dataset) -> None:
    with replacing(place, durable=False) as beside:
        beside.mkdir()
        for array in ARRAYS:
            np.save(beside / f"{array}.npy", getattr(dataset, array), allow_pickle=False)
        told = {"sha256": dataset.sha256, "notes": dict(dataset.notes), "ignored": dataset.ignored}
        (beside / "meta.json").write_text(json.dumps({**told, "tokens": len(dataset.tokens)}))
