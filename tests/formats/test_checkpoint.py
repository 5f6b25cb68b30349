"""Whole checkpoints: one file, shards, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from veneer.errors import FormatError, NotFound
from veneer.formats.checkpoint import open_checkpoint, open_tensors

INDEX = "model.safetensors.index.json"


def shards(folder: Path) -> dict[str, str]:
    save_file(
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, folder / "model-1.safetensors"
    )
    save_file({"c": torch.zeros(0, 3), "d": torch.tensor([1, 2])}, folder / "model-2.safetensors")
    where = {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
        "d": "model-2.safetensors",
    }
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def test_shards_read_as_one(tmp_path: Path) -> None:
    shards(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint) == ["a", "b", "c", "d"] and len(checkpoint) == 4 and "a" in checkpoint
    assert torch.equal(checkpoint.tensor("a"), torch.arange(6.0).view(2, 3))
    assert checkpoint.tensor("b").dtype == torch.bfloat16
    assert checkpoint.tensor("c").shape == (0, 3)
    assert checkpoint.info("d").shape == (2,)
    with pytest.raises(NotFound, match="no tensor 'e'"):
        checkpoint.tensor("e")


def test_a_write_to_a_view_never_reaches_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    open_checkpoint(tmp_path).tensor("a").zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert open_checkpoint(tmp_path / "model.safetensors").tensor("a").sum() == 3


def test_one_sum_for_each_run_of_a_dtype(tmp_path: Path) -> None:
    """A finite sum proves every value; an infinite one proves nothing; single bytes have no sum."""
    nan, file = float("nan"), tmp_path / "model.safetensors"
    whole = {
        "a": torch.ones(3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.tensor([1, 2]),
        "d": torch.ones(5),
    }
    cases: list[tuple[dict[str, torch.Tensor], bool]] = [
        (whole, True),
        ({"none": torch.zeros(0)}, True),
        ({"overflows": torch.full((9,), 6e4, dtype=torch.float16)}, True),
        ({"overflows too": torch.full((9,), 3e38)}, True),
        ({"bytes": torch.ones(3).to(torch.float8_e4m3fn)}, True),
        ({"bytes": torch.full((3,), nan).to(torch.float8_e4m3fn)}, False),
        ({"half": torch.full((3,), nan, dtype=torch.float16)}, False),
        ({"wide": torch.full((3,), -float("inf"), dtype=torch.float64)}, False),
        *(({**whole, name: torch.full_like(whole[name], nan)}, False) for name in "abd"),
    ]
    for tensors, finite in cases:
        save_file(tensors, file)
        assert open_tensors(file).is_finite() == finite, list(tensors)


def test_everything_wrong_with_an_index_is_said_at_once(tmp_path: Path) -> None:
    where = shards(tmp_path)
    where |= {"e": "model-1.safetensors", "f": "model-3.safetensors", "g": "../secret.safetensors", "h": "model.bin"}
    del where["b"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path)
    for part in (
        "'e' is not in model-1.safetensors",
        "model-3.safetensors is missing",
        "'../secret.safetensors' is not the name",
        "'model.bin' is not the name",
        "'b' in model-1.safetensors is not in the index",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[]"])
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)


def test_only_pickles_or_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"only pickles \(pytorch_model\.bin\)"):
        open_checkpoint(tmp_path)
    with pytest.raises(FormatError, match="is a pickle"):
        open_checkpoint(tmp_path / "pytorch_model.bin")
    with pytest.raises(NotFound, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "nowhere")
