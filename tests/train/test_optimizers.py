"""Optimisers against plain AdamW and their own laws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from veneer.adapter import Adapter, Part
from veneer.errors import ConfigError, ResourceError
from veneer.methods.dora import DoRA
from veneer.methods.full import Full
from veneer.methods.ia3 import IA3
from veneer.methods.lora import LoRA
from veneer.train import optimizers
from veneer.train.config import TrainConfig
from veneer.train.optim import OPTIMIZERS, FlatParameters, set_rate


def parameters(spec: LoRA | None = None, rows: int = 40) -> FlatParameters:
    generator = torch.Generator().manual_seed(0)
    spec = spec or LoRA(rank=4, alpha=8)
    parts = [
        Part(
            "lora",
            "weight",
            f"layers.{i}.q",
            {"A": torch.randn(4, 60, generator=generator), "B": torch.randn(rows, 4, generator=generator)},
        )
        for i in range(3)
    ]
    return FlatParameters(Adapter(spec, tuple(parts)), torch.device("cpu"))


def steps(name: str, flat: FlatParameters, count: int, folder: Path | None = None, **config: float) -> list[Tensor]:
    """Parameters after `count` steps of the same gradients."""
    settings = TrainConfig(lr=1e-2, **config)
    optimizer = OPTIMIZERS[name](flat, settings, folder)
    set_rate(optimizer, 1e-2)
    for step in range(count):
        for buffer in flat.buffers.values():
            generator = torch.Generator().manual_seed(step)
            buffer.grad = torch.randn(buffer.shape, generator=generator) + buffer.detach()
        optimizer.step()
    return [b.detach().clone() for b in flat.buffers.values()]


def test_the_mapped_optimiser_is_bitwise_plain_adamw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "CHUNK", 128)
    plain = steps("adamw", parameters(), 50, weight_decay=0.01)
    mapped = steps("adamw_mapped", parameters(), 50, tmp_path, weight_decay=0.01)
    assert all(torch.equal(a, b) for a, b in zip(plain, mapped, strict=True))
    assert (tmp_path / "moments.bin").stat().st_size == 8 * parameters().count


def test_a_file_that_cannot_be_made_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="could not be made"):
        OPTIMIZERS["adamw_mapped"](parameters(), TrainConfig(), tmp_path / "file")


def test_eight_bit_moments_stay_near_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "SMALL", 16)
    start = [b.detach().clone() for b in parameters().buffers.values()]
    plain = steps("adamw", parameters(), 30)
    small = steps("adamw8bit", parameters(), 30)
    for a, b, s in zip(plain, small, start, strict=True):
        assert float((a - b).norm() / (a - s).norm()) < 0.05


def test_lora_fa_moves_b_alone_along_the_projected_gradient() -> None:
    spec = LoRA(rank=4, alpha=8)
    flat = parameters(spec)
    before = {k: b.detach().clone() for k, b in flat.buffers.items()}
    generator = torch.Generator().manual_seed(5)
    full = torch.randn(40, 60, generator=generator)
    for buffer in flat.buffers.values():
        buffer.grad = torch.zeros_like(buffer)
    scale = spec.scale("layers.0.q", 4)
    pairs = flat.low_rank_pairs()
    for a, grad_b, _ in pairs:
        grad_b.copy_(scale * full @ a.t())
    optimizer = OPTIMIZERS["lora_fa"](flat, TrainConfig(lr=1e-2), None)
    set_rate(optimizer, 1e-2)
    optimizer.step()
    for a, grad_b, s in pairs:
        projector = a.t() @ torch.linalg.inv(a @ a.t()) @ a
        assert torch.allclose(s * grad_b @ a, full @ projector, rtol=1e-3, atol=1e-4)
    assert torch.equal(flat.buffers["A"], before["A"])
    assert not torch.equal(flat.buffers["B"], before["B"])


def test_lora_plus_at_ratio_one_is_the_plain_optimiser_bitwise() -> None:
    one = steps("adamw", parameters(), 10)
    two = steps("adamw", parameters(), 10, lora_plus_ratio=1.0)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    optimizer = OPTIMIZERS["adamw"](parameters(), TrainConfig(lora_plus_ratio=16.0), None)
    set_rate(optimizer, 1e-3)
    assert sorted(g["lr"] for g in optimizer.param_groups) == pytest.approx([1e-3, 1.6e-2])


def test_lora_fa_without_factors_is_refused() -> None:
    parts = (Part("ia3", "weight", "layers.0.k", {"vector": torch.ones(8)}),)
    flat = FlatParameters(Adapter(IA3(), parts), torch.device("cpu"))
    with pytest.raises(ConfigError, match="factors A and B"):
        OPTIMIZERS["lora_fa"](flat, TrainConfig(), None)


def test_an_unknown_optimiser_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        OPTIMIZERS["adamww"]


def test_lora_plus_speeds_up_b_and_nothing_beside_it() -> None:
    parts = (
        Part("dora", "weight", "a", {"A": torch.ones(2, 3), "B": torch.ones(3, 2), "magnitude": torch.ones(3)}),
        Part("full", "override", "b", {"weight": torch.ones(3, 3)}),
    )
    flat = FlatParameters(Adapter(DoRA(rank=2), parts), torch.device("cpu"))
    assert {name: buffer.numel() for name, buffer in flat.buffers.items()} == {"A": 6, "B": 9, "rest": 9}
    optimizer = OPTIMIZERS["adamw"](flat, TrainConfig(lora_plus_ratio=16.0), None)
    set_rate(optimizer, 1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 16e-3, 1e-3]


def test_lora_plus_without_factors_is_refused() -> None:
    part = Part("full", "override", "a", {"weight": torch.ones(2, 2)})
    flat = FlatParameters(Adapter(Full(), (part,)), torch.device("cpu"))
    with pytest.raises(ConfigError, match="lora_plus_ratio"):
        OPTIMIZERS["adamw"](flat, TrainConfig(lora_plus_ratio=16.0), None)
