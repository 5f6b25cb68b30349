"""NF4, with its scales in fp32 or quantised once more; arXiv 2305.14314. The arithmetic is in `ops/nf4.py`."""

from __future__ import annotations

from veneer.base.formats._four_bit import file_table
from veneer.ops.nf4 import TABLE

file_table("nf4", TABLE, "levels on the quantiles of a Gaussian", "2305.14314")
