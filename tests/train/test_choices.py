"""Every optimiser, start and base format through a whole run: trained, stored, loaded, planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tinylm
from veneer.adapter import Adapter
from veneer.base.formats import load_all as load_formats
from veneer.errors import ConfigError
from veneer.inject import attached
from veneer.methods.lora import LoRA
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.train import Step, train
from veneer.train.optimizers import load_all as load_optimizers

RATES = {"lora_rite": 2e-3, "sgd": 0.3, "riemannian_sgd": 0.1, "lora_pro": 0.03}
IDS = [[5, 17, 40, 3, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tinylm.folder(tmp_path_factory.mktemp("base"))
    tinylm.chat_rows(place / "rows.jsonl", 12)
    return place


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder), dtype="float32")


def trained(base: Base, folder: Path, out: Path, **settings: Any) -> tuple[Adapter, list[float]]:
    """A short run on the rows in `folder`: the adapter and the loss of each step."""
    losses: list[float] = []

    def note(event: object) -> None:
        if isinstance(event, Step):
            losses.append(event.loss)

    rows = folder / "rows.jsonl"
    settings = {"method": LoRA(rank=4, alpha=8), "epochs": 4, "lr": 5e-3, "schedule": "constant"} | settings
    return train(base, rows, out=out, on_event=note, **settings), losses


@pytest.mark.parametrize("name", sorted(load_optimizers()))
def test_every_optimiser_lowers_the_loss(base: Base, folder: Path, tmp_path: Path, name: str) -> None:
    """All rows in each step, so the losses are of one function."""
    adapter, losses = trained(base, folder, tmp_path / "run", optimizer=name, lr=RATES.get(name, 5e-3))
    assert losses[-1] < losses[0] - 1e-3 and losses == sorted(losses, reverse=True)
    assert all(bool(torch.isfinite(t).all()) for part in adapter.parts for t in part.tensors.values())


@pytest.mark.parametrize("name", ["fp4", "bof4-s", "bof4-s-dq"])
def test_every_base_format_trains(base: Base, folder: Path, tmp_path: Path, name: str) -> None:
    small = load_base(str(folder), dtype="float32", quantize=name)
    adapter, losses = trained(small, folder, tmp_path / "run")
    assert losses[-1] < losses[0]
    assert adapter.provenance.base == base.identity and adapter.provenance.trained_on == f"float32, {name}"
    groups = [g for g in small.layout.groups if g.name != "head"]
    packed = sum(load_formats()[name].nbytes(p.stop - p.start, g.in_features) for g in groups for p in g.parts)
    rest = sum(t.nbytes for t in small.decoder.tensors.values())
    assert small.nbytes == packed + rest


@pytest.mark.parametrize("name", ["corda", "corda_kpm", "lora_one", "mica", "qpissa", "loftq"])
def test_a_start_is_trained_and_comes_back_from_its_file(base: Base, folder: Path, tmp_path: Path, name: str) -> None:
    on = load_base(str(folder), dtype="float32", quantize="bof4-s") if name in ("qpissa", "loftq") else base
    spec = LoRA(rank=4, alpha=8, init=name)
    adapter, losses = trained(on, folder, tmp_path / "run", method=spec, lr=2e-3, general=folder / "rows.jsonl")
    assert losses[-1] < losses[0]
    rank = 8 if name in ("corda", "corda_kpm", "qpissa") else 4
    assert adapter.parts[0].tensors["A"].shape[0] == rank, "a shifted start is stored with twice the rank"
    adapter.save(tmp_path / "again")
    (tmp_path / "again" / "veneer.json").unlink()  # as PEFT's files alone say it
    with attached(on, adapter):
        wanted = on.logits(IDS)
    with attached(on, Adapter.load(tmp_path / "again")):
        assert torch.allclose(on.logits(IDS), wanted, atol=1e-5)


def test_mica_trains_a_alone(base: Base, folder: Path, tmp_path: Path) -> None:
    adapter, _ = trained(base, folder, tmp_path / "run", method=LoRA(rank=4, alpha=8, init="mica"), lr=2e-3)
    target = adapter.targets[0]
    u = torch.linalg.svd(base.host(target).weight(), full_matrices=False).U[:, -4:]
    torch.testing.assert_close(adapter.part(target).tensors["B"], u)
    assert float(adapter.part(target).tensors["A"].abs().max()) > 0
    for optimizer in ("lora_fa", "lora_pro"):
        with pytest.raises(ConfigError, match=optimizer):
            trained(base, folder, tmp_path / optimizer, method=LoRA(rank=4, init="mica"), optimizer=optimizer)
