"""NF4: the 16 levels of QLoRA on the quantiles of a Gaussian, bytes as bitsandbytes lays them out; arXiv 2305.14314.

The surprise: after a block of 64 is divided by its largest value the codes are far from equally used (1.7 % to 9.3 % each on
Gaussian data), so the levels are not the best that 4 bits can do: see `bof4.py`.
"""

from __future__ import annotations

from veneer.base.formats._four_bit import file_table
from veneer.ops.four_bit import Table

TABLE = Table(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)

file_table("nf4", TABLE, "levels on the quantiles of a Gaussian", "2305.14314")
