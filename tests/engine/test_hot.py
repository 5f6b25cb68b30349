"""One adapter merged beside the base while streams run: right answers before, during and after, and a base nobody wrote to."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from tests.engine.small import ids, lora, lowered_of, plain_greedy, small_base
from tests.engine.test_engine import MB, METHODS, Shelf, engine, shaken, tokens
from veneer.engine import Engine, Finished, Request
from veneer.engine.hot import merge_beside
from veneer.errors import Conflict, FormatError, Unsupported
from veneer.models.base import Base
from veneer.ops.low_rank import DenseFrozen


def bytes_of(base: Base) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(base.decoder.tensors.items()):
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def ask(running: Engine, adapter: str | None, seed: int = 0, count: int = 10) -> Finished:
    return running.complete([Request(ids(seed, 20), adapter=adapter, max_tokens=count, logprobs=5)])[0][0]


def heated(running: Engine, name: str) -> None:
    assert running.heat(name).state == "merging"
    assert running.settle().state == "hot", running.hot


def test_streams_of_all_adapters_stay_right_through_the_swap_and_back() -> None:
    base = small_base()
    adapters = {"a": lora(base, 1), "b": lora(base, 2)}
    running = engine(base)
    for name, adapter in adapters.items():
        running.add(name, adapter)
    before = bytes_of(base)
    asked: dict[str, tuple[str | None, list[int]]] = {}
    merged_steps = [0]

    def submit(id: str, name: str | None) -> None:
        asked[id] = name, ids(len(asked), 12)
        running.submit(Request(asked[id][1], adapter=name, max_tokens=24, id=id))

    def steps(count: int) -> list[Finished]:
        found = []
        for _ in range(count):
            found += [e for e in running.step() if isinstance(e, Finished)]
            merged_steps[0] += running.last_step is not None and running.last_step.merged
        return found

    submit("hot before", "a")
    submit("other before", "b")
    finished = steps(5)
    heated(running, "a")
    submit("hot during", "a")
    submit("base during", None)
    finished += steps(30)
    submit("hot beside", "a")
    submit("other beside", "b")
    finished += steps(30)
    assert {e.id for e in finished} == set(asked)
    assert merged_steps[0] == 0, "in company the step runs on the base"
    submit("hot alone", "a")
    submit("hot too", "a")
    finished += steps(10)
    assert merged_steps[0] == 10
    assert running.cool() > 0
    submit("hot after", "a")
    finished += steps(40)
    assert merged_steps[0] == 10
    assert running.settle().intact is True
    assert bytes_of(base) == before
    answers = {e.id: e for e in finished}
    assert answers.keys() == asked.keys()
    for id, (name, prompt) in asked.items():
        adapter = None if name is None else adapters[name]
        assert list(answers[id].tokens) == plain_greedy(base, prompt, lowered_of(base, adapter), 24), id
        assert answers[id].adapter == ("" if adapter is None else adapter.digest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_cooling_every_bit_is_as_it_was(dtype: torch.dtype) -> None:
    base = small_base(dtype=dtype)
    running = engine(base)
    running.add("a", lora(base, 1, size=0.05))
    before = ask(running, "a"), ask(running, None)
    running.book.clear()
    heated(running, "a")
    ask(running, "a")
    ask(running, "a", seed=1)
    running.cool()
    running.settle()
    fresh = ask(running, "a", seed=1)
    assert fresh.usage.cached == 0, "what the merged set stored is not what the base would store"
    after = ask(running, "a"), ask(running, None)
    for one, other in zip(before, after, strict=True):
        assert one.logprobs == other.logprobs


@pytest.mark.parametrize("kind", [k for k in METHODS if k not in ("prompt", "prefix", "ptuning", "bottleneck")])
def test_methods_on_projections_answer_from_the_merged_set_as_by_their_definition(kind: str) -> None:
    base = small_base(attention_bias=True) if kind == "bitfit" else small_base()
    running = engine(base)
    running.add("a", shaken(base, kind))
    expected = plain_greedy(base, ids(3, 14), lowered_of(base, shaken(base, kind)), 12)
    heated(running, "a")
    assert tokens(running, [Request(ids(3, 14), adapter="a", max_tokens=12)])[0] == expected
    assert running.last_step is not None
    assert running.last_step.merged


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
def test_families_with_biases_transposed_weights_and_caps(family: str) -> None:
    changes = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, "gemma2": {"head_dim": 8}}
    base = small_base(family, **changes.get(family, {}))
    adapter = lora(base, 1)
    running = engine(base)
    running.add("a", adapter)
    heated(running, "a")
    got = tokens(running, [Request(ids(3, 14), adapter="a", max_tokens=12)])[0]
    assert got == plain_greedy(base, ids(3, 14), lowered_of(base, adapter), 12)


def test_a_hot_step_costs_the_base_products_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.ops import adapted, low_rank

    base = small_base()
    running = engine(base)
    running.add("a", lora(base, 1))
    heated(running, "a")
    products, updates = [], []
    update = adapted.add_low_rank
    for method in ("apply", "scores"):
        _counted(monkeypatch, method, products)
    monkeypatch.setattr(adapted, "add_low_rank", lambda *a: (updates.append(1), update(*a))[1])
    monkeypatch.setattr(low_rank, "_infer_stacked", lambda *a: pytest.fail("an update was computed"))
    tokens(running, [Request(ids(i, 9), adapter="a", max_tokens=4) for i in range(4)])
    assert updates == []
    steps = 4
    heads = steps * 2  # in fp32 the scores ask apply
    assert len(products) == steps * 4 * base.config.layers + heads


def _counted(monkeypatch: pytest.MonkeyPatch, method: str, calls: list[int]) -> None:
    original = getattr(DenseFrozen, method)
    monkeypatch.setattr(DenseFrozen, method, lambda self, x: (calls.append(1), original(self, x))[1])


def test_the_cost_is_what_the_tensors_take_and_is_charged_to_the_budget() -> None:
    base = small_base()
    wide = sum(g.out_features * g.frozen.in_features * 4 for n, g in base.decoder.groups.items() if n != "head")
    running = engine(base)
    running.add("a", lora(base, 1))
    charged = running.residency.slots.charged
    heated(running, "a")
    assert running.hot.bytes == wide
    assert running.residency.slots.charged == charged + wide
    assert running.hot.lost == 0.0, "fp32 holds the merged weights as they are"
    assert len(running.hot.checksum) == 64
    assert running.cool() == wide
    assert running.residency.slots.charged == charged
    narrow = lora(base, 2, targets=("q_proj",))
    running.settle()
    running.add("narrow", narrow)
    heated(running, "narrow")
    qkv = [g for n, g in base.decoder.groups.items() if n.endswith("qkv")]
    assert running.hot.bytes == sum(4 * g.out_features * g.frozen.in_features for g in qkv)
    small = engine(base, adapter_bytes=charged + 1000)
    small.add("a", lora(base, 1))
    small.heat("a")
    assert small.settle().state == "failed"
    assert "budget" in small.hot.reason
    assert ask(small, "a").reason == "length", "it is served as before"


def test_what_rounding_takes_is_the_share_of_the_update_that_bf16_cannot_hold() -> None:
    base = small_base(dtype=torch.bfloat16)
    adapter = lora(base, 1, size=1e-4, targets=("down_proj",))
    found = merge_beside(adapter, base, base.decoder, 64 * MB)
    lost = wanted = 0.0
    for target in adapter.targets:
        weight = base.host(target).weight().double()
        update = adapter.delta(target, base).double()
        exact = (weight + update).float()
        wanted += float((exact.double() - weight).square().sum())
        lost += float((exact.bfloat16().double() - exact.double()).square().sum())
    assert found.lost == pytest.approx((lost / wanted) ** 0.5, rel=1e-3)
    assert found.lost > 0.5


def test_one_at_a_time_and_what_cannot_be_merged_says_why() -> None:
    base = small_base()
    running = engine(base)
    running.add("a", lora(base, 1))
    running.add("b", lora(base, 2))
    running.add("prompt", shaken(base, "prompt"))
    invoked = lora(base, 3)
    invoked = replace(invoked, spec=invoked.spec.model_copy(update={"invocation": (7, 8)}))  # type: ignore[attr-defined]
    running.add("invoked", invoked)
    for name, word in (("prompt", "no projection"), ("invoked", "invocation")):
        running.heat(name)
        assert running.settle().state == "failed"
        assert word in running.hot.reason
    heated(running, "a")
    assert running.heat("a").state == "hot"
    with pytest.raises(Conflict, match="cool it first"):
        running.heat("b")
    running.cool()
    running.settle()
    heated(running, "b")
    running.unload(running.hot.digest)
    assert running.settle().state == "cold"
    with pytest.raises(Unsupported, match="reproducible"):
        engine(base, reproducible=True).heat("a")
    assert running.cool() == 0


def test_a_poisoned_adapter_is_not_merged() -> None:
    base = small_base()
    running = engine(base, source=Shelf({"bad": FormatError("tensor A is truncated")}))
    running.heat("bad")
    assert running.settle().state == "failed"
    assert "truncated" in running.hot.reason
    running = engine(base, source=Shelf({"nan": lora(base, 1).map_tensors(lambda t: t * torch.nan)}))
    running.heat("nan")
    assert "finite" in running.settle().reason
    assert running.residency.slots.charged == 0


def test_a_base_that_was_written_to_is_noticed() -> None:
    base = small_base()
    running = engine(base)
    running.add("a", lora(base, 1))
    heated(running, "a")
    base.decoder.tensors["layers.0.down"][0, 0] += 1
    running.cool()
    assert running.settle().state == "failed"
    assert running.hot.intact is False
    assert "not those" in running.hot.reason


def test_a_replaced_adapter_is_not_answered_from_the_hot_one() -> None:
    base = small_base()
    old, new = lora(base, 1), lora(base, 2)
    running = engine(base)
    running.add("a", old)
    heated(running, "a")
    running.add("a", new, replace=True)
    answer = ask(running, "a")
    assert list(answer.tokens) == plain_greedy(base, ids(0, 20), lowered_of(base, new), 10)
    assert running.hot.digest == old.digest
