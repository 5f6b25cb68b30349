"""The same run in transformers + peft: from the same adapter, on the same rows, every loss agrees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tinylm
from tests.parity.runs import ours, theirs
from veneer.data import encode, load
from veneer.methods.lora import LoRA
from veneer.models.load import load_base
from veneer.train.config import TrainConfig

pytestmark = pytest.mark.parity
pytest.importorskip("peft")


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_every_loss_of_a_run_is_peft_s(tmp_path: Path, scaling: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = tinylm.folder(tmp_path / "base")
    base = load_base(str(folder), dtype="float32")
    assert base.tokenizer is not None
    dataset = encode(load(tinylm.chat_rows(tmp_path / "rows.jsonl", 40)), base.tokenizer, max_length=256)
    config = TrainConfig(lr=5e-3, epochs=10, max_steps=100, tokens_per_step=150, tokens_per_pass=100)
    spec = LoRA(rank=4, alpha=8, scaling=scaling)
    mine, schedule = ours(base, dataset, spec, config, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = theirs(model, dataset, schedule, config, tmp_path / "adapter")
    assert len(mine) == 100 and mine[-1] < mine[0] - 0.5
    assert mine == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_steps_on_the_real_base_are_peft_s(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from veneer.merge import write_checkpoint

    base = load_base("smollm2-135m", dtype="float32")
    assert base.tokenizer is not None
    write_checkpoint(base, tmp_path / "base")
    rows = load(Path(__file__).parents[2] / "examples/data/jive.train.jsonl")
    dataset = encode(rows, base.tokenizer, max_length=256)
    config = TrainConfig(lr=2e-4, epochs=2, max_steps=100, tokens_per_step=64, tokens_per_pass=64)
    mine, schedule = ours(base, dataset, LoRA(rank=8), config, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    expected = theirs(model, dataset, schedule, config, tmp_path / "adapter")
    assert len(mine) == 100
    assert mine == pytest.approx(expected, rel=1e-4)
