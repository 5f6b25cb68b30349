"""A checkpoint in several files whose index and files differ is refused by everybody who reads one, in the same words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny
from veneer.errors import FormatError
from veneer.formats.checkpoint import open_checkpoint
from veneer.models.load import load_base
from veneer.models.shards import INDEX

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tiny.checkpoint("llama", tmp_path / "model", shard_size="20KB")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*"))


def other_home(folder: Path, where: dict[str, Any]) -> Path:
    """A shard that is not the embedding's."""
    return next(file for file in shards(folder) if file.name != where[EMBEDDING])


def with_a_twin(folder: Path, where: dict[str, Any]) -> None:
    file = other_home(folder, where)
    twin = torch.zeros_like(load_file(folder / where[EMBEDDING])[EMBEDDING])
    save_file({**load_file(file), EMBEDDING: twin}, file)


def moved(folder: Path, where: dict[str, Any]) -> None:
    where[EMBEDDING] = other_home(folder, where).name


def not_listed(folder: Path, where: dict[str, Any]) -> None:
    files = list(where.values())
    del where[next(tensor for tensor, file in where.items() if files.count(file) > 1)]


def never_there(folder: Path, where: dict[str, Any]) -> None:
    where["model.more.weight"] = where[EMBEDDING]


def gone(folder: Path, where: dict[str, Any]) -> None:
    (folder / where[EMBEDDING]).unlink()


def outside(folder: Path, where: dict[str, Any]) -> None:
    name = where[EMBEDDING]
    (folder / name).rename(folder.parent / name)
    where.update({tensor: f"../{name}" for tensor, file in where.items() if file == name})


def a_number(folder: Path, where: dict[str, Any]) -> None:
    where[EMBEDDING] = 3


def empty(folder: Path, where: dict[str, Any]) -> None:
    where.clear()


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (with_a_twin, "is not in the index"),
        (moved, "where the index puts it"),
        (not_listed, "is not in the index"),
        (never_there, "where the index puts it"),
        (gone, "is missing"),
        (outside, "is not the name of a safetensors file of this folder"),
        (a_number, "no weight_map"),
        (empty, "no weight_map"),
    ],
)
def test_an_index_that_is_not_of_its_files(
    folder: Path, spoil: Callable[[Path, dict[str, Any]], None], word: str
) -> None:
    index = json.loads((folder / INDEX).read_text())
    spoil(folder, index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    for read in (load_base, open_checkpoint):
        with pytest.raises(FormatError, match=word) as caught:
            read(folder)
        assert caught.value.help


def test_an_index_that_is_a_list(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": [EMBEDDING]}))
    with pytest.raises(FormatError, match="no weight_map"):
        load_base(folder)


def test_files_without_an_index_share_no_tensor(folder: Path) -> None:
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).unlink()
    assert load_base(folder).identity
    with_a_twin(folder, where)
    with pytest.raises(FormatError, match=f"'{EMBEDDING}' is in model-.* and in model-"):
        load_base(folder)
