"""The page that helps to choose has a row for everything there is to choose from, and for nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from veneer.base import formats
from veneer.inits import load_all as load_inits
from veneer.train import optimizers

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "howto" / "choose.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("title", "names"),
    [("Inits", load_inits()), ("Optimisers", optimizers.load_all()), ("Base formats", formats.load_all())],
    ids=["inits", "optimisers", "formats"],
)
def test_every_choice_has_a_row(title: str, names: Iterable[str]) -> None:
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", section, re.MULTILINE)) == set(names)
