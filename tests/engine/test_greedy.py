"""Greedy answers of the engine are those of transformers: in fp32 token for token, in bf16 without ties that rounding makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.small import ids, small_base
from tests.models import tiny
from veneer.adapter import Adapter
from veneer.engine import Engine, Limits, Request
from veneer.inject import create
from veneer.methods import lower
from veneer.methods.lora import LoRA
from veneer.models.bank import EMPTY, Bank
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.ops.native import build
from veneer.ops.native.shortlist import Sketch
from veneer.types import Lowered, Override, Span

MB = 1 << 20


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers' own loop says."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return [int(token) for token in out[0, len(prompt) :]]


@pytest.mark.parametrize("name", ["llama", "qwen3-biases", "gemma2-softcaps", "phi3-window", "gpt_neox", "gpt2"])
def test_a_batch_of_every_length_says_what_transformers_says(name: str) -> None:
    base, model = tiny.base(name)
    running = Engine(base, kv_bytes=64 * MB, adapter_bytes=MB, limits=Limits(chunk=(4, 8), alone=16))
    prompts = [ids(i, length, 97) for i, length in enumerate((1, 7, 30, 64))]
    answers = running.complete([Request(p, max_tokens=24, ignore_eos=True) for p in prompts])
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        assert list(answer.tokens) == generated(model, prompt, 24)


@pytest.mark.skipif(build.library() is None, reason="no native kernels on this machine")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_likeliest_token_is_not_decided_by_rounding(family: str) -> None:
    """Every token has a twin that scores almost the same: in bf16 they tie; the scores of a step are the sums themselves."""
    changes: dict[str, Any] = {"head_dim": 16, "final_logit_softcapping": 30.0} if family == "gemma2" else {}
    base = small_base(family, dtype=torch.bfloat16, hidden_size=64, **changes)
    hidden = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight: torch.Tensor = base.decoder.groups["head"].frozen.weight  # type: ignore[attr-defined]
    weight[1::2] = weight[::2]
    weight[1::2, 0] *= 1.02
    exact = hidden.double() @ weight.double().t()
    found = base.decoder.scores(hidden, (), base.binding()[0])
    assert found.dtype == torch.float32
    assert torch.equal(found.argmax(1), exact.argmax(1))
    rounded = base.decoder.logits(hidden)
    tied = (rounded == rounded.amax(1, keepdim=True)).sum(1) > 1
    assert int(tied.sum()) > 10, "and rounded they do tie"


@pytest.mark.skipif(build.library() is None, reason="no native kernels on this machine")
def test_a_shortlist_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody asks for more than the likeliest token, after the prompts, it is found without all scores: the same one."""
    asked: list[int] = []
    original = Sketch.likeliest

    def counted(self: Sketch, x: torch.Tensor) -> tuple[list[int], list[float]] | None:
        found = original(self, x)
        asked.append(-1 if found is None else len(x))
        return found

    base = small_base("llama", dtype=torch.bfloat16, hidden_size=64, vocab_size=3000)
    requests = [Request(ids(i, 5 + i), max_tokens=20, ignore_eos=True) for i in range(4)]

    def answers(*more: Request) -> list[tuple[int, ...]]:
        running = Engine(base, kv_bytes=64 * MB, adapter_bytes=MB)
        return [answer.tokens for (answer,) in running.complete([*requests, *more])][:4]

    monkeypatch.setattr(Sketch, "likeliest", counted)
    plain = answers()
    assert asked == [4] * 19, "all steps but the first, which reads prompts"
    asked.clear()
    curious = Request(ids(9, 5), max_tokens=20, ignore_eos=True, logprobs=2)
    assert answers(curious) == plain and asked == [], "somebody wants log-probabilities"
    monkeypatch.setattr(Sketch, "likeliest", lambda *_: None)
    assert answers() == plain


@pytest.mark.skipif(build.library() is None, reason="no native kernels on this machine")
def test_heads_that_no_sketch_speaks_for() -> None:
    """A soft cap, a bias, an adapter on the head, a head that an adapter replaces through the embedding that it is tied to."""
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    spans = (Span(0, 3, 0),)
    capped = small_base("gemma2", dtype=torch.bfloat16, hidden_size=64, head_dim=16, final_logit_softcapping=30.0)
    assert capped.decoder.likeliest(hidden, (), EMPTY) is None
    base = small_base("llama", dtype=torch.bfloat16, hidden_size=64)
    assert base.decoder.likeliest(hidden, spans, lowered(base, "q_proj")) is not None
    assert base.decoder.likeliest(hidden, spans, lowered(base, "lm_head")) is None
    base.decoder.groups["head"] = replace(base.decoder.groups["head"], bias=torch.zeros(300))
    assert base.decoder.likeliest(hidden, (), EMPTY) is None
    tied = small_base("llama", dtype=torch.bfloat16, hidden_size=64, tie_word_embeddings=True)
    own = Override(torch.zeros(300, 64, dtype=torch.bfloat16))
    replaced = tied.bank([Lowered(overrides={"model.embed_tokens.weight": own})])
    assert tied.decoder.likeliest(hidden, (), EMPTY) is not None
    assert tied.decoder.likeliest(hidden, spans, replaced) is None


def lowered(base: Base, target: str) -> Bank:
    method = LoRA(rank=2, alpha=2, targets=target)
    return base.bank([lower(_moved(create(base, method, torch.Generator().manual_seed(0)), 1), base)])


@pytest.mark.slow
def test_the_real_base_in_fp32_says_what_transformers_says(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from veneer.merge import write_checkpoint

    base = load_base("smollm2-135m", dtype="float32")
    write_checkpoint(base, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    texts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time", "1, 1, 2, 3, 5, 8,"]
    prompts = [base.require_tokenizer().encode(text) for text in texts]
    running = Engine(base, kv_bytes=512 * MB, adapter_bytes=512 * MB)
    requests = [Request(p, max_tokens=32, ignore_eos=True) for p in prompts]
    for prompt, (answer,) in zip(prompts, running.complete(requests), strict=True):
        assert list(answer.tokens) == generated(model, prompt, 32)


@pytest.mark.slow
@pytest.mark.parity
def test_adapters_on_the_real_base_say_what_peft_says(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from veneer.merge import write_checkpoint

    base = load_base("smollm2-135m", dtype="float32")
    write_checkpoint(base, tmp_path / "base")
    running = Engine(base, kv_bytes=512 * MB, adapter_bytes=512 * MB)
    prompt = base.require_tokenizer().encode("The weather in Paris")
    for seed in range(3):
        fresh = create(base, LoRA(rank=4 + 4 * seed, alpha=16), torch.Generator().manual_seed(seed))
        _moved(fresh, seed).save(tmp_path / str(seed))
        running.add(str(seed), Adapter.load(tmp_path / str(seed)))
    answers = running.complete(
        [Request(prompt, adapter=str(seed), max_tokens=24, ignore_eos=True) for seed in range(3)]
    )
    assert len({answer.tokens for (answer,) in answers}) == 3
    for seed, (answer,) in enumerate(answers):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / str(seed)).eval()
        assert list(answer.tokens) == generated(theirs, prompt, 24)


def _moved(adapter: Adapter, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed + 100)
    return adapter.map_tensors(lambda t: t + 0.02 * torch.randn(t.shape, generator=generator))
