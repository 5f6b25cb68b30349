"""Virtual tokens that start from a text are that text, in families that scale their embedding too."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny
from veneer.inject import attached, create
from veneer.methods.prompt import PromptTuning


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_a_prompt_that_starts_from_a_text_is_that_text(family: str) -> None:
    """Gemma multiplies the rows of its embedding; virtual tokens stand behind that factor, so their start has to have it."""
    base, _ = tiny.base(family)
    text, ids = (5, 9, 2, 11), torch.tensor([[7, 3, 8, 6, 4]])
    adapter = create(base, PromptTuning(num_tokens=4, init="text", init_text=text), torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = base.logits(torch.cat([torch.tensor([text]), ids], dim=1))[:, len(text) :]
        with attached(base, adapter):
            torch.testing.assert_close(base.logits(ids), wanted, rtol=1e-5, atol=1e-5)
