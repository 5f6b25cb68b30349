"""What a base can be loaded from: a folder of safetensors files, a .gguf file, a hub id, a name of the catalogue.

`locate` finds the files without reading them; `open_source` reads a checkpoint's config, names and tensors. Pickle files are
never read: unpickling runs whatever code is inside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from veneer.errors import FormatError, NotFound, Unsupported, listed
from veneer.models.cache import read_json
from veneer.models.catalog import CATALOG, find
from veneer.models.gguf import GgufFile
from veneer.models.shards import INDEX, misplaced, refuse, strays, twins, weight_map
from veneer.models.tokenizer_import import TOKENIZER_FILES, copy_or_import, tokenizer_files
from veneer.registry import did_you_mean

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
READABLE = {"F64", "F32", "F16", "BF16"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Source(Protocol):
    """A checkpoint on disk, with the names and the orientation that transformers gives its tensors."""

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> Tensor: ...

    def tokenizer_files(self, folder: Path) -> None: ...


def locate(name: str) -> Path:
    """The folder or .gguf file that `name` stands for, fetched from the hub where it is a hub id."""
    if name in CATALOG:
        return find(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if HUB_ID.fullmatch(name) and not name.endswith(".gguf"):
        return from_hub(name)
    raise NotFound(
        f"no base is called '{name}', and there is no such file or folder",
        help=f"{did_you_mean(name, list(CATALOG))}; or give a folder, a .gguf file, or a hub id (owner/name)",
    )


def from_hub(name: str) -> Path:
    """The local snapshot of a hub repository (`owner/name` or `owner/name@revision`), downloaded once."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    wanted = ["model*.safetensors", INDEX, "config.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except LocalEntryNotFoundError as error:
        raise NotFound(
            f"'{name}' is not on this machine and could not be fetched",
            help="is there a network? `veneer bases` lists what works without one",
        ) from error
    except HfHubHTTPError as error:
        raise NotFound(
            f"the hub does not give out '{name}': {str(error).splitlines()[0]}",
            help="check the name; a gated model needs `hf auth login` and its licence accepted",
        ) from error


def files_of(path: Path) -> list[Path]:
    """The files that a base is made from, weights and words, without reading them."""
    if path.is_file():
        return [path]
    others = [file for file in (path / "config.json", path / INDEX) if file.is_file()]
    return sorted([*weight_files(path), *others, *tokenizer_files(path)])


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder."""
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder} has no config.json", help="give the folder of a whole checkpoint")
    return read_json(folder / "config.json")


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, else those of the index, else all there are."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    index = path / INDEX
    if index.is_file():
        where = weight_map(read_json(index), path)
        refuse(path, list(strays(where, path).values()))
        return [path / name for name in sorted(set(where.values()))]
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    pickles = [file.name for pattern in PICKLES for file in path.glob(pattern)]
    if pickles:
        raise FormatError(
            f"{path} has its weights as pickle ({', '.join(pickles)}), which can run code and is never read",
            help="save the model with safetensors: model.save_pretrained(folder)",
        )
    raise FormatError(f"{path} has no .safetensors file", help="give the folder of a whole checkpoint")


def open_source(path: Path) -> Source:
    """A checkpoint ready to be read."""
    if path.is_dir():
        return Folder(path)
    if path.suffix != ".gguf":
        raise FormatError(f"{path} is neither a folder nor a .gguf file", help="give the folder that config.json is in")
    return GgufFile(path)


class Folder:
    """A folder with config.json and one or several safetensors files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.config = config_of(path)

    @cached_property
    def _handles(self) -> dict[str, Any]:
        """Tensor name -> the open file that has it."""
        from safetensors import SafetensorError, safe_open

        handles: dict[str, Any] = {}
        for file in weight_files(self._path):
            try:
                handles[file.name] = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{file} is damaged: {error}", help="copy or download it again") from error
        found = {name: handle.keys() for name, handle in handles.items()}
        is_indexed = "model.safetensors" not in found and (self._path / INDEX).is_file()
        where = weight_map(read_json(self._path / INDEX), self._path) if is_indexed else {}
        refuse(self._path, misplaced(where, found) if is_indexed else twins(found))
        return {tensor: handles[name] for name, tensors in found.items() for tensor in tensors}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        slices = {name: handle.get_slice(name) for name, handle in self._handles.items()}
        strange = sorted(
            f"{n} is {s.get_dtype()}" for n, s in slices.items() if s.get_dtype() not in READABLE | {"U8", "BOOL"}
        )
        if strange:
            raise Unsupported(
                f"the weights of {self._path} are not plain floats:\n{listed(strange)}",
                help="use the unquantised checkpoint",
            )
        return {name: tuple(piece.get_shape()) for name, piece in slices.items()}

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor

    def tokenizer_files(self, folder: Path) -> None:
        copy_or_import(self._path, folder)
