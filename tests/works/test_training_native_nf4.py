"""The cells of the table of what works that train: the native decoder, NF4."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.works import table
from tests.works.table import Cell
from tests.works.training import native_losses

CELLS = [c for c in table.cells() if c.is_slow and (c.way, c.weights) == ("native", "NF4")]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_fifty_steps_lower_the_held_out_loss(cell: Cell, tmp_path: Path) -> None:
    before, after = native_losses(cell, tmp_path / "run")
    assert after < before - 0.05, f"{before:.3f} before, {after:.3f} after"
