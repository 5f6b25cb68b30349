"""The cells of the table of what works that train: transformers' own model of the demo base, in 16 bit and NF4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.works import table
from tests.works.settings import plain_products
from tests.works.table import Cell
from tests.works.training import base, module_losses
from veneer.merge import write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.parity]
CELLS = [c for c in table.cells() if c.is_slow and c.way == "module"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("demo-base")
    write_checkpoint(base(None), place)
    return place


def model(folder: Path, weights: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if weights == "NF4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return plain_products(AutoModelForCausalLM.from_pretrained(folder, **options).eval())


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_fifty_steps_lower_the_held_out_loss(cell: Cell, folder: Path) -> None:
    before, after = module_losses(cell, model(folder, cell.weights))
    assert after < before - 0.05, f"{before:.3f} before, {after:.3f} after"


def test_four_bit_modules_are_among_them() -> None:
    assert {c.kind for c in CELLS if c.weights == "NF4"} >= {"bottleneck", "token_rows"}
