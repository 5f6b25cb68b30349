"""Rows that share a forward pass do not see each other: what one row scores does not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny
from veneer import data
from veneer.models.bank import EMPTY


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
def test_changing_a_neighbour_changes_nothing(name: str) -> None:
    base, _ = tiny.base(name)
    generator = torch.Generator().manual_seed(0)
    texts = [[int(t) for t in torch.randint(3, 90, (n,), generator=generator)] for n in (9, 14, 6)]

    def scores(rows: list[list[int]]) -> list[torch.Tensor]:
        made = data.from_records([{"text": "x"}] * len(rows))
        dataset = data.encode(made, _Given(rows), max_length=50)
        packed = data.batch(dataset, range(len(rows)), adapter=-1)
        with torch.inference_mode():
            hidden = base.decoder.forward(packed.tokens, packed.segments, EMPTY)
            logits = base.decoder.logits(hidden)
        return list(logits.split([segment.length for segment in packed.segments]))

    together = scores(texts)
    changed = scores([texts[0], [5] * 20, texts[2]])
    assert torch.equal(together[0], changed[0]), "same place in the batch: bitwise"
    torch.testing.assert_close(together[2], changed[2], rtol=1e-5, atol=1e-5)
    for row, alone in zip(together, (scores([text])[0] for text in texts), strict=True):
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-5)


class _Given:
    """A tokenizer that hands out prepared rows, one for each text."""

    template, bos_id, digest, eos_ids = None, None, "", (2,)

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = iter(rows)

    def encode(self, text: str, special: bool = False) -> list[int]:
        return []

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids = next(self.rows)
        return ids, [(0, 1)] * len(ids)
