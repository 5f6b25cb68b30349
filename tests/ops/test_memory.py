"""What products keep between passes: oneDNN's code for each shape, within a bound."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

SHAPES = 300
SCRIPT = f"""
import veneer.ops, torch
w = torch.randn(16, 16)
for rows in [*range(1, {SHAPES}), 1]:
    torch.ops.mkldnn._linear_pointwise(torch.randn(rows, 16), w, None, "none", [], "")
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize(("own", "last"), [(None, "cache_miss"), ("1024", "cache_hit")])
def test_products_of_all_sizes_do_not_pile_up_code(own: str | None, last: str) -> None:
    """The first shape was forgotten after hundreds of others, unless the user says how many to keep."""
    rest = {k: v for k, v in os.environ.items() if not k.startswith("ONEDNN")}
    chosen = {} if own is None else {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": own}
    env = {**rest, **chosen, "ONEDNN_VERBOSE": "profile_create"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    made = [line for line in ran.stdout.splitlines() if ",create" in line]
    assert len(made) >= SHAPES and last in made[-1]
