"""Data: from a file to packed batches.

>>> rows = load("tickets.jsonl")                                     # doctest: +SKIP
>>> dataset = encode(rows, base.tokenizer, max_length=1024)          # doctest: +SKIP
>>> print(statistics(dataset).summary())                             # doctest: +SKIP
>>> for step in plan_epoch(dataset, seed=0, epoch=0, tokens_per_step=8192, tokens_per_pass=2048):   # doctest: +SKIP
...     for rows in step:
...         packed = batch(dataset, rows)
"""

from veneer.data.cache import prepare
from veneer.data.describe import Leaks, Statistics, leaks, statistics
from veneer.data.formats import FORMATS, detect
from veneer.data.masking import TRAIN_ON, TextTokenizer, TrainOn, prompt_tokens
from veneer.data.packing import IGNORED, Batch, batch, pack, plan_epoch, plan_rows
from veneer.data.read import file_digest, from_records, load
from veneer.data.rows import Chat, Raw, Row, Rows
from veneer.data.tokens import Dataset, OnTooLong, encode

__all__ = [
    "FORMATS",
    "IGNORED",
    "TRAIN_ON",
    "Batch",
    "Chat",
    "Dataset",
    "Leaks",
    "OnTooLong",
    "Raw",
    "Row",
    "Rows",
    "Statistics",
    "TextTokenizer",
    "TrainOn",
    "batch",
    "detect",
    "encode",
    "file_digest",
    "from_records",
    "leaks",
    "load",
    "pack",
    "plan_epoch",
    "plan_rows",
    "prepare",
    "prompt_tokens",
    "statistics",
]
