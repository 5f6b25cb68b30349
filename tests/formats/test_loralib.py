"""loralib state dicts: the same update as loralib computes, fused layers included, and refusals that list everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from veneer.adapter import Adapter
from veneer.errors import FormatError
from veneer.formats.loralib import load_loralib


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path / "lora.safetensors")
    return path / "lora.safetensors"


def test_linear_layers(tmp_path: Path) -> None:
    a, b = _random(4, 6), _random(8, 4, seed=1)
    path = _saved(tmp_path, {"h.0.fc.lora_A": a, "h.0.fc.lora_B": b})
    adapter = load_loralib(path, alpha=32, rank=4)
    assert torch.allclose(adapter.delta("h.0.fc"), 32 / 4 * b @ a)
    adapter.save(tmp_path / "kept")
    assert torch.equal(Adapter.load(tmp_path / "kept").delta("h.0.fc"), adapter.delta("h.0.fc"))


def test_a_fused_layer_is_zero_where_it_is_not_enabled(tmp_path: Path) -> None:
    """loralib's MergedLinear with enable_lora [True, False, True]: q and v of one c_attn, computed as its grouped conv does."""
    a, b = _random(2 * 4, 6), _random(2 * 6, 4, seed=1)
    plain_a, plain_b = _random(4, 6, seed=2), _random(6, 4, seed=3)
    tensors = {"h.0.attn.c_attn.lora_A": a, "h.0.attn.c_attn.lora_B": b}
    path = _saved(tmp_path, {**tensors, "h.0.fc.lora_A": plain_a, "h.0.fc.lora_B": plain_b})
    adapter = load_loralib(path, alpha=16)
    grouped = torch.nn.functional.conv1d(a.unsqueeze(0), b.unsqueeze(-1), groups=2).squeeze(0)
    expected = torch.cat([grouped[:6], torch.zeros(6, 6), grouped[6:]]) * 16 / 4
    assert torch.allclose(adapter.delta("h.0.attn.c_attn"), expected, atol=1e-5)
    assert torch.allclose(adapter.delta("h.0.fc"), 16 / 4 * plain_b @ plain_a)
    assert adapter.scale("h.0.attn.c_attn") == adapter.scale("h.0.fc") == 4.0


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({}, "no tensor"),
        ({"h.lora_A": (4, 6)}, "only one of its two"),
        ({"h.lora_A": (4, 6), "h.lora_B": (8, 4), "h.weight": (8, 6)}, "'h.weight' is not a factor"),
        ({"h.lora_A": (5, 6), "h.lora_B": (8, 4)}, "fit neither"),
        ({"h.lora_A": (4, 6, 1), "h.lora_B": (8, 4)}, "expected a matrix"),
        ({"h.lora_A": (2, 6), "h.lora_B": (8, 2)}, "the rank is 2, 4 was given"),
        ({"lora_A": (4, 6), "lora_B": (8, 4)}, "not a factor"),
    ],
)
def test_refusals(tmp_path: Path, tensors: dict[str, tuple[int, ...]], told: str) -> None:
    path = _saved(tmp_path, {name: _random(*shape) for name, shape in tensors.items()})
    with pytest.raises(FormatError) as refused:
        load_loralib(path, alpha=32, rank=4)
    assert told in refused.value.message and refused.value.help
