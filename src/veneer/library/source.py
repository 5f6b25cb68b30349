"""What can be added: an adapter folder, a run directory, a loralib file, or an adapter at hand. Everything is copied,
then checked.

The files are copied into a private folder first, and the copy is what is read, hashed and kept. So what was checked
is what is stored, whoever writes to the original meanwhile. Hashing the file, flushing it, and loading the adapter (from a
mapping, so without a second copy) run side by side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from veneer.adapter import Adapter
from veneer.errors import FormatError, NotFound, VeneerError
from veneer.files import sync
from veneer.library.blobs import Blobs, digest_of, open_regular
from veneer.library.manifest import LARGEST
from veneer.library.records import File

TENSORS = "adapter_model.safetensors"
DESCRIPTIONS = ("adapter_config.json", "veneer.json")
DECORATION = "README.md"
KEPT = (TENSORS, *DESCRIPTIONS, DECORATION, "chat_template.jinja", "tokenizer_config.json")
KEPT_OF_RUN = ("config.yaml", "provenance.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Loralib:
    """What a loralib file doesn't say: its alpha. A given rank is checked."""

    alpha: float
    rank: int | None = None


@dataclass(frozen=True)
class Source:
    """Where the files of a new version come from: path inside the version -> file.

    is_private  nobody else knows these files, so they are moved and not copied
    """

    kind: str
    place: Path
    files: Mapping[str, Path]
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    is_private: bool = False


@dataclass(frozen=True)
class Staged:
    """Private copies: the files with their hashes, where each one is, and the adapter that was read from them."""

    files: tuple[File, ...]
    paths: Mapping[str, Path]
    adapter: Adapter


def recognise(path: Path, scratch: Path, loralib: Loralib | None) -> Source:
    """What `path` is. `scratch` takes what has to be written down first."""
    path = path.resolve()
    if not path.exists():
        raise NotFound(f"{path} is not there")
    if path.is_file():
        return _loralib(path, scratch, loralib)
    if _exists(path / "adapter" / TENSORS) and not _exists(path / TENSORS):
        return _run(path)
    return _folder(path, "adapter folder")


def is_needed(path: str) -> bool:
    """Whether the adapter is another one, or none, without this file of a version."""
    return path != DECORATION and "/" not in path


def told(path: Path) -> Source:
    """What an adapter folder says besides the adapter. For a run's `adapter/` that is what the run says."""
    run = path.resolve().parent
    is_inside_run = path.resolve().name == "adapter" and _exists(run / "provenance.json")
    return recognise(run if is_inside_run else path, run, None)


def written(adapter: Adapter, scratch: Path, kind: str = "adapter at hand") -> Source:
    """An adapter value, written down."""
    adapter.save(scratch / "adapter")
    return replace(_folder(scratch / "adapter", kind), is_private=True)


def stage(source: Source, blobs: Blobs, folder: Path) -> Staged:
    """Copy, hash, flush and load."""
    paths: dict[str, Path] = {}
    for name, original in source.files.items():
        paths[name] = folder / "copy" / name
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        if source.is_private:
            original.rename(paths[name])
        else:
            blobs.copy_in(original, paths[name])
    for name in paths:
        if not name.endswith(".safetensors") and paths[name].stat().st_size > LARGEST:
            raise FormatError(
                f"{source.files[name]} has more than {LARGEST} bytes", help="no description of an adapter is that large"
            )
    with ThreadPoolExecutor(2) as pool:
        flushed = pool.submit(_flush, list(paths.values()))
        hashed = pool.submit(lambda: {name: digest_of(path) for name, path in paths.items()})
        try:
            adapter = _load(folder / "copy")
        except VeneerError as error:
            raise _about(error, folder / "copy", source.place) from error
        digests = hashed.result()
        flushed.result()
    files = tuple(File(name, digests[name], path.stat().st_size) for name, path in sorted(paths.items()))
    return Staged(files, paths, adapter)


def _about(error: VeneerError, copy: Path, original: Path) -> VeneerError:
    """The same error about the file that the user knows, with a way out."""
    again = "fetch or save the adapter again; the library is as it was"
    return type(error)(error.message.replace(str(copy), str(original)), help=error.help or again)


def _flush(paths: Sequence[Path]) -> None:
    for path in paths:
        sync(path)


def _load(folder: Path) -> Adapter:
    from veneer.formats import load  # brings torch, which listing and moving aliases do without

    adapter = load(folder, mapped=True)
    _ = adapter.digest  # computed here, beside the hashing of the files
    return adapter


def _folder(path: Path, kind: str, below: Path | None = None) -> Source:
    if not _exists(path / TENSORS) or not any(_exists(path / name) for name in DESCRIPTIONS):
        raise _no_adapter(path)
    files = {name: _plain(path / name) for name in KEPT if _exists(path / name)}
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in KEPT) if below is None else []
    notes = (f"not part of an adapter, left out: {', '.join(others[:8])}",) if others else ()
    return Source(kind, path, files, notes=notes)


def _run(path: Path) -> Source:
    inner = _folder(path / "adapter", "run", below=path)
    files = dict(inner.files)
    files.update({f"run/{name}": path / name for name in KEPT_OF_RUN if _exists(path / name)})
    facts = _json_object(path / "provenance.json") if "run/provenance.json" in files else {}
    return Source("run", inner.place, files, _best_metrics(path / "metrics.jsonl"), facts)


def _loralib(path: Path, scratch: Path, loralib: Loralib | None) -> Source:
    if path.suffix in PICKLES:
        raise FormatError(
            f"{path} is a pickle, which can run code when it is read; veneer never reads one",
            help="where you trust it, convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), out)",
        )
    if path.suffix != ".safetensors":
        raise FormatError(
            f"{path} is a file; expected an adapter folder, a run directory or a loralib .safetensors file"
        )
    if loralib is None:
        raise FormatError(f"{path} does not say its alpha", help="give it: --alpha 32 (loralib's lora_alpha)")
    from veneer.formats.loralib import load_loralib

    adapter = load_loralib(path, alpha=loralib.alpha, rank=loralib.rank)
    return written(adapter, scratch, "loralib file")


def _no_adapter(path: Path) -> FormatError:
    pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix in PICKLES)
    if pickles:
        return FormatError(
            f"{path} holds {pickles[0]}, a pickle, which can run code when it is read; veneer reads {TENSORS} only",
            help="save it again with PEFT: model.save_pretrained(path, safe_serialization=True)",
        )
    missing = DESCRIPTIONS[0] if _exists(path / TENSORS) else TENSORS
    return FormatError(
        f"{path} is not an adapter folder: {missing} is missing", help="`adapter.save(path)` or PEFT writes one"
    )


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _plain(path: Path) -> Path:
    """`path`, or what it links to where it is a file of the hub's cache, which keeps every file as a link beside its blobs."""
    if path.is_symlink() and path.parent.parent.name == "snapshots":
        target = path.resolve()
        if target.parent == path.parent.parent.parent / "blobs" and target.is_file():
            return target
    return path


def _json_object(path: Path) -> dict[str, Any]:
    with open_regular(path) as reader:
        content = reader.read(LARGEST + 1)
    try:
        value = json.loads(content) if len(content) <= LARGEST else None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} is not a JSON object of at most {LARGEST} bytes")
    return value


def _best_metrics(path: Path) -> dict[str, float]:
    """The held-out losses of the adapter that a run kept: those of the evaluation with the lowest loss."""
    if not _exists(path):
        return {}
    best: dict[str, float] = {}
    with open_regular(path) as reader:
        for number, line in enumerate(reader, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise FormatError(
                    f"{path}:{number} is not JSON: {error}", help="add the run's adapter/ folder itself"
                ) from error
            loss = row.get("eval_loss") if isinstance(row, dict) else None
            if isinstance(loss, float) and math.isfinite(loss) and loss < best.get("eval_loss", math.inf):
                found = {key: row.get(key) for key in ("eval_loss", "general_loss")}
                best = {key: value for key, value in found.items() if isinstance(value, float) and math.isfinite(value)}
    return best
