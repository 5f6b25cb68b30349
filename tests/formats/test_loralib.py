"""loralib's files against the paper code's own definition of a merged linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from veneer.adapter import Adapter
from veneer.errors import FormatError, NotFound
from veneer.formats.loralib import load_loralib

G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G)


def merged_linear(x: Tensor, a: Tensor, b: Tensor, mask: tuple[bool, ...], scale: float) -> Tensor:
    """What loralib computes: a grouped convolution over the enabled parts, then zero padding."""
    after_a = F.linear(x, a)
    after_b = F.conv1d(after_a.t()[None], b[:, :, None], groups=sum(mask))[0].t()
    height = b.shape[0] // sum(mask)
    padded = x.new_zeros(x.shape[0], height * len(mask))
    rows = torch.tensor(mask).repeat_interleave(height)
    padded[:, rows] = after_b
    return padded * scale


@pytest.mark.parametrize("mask", [(True, False, True), (True, True, True), (False, True, False)])
def test_a_fused_projection(mask: tuple[bool, ...], tmp_path: Path) -> None:
    k, r = sum(mask), 4
    tensors = {}
    for i in range(11):
        tensors[f"transformer.h.{i}.attn.c_attn.lora_A"] = rand(r * k, 12)
        tensors[f"transformer.h.{i}.attn.c_attn.lora_B"] = rand(12 * k, r)
    save_file(tensors, tmp_path / "lora.safetensors")
    adapter = load_loralib(
        tmp_path / "lora.safetensors", rank=r, alpha=32, targets=["c_attn"], merged={"c_attn": mask}, storage="conv1d"
    )
    assert adapter.targets[2] == "transformer.h.2.attn.c_attn"
    x = rand(5, 12)
    for target in adapter.targets:
        a, b = (tensors[f"{target}.lora_{n}"] for n in "AB")
        torch.testing.assert_close(
            x @ adapter.delta(target).t(), merged_linear(x, a, b, mask, 32 / r), rtol=1e-4, atol=1e-4
        )
    adapter.save(tmp_path / "peft")
    assert Adapter.load(tmp_path / "peft").digest == adapter.digest


def test_plain_layers_an_embedding_and_biases(tmp_path: Path) -> None:
    tensors = {
        "m.q.lora_A": rand(2, 6), "m.q.lora_B": rand(8, 2), "m.q.bias": rand(8),
        "emb.lora_A": rand(2, 10), "emb.lora_B": rand(6, 2),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = load_loralib(tmp_path / "x.safetensors", rank=2, alpha=1, targets=["q", "emb"], embeddings=["emb"])
    torch.testing.assert_close(adapter.delta("m.q"), 0.5 * tensors["m.q.lora_B"] @ tensors["m.q.lora_A"])
    assert adapter.part("emb").host == "embedding"
    assert adapter.part("m.q", "full").tensors["bias"].equal(tensors["m.q.bias"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rank": 3}, "the rank is 2, 3 was given"),
        ({"targets": ["q", "v"]}, "'v' was named as a target"),
        ({"targets": ["k"]}, "is none of the targets k"),
        ({"merged": {"q": (True, True)}}, "2 of 2 parts enabled"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    save_file({"m.q.lora_A": rand(2, 6), "m.q.lora_B": rand(8, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=match):
        load_loralib(tmp_path / "x.safetensors", **{"rank": 2, "alpha": 1, "targets": ["q"], **change})


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({}, "no tensor in it"),
        ({"h.lora_A": (4, 6), "h.lora_B": (8, 4), "h.weight": (8, 6)}, "'h.weight' is not a factor"),
        ({"h.lora_A": (8, 6), "h.lora_B": (8, 4)}, "which is not one layer"),
        ({"h.lora_A": (4, 6, 1), "h.lora_B": (8, 4)}, "expected matrices"),
        ({"h.lora_A": (0, 6), "h.lora_B": (8, 0)}, "expected matrices"),
        ({"lora_A": (4, 6), "lora_B": (8, 4)}, "'lora_A' is not a factor"),
    ],
)
def test_with_nothing_but_alpha(shapes: dict[str, tuple[int, ...]], told: str, tmp_path: Path) -> None:
    """A fused layer is never guessed: q and v enabled look like q and k."""
    save_file({name: rand(*shape) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError) as refused:
        load_loralib(tmp_path / "x.safetensors", alpha=32)
    assert told in refused.value.message and refused.value.help


def test_alpha_is_enough_for_plain_layers_of_any_rank(tmp_path: Path) -> None:
    tensors = {"m.0.lora_A": rand(4, 6), "m.0.lora_B": rand(8, 4), "m.1.lora_A": rand(2, 6), "m.1.lora_B": rand(8, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = load_loralib(tmp_path / "x.safetensors", alpha=32)
    assert (adapter.scale("m.0"), adapter.scale("m.1")) == (8.0, 16.0)


def test_a_half_and_a_missing_file(tmp_path: Path) -> None:
    save_file({"m.q.lora_A": rand(2, 6)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="lacks lora_B"):
        load_loralib(tmp_path / "x.safetensors", rank=2, alpha=1, targets=["q"])
    with pytest.raises(NotFound):
        load_loralib(tmp_path / "none", rank=2, alpha=1, targets=["q"])
    torch.save({}, tmp_path / "gpt2.pt")
    with pytest.raises(FormatError, match="pickle"):
        load_loralib(tmp_path / "gpt2.pt", rank=2, alpha=1, targets=["q"])
