"""Adapter folders: `save` and `load`. PEFT's two files, and `veneer.json` beside them for what PEFT's format can't say.

Saving is all or nothing, and what was written is read back and compared before it takes its place. Loading is strict: a missing,
unexpected, mis-shaped, empty or non-finite tensor, a config that disagrees with the tensors, a pickle or a link that leads out of
the folder is refused, with everything that is wrong in one error.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from veneer.adapter import Adapter, Part
from veneer.errors import FormatError, NotFound, ResourceError, listed
from veneer.formats import veneer_json
from veneer.formats.chat_template import with_template
from veneer.formats.checkpoint import (
    COMMON,
    PICKLES,
    TensorFile,
    first_non_finite,
    open_tensors,
    plain_file,
    read_json,
)
from veneer.formats.folder import replace_folder
from veneer.formats.form import MOST, Form, form_of
from veneer.formats.peft import CONFIG, TENSORS, expressible, from_peft, to_peft
from veneer.methods import folded
from veneer.registry import Latest

__all__ = ["load", "save"]

OWNED = frozenset({CONFIG, TENSORS, veneer_json.NAME})
_FORMS: Latest[tuple[bytes, bytes], Form] = Latest(MOST)
_log = logging.getLogger(__name__)


def save(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write `adapter` to the folder `path`: it is there whole, or what was there before is."""
    adapter = folded(adapter).map_tensors(_storable)
    named = {f"{p.kind} {p.target or ''} {n}": t for p in adapter.parts for n, t in p.tensors.items()}
    problems = _malformed(named) + first_non_finite(named)
    if not adapter.parts:
        problems.append("the adapter has no parts")
    if problems:
        raise FormatError(
            f"this adapter cannot be kept:\n{listed(problems)}", help="`veneer doctor` looks for the cause"
        )
    replace_folder(Path(path), OWNED, lambda folder: _write(adapter, folder))


def load(path: str | os.PathLike[str], *, mapped: bool = False, digest: str | None = None) -> Adapter:
    """Read the adapter folder `path`; of a run's folder, the adapter in it.

    mapped  leave the tensors in the file, mapped, where they are not copied: only for files that nobody changes in place. A
            careless write can't reach the file either way
    digest  what the adapter's digest is known to be, where the files are proved to be those that were looked through before: then
            no number is read here
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotFound(f"there is no adapter folder at {folder}", help=_nearest(folder))
    if (folder / "adapter" / TENSORS).exists() and not (folder / TENSORS).exists():
        folder = folder / "adapter"
    _refuse_pickles(folder)
    file, tensors = _read_tensors(folder, mapped, proved=digest is not None)
    told = None
    if (folder / veneer_json.NAME).exists():
        told = read_json(plain_file(folder, veneer_json.NAME))
    shared = None if told is None else veneer_json.shared(told)
    key = _form_key(folder, file)
    form = None if key is None else _FORMS.get(key)
    if form is not None and form.told == shared:
        adapter = _of_form(form, tensors, told, digest)
    else:
        adapter = _understood(folder, tensors, told, digest)
        form = form_of(adapter, tensors, shared)
        if key is not None and form is not None:
            _FORMS[key] = form
    if told is None:
        _warn(adapter, folder)
    adapter = with_template(adapter, folder)
    return adapter if digest is None else adapter.known_as(digest)


def _form_key(folder: Path, file: TensorFile) -> tuple[bytes, bytes] | None:
    """What folders of one form have alike besides the description, or None where it is too much to be remembered."""
    config = plain_file(folder, CONFIG) if (folder / CONFIG).exists() else None
    if len(file.header) > COMMON or (config is not None and config.stat().st_size > COMMON):
        return None
    return file.header, b"" if config is None else config.read_bytes()


def _of_form(form: Form, tensors: dict[str, Tensor], told: dict[str, Any] | None, digest: str | None) -> Adapter:
    """The adapter of a folder of a form that was understood before."""
    if told is None:
        return form.filled(tensors, form.provenance)
    stamp = veneer_json.read_stamp(told)
    adapter = form.filled(tensors, stamp.provenance.value())
    if digest is not None:
        adapter = adapter.known_as(digest)
    if problems := veneer_json.differing(adapter, stamp):
        raise veneer_json.apart(problems)
    return adapter


def _understood(folder: Path, tensors: dict[str, Tensor], told: dict[str, Any] | None, digest: str | None) -> Adapter:
    """The adapter of a folder of a form that is new."""
    sidecar = None if told is None else veneer_json.read(told)
    if sidecar is not None and sidecar.layout == "veneer":
        return veneer_json.restore(sidecar, _own_layout(sidecar, tensors), digest)
    adapter = from_peft(read_json(plain_file(folder, CONFIG)), tensors, str(folder))
    if sidecar is None:
        return adapter
    restored = veneer_json.restore(sidecar, adapter.parts, digest)
    _agree(adapter, restored, folder)
    return restored


def _warn(adapter: Adapter, folder: Path) -> None:
    for key in adapter.provenance.extra.get("peft_keys_without_effect", ()):
        _log.warning("%s: the key %s of %s is not known and has no effect", folder, key, CONFIG)
    if "input_side_only" in adapter.provenance.extra:
        path = adapter.provenance.extra["input_side_only"]
        _log.warning(
            "%s replaces %s: where the head is tied to it, PEFT leaves the head alone, veneer does not", folder, path
        )


def _write(adapter: Adapter, folder: Path) -> None:
    layout: Any = "peft" if expressible(adapter) else "veneer"
    if layout == "peft":
        config, tensors = to_peft(adapter)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    else:
        tensors = {_key(p, name): t for p in adapter.parts for name, t in p.tensors.items()}
    try:
        save_file({name: _owning(t) for name, t in tensors.items()}, folder / TENSORS, metadata={"format": "pt"})
    except SafetensorError as error:  # the disk: the tensors were checked before
        raise ResourceError(
            f"cannot write the adapter's tensors: {error}; what was there is as it was",
            help="free some space or choose another disk",
        ) from error
    (folder / veneer_json.NAME).write_text(veneer_json.render(veneer_json.describe(adapter, layout)), "utf-8")
    load(folder, mapped=True)  # the digest in veneer.json proves that what is on the disk is what was given


def _nearest(folder: Path) -> str:
    beside = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, beside, n=1)
    return f"did you mean {folder.parent / near[0]}?" if near else "give the folder of an adapter, or of a run"


def _key(part: Part, name: str) -> str:
    """The name of a tensor in a file of a method that PEFT does not have: kind/module path/tensor."""
    return f"{part.kind}/{part.target or ''}/{name}"


def _own_layout(sidecar: veneer_json.Sidecar, tensors: dict[str, Tensor]) -> tuple[Part, ...]:
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        pieces = key.split("/")
        if len(pieces) != 3:
            raise FormatError(f"{TENSORS}: '{key}' is not KIND/MODULE/TENSOR")
        found.setdefault((pieces[0], pieces[1]), {})[pieces[2]] = tensor
    places = {(record.kind, record.target or ""): record for record in sidecar.parts}
    return tuple(
        Part(kind, places[kind, target].site if (kind, target) in places else "weight", target or None, own)
        for (kind, target), own in found.items()
    )


def _agree(files: Adapter, described: Adapter, folder: Path) -> None:
    """PEFT would compute its scales from adapter_config.json; they have to be the ones that veneer.json says."""
    ours, theirs = veneer_json.scales(described), veneer_json.scales(files)
    problems = [
        f"the scale at '{t}' is {theirs.get(t)} by {CONFIG} and {ours.get(t)} by {veneer_json.NAME}"
        for t in ours.keys() | theirs.keys()
        if not math.isclose(ours.get(t, math.nan), theirs.get(t, math.nan), rel_tol=1e-12)
    ]
    if files.spec.kind != described.spec.kind:
        problems.append(f"{CONFIG} says {files.spec.kind}, {veneer_json.NAME} says {described.spec.kind}")
    if problems:
        raise FormatError(
            f"{folder}: the two descriptions of the adapter differ:\n{listed(sorted(problems))}",
            help=f"if {CONFIG} was edited on purpose, delete {veneer_json.NAME}",
        )


def _read_tensors(folder: Path, mapped: bool, *, proved: bool) -> tuple[TensorFile, dict[str, Tensor]]:
    file = open_tensors(plain_file(folder, TENSORS))
    tensors = file.every()
    tensors = _without_pruned(tensors if mapped else {name: t.clone() for name, t in tensors.items()})
    problems = _malformed(tensors)
    if not proved and not file.is_finite():
        problems += first_non_finite(tensors)
    if problems:
        raise FormatError(f"{folder}/{TENSORS} cannot be used:\n{listed(problems)}", help="fetch or train it again")
    return file, tensors


def _malformed(tensors: dict[str, Tensor]) -> list[str]:
    empty = [f"'{name}' has no elements: {list(t.shape)}" for name, t in tensors.items() if t.numel() == 0]
    odd = [
        f"'{name}' is {t.dtype}, expected floating point numbers"
        for name, t in tensors.items()
        if not t.is_floating_point() and t.dtype not in (torch.int64, torch.int32)
    ]
    return empty + odd


def _without_pruned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the layers that AdaLoRA left no rank: PEFT writes them as tensors without elements."""
    gone = [name.removesuffix("lora_E") for name, t in tensors.items() if name.endswith(".lora_E") and not t.numel()]
    return {name: t for name, t in tensors.items() if name.rpartition("lora_")[0] not in gone}


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLES)
    if pickles and not (folder / TENSORS).exists():
        raise FormatError(
            f"{folder} has only {', '.join(pickles)}, which can run code when it is read",
            help="convert it to safetensors where you trust it: load and save it with a current PEFT",
        )


def _storable(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _owning(tensor: Tensor) -> Tensor:
    """A tensor with a storage of its own: the file format refuses shared memory."""
    return tensor.clone()
