"""The engine against the plainest generation there is: whole sequences, one at a time, without a cache.

Greedy answers of a mixed batch are those of each request alone, for every method and family, through chunks, reuse and removal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.small import ids, lora, lowered_of, plain_greedy, plain_logits, small_base, with_tokenizer
from veneer.adapter import Adapter
from veneer.engine import Delta, Engine, Failed, Finished, Found, Limits, Request, Sampling, Use
from veneer.engine.arena import Arena
from veneer.engine.batch import prepare
from veneer.engine.slots import PASSING
from veneer.errors import ConfigError, Conflict, FormatError, NotFound, ResourceError, VeneerError
from veneer.inject import create
from veneer.methods import lower, parse
from veneer.models.bank import compose
from veneer.models.base import Base
from veneer.types import Lowered

MB = 1 << 20
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3},
    "dora": {"rank": 2},
    "ia3": {},
    "prompt": {"num_tokens": 5},
    "prefix": {"num_tokens": 4},
    "ptuning": {"num_tokens": 3},
    "bottleneck": {"size": 6},
    "bitfit": {},
    "vera": {"rank": 8},
    "lora_xs": {"rank": 4},
    "adalora": {"rank": 4, "target_rank": 2},
    "shira": {"rank": 2},
    "oft": {"block": 8},
    "full": {"targets": ("down_proj",)},
}


def engine(base: Base, **settings: Any) -> Engine:
    return Engine(base, **{"kv_bytes": 16 * MB, "adapter_bytes": 16 * MB, **settings})


def shaken(base: Base, kind: str, seed: int = 0) -> Adapter:
    """An adapter of this method, moved well away from its neutral start."""
    spec = parse({"kind": kind, **METHODS[kind]})
    adapter = create(base, spec, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)

    def shake(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.3 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor

    return adapter.map_tensors(shake)


def tokens(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    return [list(choices[0].tokens) for choices in engine.complete(requests)]


@pytest.mark.parametrize("kind", METHODS)
def test_an_adapter_of_any_method_is_one_piece_of_memory(kind: str) -> None:
    base = small_base()
    resident = prepare([(shaken(base, kind), 1.0)], base)
    found: list[int] = []
    resident.bank.map_tensors(lambda tensor: (found.append(id(tensor)), tensor)[1])
    tensors = list(resident.bank.tensors())
    assert set(found) == {id(tensor) for tensor in tensors} and tensors
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert resident.bytes == tensors[0].untyped_storage().nbytes()


# -- one batch, many adapters ------------------------------------------------------------------------------------------


def test_any_number_of_scales_leaves_a_bounded_record() -> None:
    base = small_base()
    size = prepare([(lora(base, 1), 1.0)], base).bytes
    mixed = Engine(base, kv_bytes=1 << 22, adapter_bytes=3 * size)
    mixed.add("a", lora(base, 1))
    for scale in range(1, 100):
        mixed.complete([Request(ids(1, 4), adapter=Use("a", scale / 100), max_tokens=1)])
    assert len(mixed.residency.slots.states()) <= PASSING + 6  # those in memory, and the one that came last
    mixed.close()


def test_every_method_in_one_batch_answers_as_it_does_alone() -> None:
    base = small_base()
    adapters = {kind: shaken(base, kind, seed) for seed, kind in enumerate(METHODS)}
    mixed = engine(base)
    for name, adapter in adapters.items():
        mixed.add(name, adapter)
    prompts = {name: ids(i, 6 + 5 * i) for i, name in enumerate([*METHODS, ""])}
    requests = [Request(p, adapter=n or None, max_tokens=12) for n, p in prompts.items()]
    for (name, prompt), got in zip(prompts.items(), tokens(mixed, requests), strict=True):
        assert got == plain_greedy(base, prompt, lowered_of(base, adapters.get(name)), 12), name


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "olmo2", "gpt_neox", "gpt2"]
)
def test_every_family_decodes_as_it_reads(family: str) -> None:
    changes: dict[str, Any] = {"mistral": {"sliding_window": 9}, "gemma2": {"sliding_window": 6, "head_dim": 8}}.get(
        family, {}
    )
    if family == "gpt2":
        changes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    if family == "gpt_neox":
        changes = {"rotary_pct": 0.5}
    base = small_base(family, **changes)
    adapter = lora(base, 1)
    running = engine(base, limits=Limits(chunk=(4, 8), alone=8))
    running.add("a", adapter)
    prompts = [ids(1, 30), ids(2, 13)]
    got = tokens(running, [Request(prompts[0], adapter="a", max_tokens=10), Request(prompts[1], max_tokens=10)])
    assert got[0] == plain_greedy(base, prompts[0], lowered_of(base, adapter), 10)
    assert got[1] == plain_greedy(base, prompts[1], None, 10)


def test_logits_of_a_row_are_those_of_the_row_alone() -> None:
    base = small_base()
    adapters = [lora(base, i, rank=1 + 3 * i) for i in range(4)]
    running = engine(base)
    for i, adapter in enumerate(adapters):
        running.add(str(i), adapter)
    prompts = [ids(i, 9 + i) for i in range(4)]
    requests = [Request(p, adapter=str(i), max_tokens=4, logprobs=20) for i, p in enumerate(prompts)]
    for prompt, adapter, choices in zip(prompts, adapters, running.complete(requests), strict=True):
        answer = choices[0]
        logits = plain_logits(base, [*prompt, *answer.tokens[:-1]], lowered_of(base, adapter))[len(prompt) - 1 :]
        logs = torch.log_softmax(logits, dim=1)
        for step, found in enumerate(answer.logprobs):
            for token, _, value in found.top:
                assert value == pytest.approx(float(logs[step, token]), rel=1e-4, abs=1e-4)


# -- what else a request can ask for -----------------------------------------------------------------------------------


def test_several_adapters_on_one_request_add_up() -> None:
    base = small_base()
    one, two = lora(base, 1, rank=2, size=0.2), lora(base, 2, rank=5, size=0.2)
    running = engine(base)
    running.add("one", one)
    running.add("two", two)
    prompt = ids(0, 12)
    cases: list[tuple[Any, Lowered | None]] = [
        (["one", "two"], compose([lower(one, base), lower(two, base)])),
        ([Use("one", 0.5), Use("two", 2.0)], compose([lower(one.scaled(0.5), base), lower(two.scaled(2.0), base)])),
        (Use("one", 0.0), None),
        ([Use("one", 1.0), Use("one", -1.0)], None),
    ]
    got = tokens(running, [Request(prompt, adapter=asked, max_tokens=10) for asked, _ in cases])
    for (asked, lowered), answer in zip(cases, got, strict=True):
        assert answer == plain_greedy(base, prompt, lowered, 10), asked


def test_what_cannot_be_combined_fails_alone_and_says_why() -> None:
    base = small_base()
    running = engine(base)
    running.add("lora", lora(base, 1))
    running.add("prompt", shaken(base, "prompt"))
    events = list(running.generate([Request(ids(0, 5), adapter=["lora", "prompt"]), Request(ids(1, 5), max_tokens=3)]))
    failed = [e for e in events if isinstance(e, Failed)]
    assert [e.id for e in failed] == ["0"]
    assert "can't share a row" in str(failed[0].error)
    assert [e.id for e in events if isinstance(e, Finished)] == ["1"]


def test_an_invoked_adapter_starts_at_its_last_invocation_and_shares_the_bases_prefix() -> None:
    base = small_base()
    plain = lora(base, 3)
    adapter = replace(plain, spec=plain.spec.model_copy(update={"invocation": (7, 8)}))  # type: ignore[attr-defined]
    running = engine(base)
    running.add("invoked", adapter)
    prompt = [*ids(1, 40), 7, 8, *ids(2, 10), 7, 8, 3, 4]
    expected, so_far = [], list(prompt)
    for _ in range(8):
        so_far.append(int(plain_logits(base, so_far, lower(plain, base), switch=52)[-1].argmax()))
        expected.append(so_far[-1])
    first = running.complete([Request(prompt, max_tokens=4)])[0][0]
    second = running.complete([Request(prompt, adapter="invoked", max_tokens=8)])[0][0]
    assert list(second.tokens) == expected
    assert first.usage.cached == 0
    assert second.usage.cached == 48
    without = ids(5, 20)
    got = tokens(running, [Request(without, adapter="invoked", max_tokens=6)])[0]
    assert got == plain_greedy(base, without, None, 6)


def test_choices_share_the_prompt_and_differ_by_their_seed() -> None:
    base = small_base()
    running = engine(base)
    request = Request(ids(0, 40), n=3, max_tokens=8, sampling=Sampling(temperature=1.5, seed=5))
    first = running.complete([request])[0]
    assert len({c.tokens for c in first}) > 1
    assert [c.usage.cached for c in first] == [0, 32, 32]
    assert [c.tokens for c in running.complete([request])[0]] == [c.tokens for c in first]


@pytest.mark.parametrize("cancelled", [False, True])
def test_nobody_starts_from_tokens_that_are_still_to_be_read(cancelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is read in chunks: who asks the same meanwhile, or after it was cancelled, starts from what was read."""
    take = Arena._take
    monkeypatch.setattr(Arena, "_take", lambda self, size: take(self, size).fill_(torch.nan))
    base, prompt = small_base(), ids(3, 200)
    running = engine(base, limits=Limits(chunk=(32, 32), alone=32))
    running.submit(Request(prompt, id="first", max_tokens=6))
    running.step()
    if cancelled:
        running.cancel("first")
    events = running.generate([Request(prompt, id="second", max_tokens=6)])
    (answer,) = (event for event in events if isinstance(event, Finished) and event.id == "second")
    assert answer.usage.cached == 32
    assert list(answer.tokens) == plain_greedy(base, prompt, None, 6)


def test_complete_is_not_for_who_has_others_in_flight() -> None:
    running = engine(small_base())
    running.submit(Request(ids(0, 9), id="first", max_tokens=3))
    with pytest.raises(Conflict, match="others are in flight"):
        running.complete([Request(ids(1, 9), max_tokens=3)])
    while running.busy:
        running.step()
    assert running.complete([Request(ids(1, 9), max_tokens=3)])


def test_text_streams_stop_and_usage() -> None:
    base = with_tokenizer(small_base(vocab_size=300))
    running = engine(base)
    whole = running.complete([Request("hello there", max_tokens=30, ignore_eos=True)])[0][0]
    assert whole.reason == "length"
    assert whole.usage.completion == 30
    stop = whole.text[4:6]
    events = list(running.generate([Request("hello there", max_tokens=30, stop=(stop,), ignore_eos=True)]))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.stop) == ("stop", stop)
    assert finished.text == whole.text[: whole.text.index(stop)]
    assert "".join(e.text for e in events if isinstance(e, Delta)) == finished.text
    ending = whole.tokens[7]
    ended = running.complete([Request("hello there", max_tokens=30, stop_tokens=(ending,), ignore_eos=True)])[0][0]
    assert ended.reason == "stop"
    assert ended.tokens == whole.tokens[: whole.tokens.index(ending) + 1]
    longer = running.complete([Request("hello there", max_tokens=30, min_tokens=20, stop_tokens=(ending,))])[0][0]
    assert longer.usage.completion >= 20


def test_answers_follow_a_schema() -> None:
    import json

    base = with_tokenizer(small_base())
    from veneer.engine import Constraint

    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["red", "blue"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    running = engine(base)
    running.add("a", lora(base, 1))
    requests = [
        Request(
            "x", adapter=adapter, max_tokens=120, constraint=Constraint(kind, value), sampling=Sampling(1.0, seed=2)
        )
        for adapter in (None, "a")
        for kind, value in (("json_schema", schema), ("regex", "[0-9]{3}-(ab|cd)"), ("grammar", 'start: "yes" | "no"'))
    ]
    answers = [choices[0] for choices in running.complete(requests)]
    for answer in answers:
        assert answer.reason == "stop"
    for answer in answers[::3]:
        found = json.loads(answer.text)
        assert set(found) == {"ok", "kind"}
        assert found["kind"] in ("red", "blue")
    assert all(a.text in ("yes", "no") for a in answers[2::3])
    with pytest.raises(VeneerError, match="constraint is refused"):
        running.submit(Request("x", constraint=Constraint("grammar", "start: nonsense_rule")))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "kind, value, stop, text",
    [("regex", "abc", "b", "a"), ("regex", "", "", ""), ("json_schema", {"type": "object"}, "{", "")],
)
def test_a_constraint_that_leaves_nothing_but_the_end_ends_the_answer(
    kind: str, value: Any, stop: str, text: str, temperature: float
) -> None:
    """Whatever min_tokens asks for; and who is beside it goes on."""
    from veneer.engine import Constraint

    running = engine(with_tokenizer(small_base()))
    short = Request(
        "x",
        constraint=Constraint(kind, value),
        stop_tokens=tuple(running.base.require_tokenizer().encode(stop)),
        min_tokens=25,
        max_tokens=30,
        sampling=Sampling(temperature, seed=1),
    )
    (beside,), (answer,) = running.complete([Request("hello", max_tokens=30, ignore_eos=True), short])
    assert (answer.text, answer.reason) == (text, "stop")
    assert beside.usage.completion == 30


def fails_alone(running: Engine, request: Request, beside: int) -> str:
    """The error of a request, beside which another one gets all its tokens."""
    events = list(running.generate([Request("hello", id="beside", max_tokens=beside, ignore_eos=True), request]))
    (failed,) = (event for event in events if isinstance(event, Failed))
    (finished,) = (event for event in events if isinstance(event, Finished))
    assert (failed.id, finished.id, finished.usage.completion) == (request.id, "beside", beside)
    assert not running.busy
    return str(failed.error)


def test_a_grammar_that_is_too_much_work_to_follow_fails_alone() -> None:
    """llguidance gives up where a place of the text can be read in thousands of ways."""
    from veneer.engine import Constraint

    running = engine(with_tokenizer(small_base()))
    ways = " | ".join("x " * count for count in range(2, 9))
    hard = Request(
        "x",
        id="hard",
        constraint=Constraint("grammar", f'start: x\nx: {ways} | "a"'),
        max_tokens=400,
        sampling=Sampling(logit_bias={running.base.require_tokenizer().encode("a")[0]: 100.0}),
    )
    assert "can't be followed any further: Parser Error" in fails_alone(running, hard, beside=300)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_no_token_may_continue_fails_alone(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.engine import Constraint
    from veneer.engine.constraint import Matcher

    monkeypatch.setattr(Matcher, "allowed", lambda self, size: np.zeros(size, np.bool_))
    running = engine(with_tokenizer(small_base()))
    stuck = Request("x", id="stuck", constraint=Constraint("regex", "abc"), sampling=Sampling(temperature, seed=1))
    assert "leave no token" in fails_alone(running, stuck, beside=9)


# -- identity, lifecycle, faults ---------------------------------------------------------------------------------------


def test_a_replaced_adapter_never_answers_from_the_old_ones_cache() -> None:
    base = small_base()
    old, new = lora(base, 1), lora(base, 2)
    running = engine(base)
    prompt = ids(0, 50)
    digest = running.add("a", old)
    first = running.complete([Request(prompt, adapter="a", max_tokens=6)])[0][0]
    again = running.complete([Request(prompt, adapter="a", max_tokens=6)])[0][0]
    assert (first.usage.cached, again.usage.cached) == (0, 48)
    assert first.tokens == again.tokens
    assert first.adapter == digest
    with pytest.raises(Conflict):
        running.add("a", new)
    running.add("a", new, replace=True)
    after = running.complete([Request(prompt, adapter="a", max_tokens=6)])[0][0]
    assert after.usage.cached == 0
    assert list(after.tokens) == plain_greedy(base, prompt, lowered_of(base, new), 6)


def test_replacing_and_removing_while_a_stream_runs_leaves_the_stream_alone() -> None:
    base = small_base()
    old = lora(base, 1)
    running = engine(base)
    running.add("a", old)
    prompt = ids(0, 10)
    running.submit(Request(prompt, adapter="a", max_tokens=20, id="stream"))
    running.step()
    running.add("a", lora(base, 2), replace=True)
    running.unload(old.digest)
    assert running.residency.slots.states()[old.digest] == "draining"
    events = _drain(running)
    finished = next(e for e in events if isinstance(e, Finished))
    assert list(finished.tokens) == plain_greedy(base, prompt, lowered_of(base, old), 20)
    assert running.residency.slots.states()[old.digest] == "available"
    running.remove("a")
    with pytest.raises(NotFound):
        running.submit(Request(prompt, adapter="a"))


def test_an_unload_with_a_deadline_ends_the_answers_that_outlast_it() -> None:
    now = [0.0]
    base = small_base()
    running = engine(base, clock=lambda: now[0])
    old = lora(base, 1)
    running.add("a", old)
    running.add("b", lora(base, 2))
    running.submit(Request(ids(0, 9), adapter="a", max_tokens=50, n=2, id="long"))
    running.submit(Request(ids(1, 9), adapter="b", max_tokens=20, id="other"))
    running.step()
    running.step()  # the second choice enters when the first has read the prompt
    running.unload(old.digest, deadline=5.0)
    now[0] = 4.9
    assert not any(isinstance(e, Failed) for e in running.step())
    assert running.residency.slots.states()[old.digest] == "draining"
    now[0] = 5.0
    failed = [e for e in running.step() if isinstance(e, Failed)]
    assert [(e.id, e.choice) for e in failed] == [("long", 0), ("long", 1)]
    assert "unloaded" in str(failed[0].error)
    assert running.residency.slots.states()[old.digest] == "available"
    assert [e.id for e in _drain(running) if isinstance(e, Finished)] == ["other"]
    assert tokens(running, [Request(ids(0, 9), adapter="a", max_tokens=5)])[0], "it is loaded again"


def test_a_sum_leaves_with_an_adapter_it_holds() -> None:
    now = [0.0]
    base = small_base()
    running = engine(base, clock=lambda: now[0])
    old = lora(base, 1)
    running.add("a", old)
    running.add("b", lora(base, 2))
    running.submit(Request(ids(0, 9), adapter=[Use("a", 0.5), "b"], max_tokens=50, id="sum"))
    while not running.scheduler.running:
        running.step()
        running.wait(1.0)
    running.unload(old.digest, deadline=5.0)
    (key,) = (slot.key for slot in running.residency.slots.holding(old.digest) if slot.parts)
    assert running.residency.slots.states()[key] == "draining"
    now[0] = 5.0
    assert [e.id for e in running.step() if isinstance(e, Failed)] == ["sum"]
    assert running.residency.slots.states()[key] == "available"


def _drain(running: Engine) -> list[Any]:
    events = []
    while running.busy:
        events += running.step()
        if running.last_step is None and running.loading:
            running.wait(1.0)
    return events


class Shelf:
    """A source that loads when it is told to, and may have bad adapters."""

    def __init__(self, shelf: dict[str, Adapter | VeneerError], gate: threading.Event | None = None) -> None:
        self.shelf, self.gate, self.loads = shelf, gate, 0

    def resolve(self, name: str) -> Found:
        if name not in self.shelf:
            raise NotFound(f"no adapter is called '{name}'")
        item = self.shelf[name]
        digest = item.digest if isinstance(item, Adapter) else f"bad-{name}"
        return Found(name, digest, 100_000, self._loader(item), f"{name}@1")

    def _loader(self, item: Adapter | VeneerError) -> Callable[[], Adapter]:
        def load() -> Adapter:
            self.loads += 1
            if self.gate is not None:
                assert self.gate.wait(20)
            if isinstance(item, VeneerError):
                raise item
            return item

        return load


def test_a_cold_adapter_loads_beside_the_streams_and_a_bad_one_harms_nobody() -> None:
    base = small_base()
    cold = lora(base, 1)
    gate = threading.Event()
    shelf = Shelf({"cold": cold, "bad": FormatError("tensor A is truncated")}, gate)
    running = engine(base, source=shelf)
    prompt = ids(0, 8)
    for name in (None, "cold", "bad"):
        running.submit(Request(prompt, adapter=name, max_tokens=10, id=name or "base"))
    events = []
    for _ in range(10):
        events += running.step()
    assert [e.id for e in events if isinstance(e, Finished)] == ["base"]
    assert running.busy
    gate.set()
    events = _drain(running)
    cold_answer = next(e for e in events if isinstance(e, Finished))
    assert list(cold_answer.tokens) == plain_greedy(base, prompt, lowered_of(base, cold), 10)
    failed = next(e for e in events if isinstance(e, Failed))
    assert failed.id == "bad"
    assert "truncated" in str(failed.error)
    running.submit(Request(prompt, adapter="bad", id="again"))
    assert isinstance(running.step()[0], Failed), "a bad adapter is not read again at once"
    assert shelf.loads == 2


def test_the_next_adapters_are_read_while_all_places_are_taken() -> None:
    base = small_base()
    cold = lora(base, 1)
    running = engine(base, source=Shelf({"cold": cold, "bad": FormatError("truncated")}), limits=Limits(streams=1))
    running.submit(Request(ids(0, 8), max_tokens=200, ignore_eos=True, id="long"))
    for name in ("cold", "bad"):
        running.submit(Request(ids(1, 8), adapter=name, max_tokens=4, id=name))
    events = running.step()
    assert running.loading
    while running.loading:
        running.wait(10)
        events += running.step()
    assert not any(isinstance(e, Finished | Failed) for e in events), "the long answer holds the one place"
    states = running.residency.slots.states()
    assert states[cold.digest] == "resident" and states["bad-bad"] == "failed"
    running.cancel("long")
    events = _drain(running)
    assert {e.id: type(e).__name__ for e in events if isinstance(e, Finished | Failed)} == {
        "cold": "Finished",
        "bad": "Failed",
    }


def test_adapters_that_do_not_fit_together_take_turns() -> None:
    base = small_base()
    adapters = {str(i): lora(base, i) for i in range(4)}
    first = engine(base)
    first.add("0", adapters["0"])
    size = first.residency.slots.charged
    shelf = Shelf(dict(adapters))
    running = engine(base, source=shelf, adapter_bytes=2 * size + 100_000)
    prompts = {name: ids(int(name), 9) for name in adapters}
    got = tokens(running, [Request(p, adapter=n, max_tokens=6) for n, p in prompts.items()])
    for (name, prompt), answer in zip(prompts.items(), got, strict=True):
        assert answer == plain_greedy(base, prompt, lowered_of(base, adapters[name]), 6)
    assert running.residency.slots.counters.evictions >= 1


def poisons(base: Base) -> dict[str, Adapter]:
    good = lora(base, 1)
    other = lora(small_base(hidden_size=48), 1)
    part = good.parts[0]
    wrong_rank = replace(part, tensors={"A": part.tensors["A"][:2], "B": part.tensors["B"]})
    nan = replace(part, tensors={"A": part.tensors["A"] * torch.nan, "B": part.tensors["B"]})
    stray = replace(part, target="model.layers.9.self_attn.q_proj")
    return {
        "other base": other,
        "rank": replace(good, parts=(wrong_rank, *good.parts[1:])),
        "nan": replace(good, parts=(nan, *good.parts[1:])),
        "layer": replace(good, parts=(stray, *good.parts[1:])),
    }


@pytest.mark.parametrize("kind", ["other base", "rank", "nan", "layer"])
def test_a_poisoned_adapter_is_refused_before_it_can_do_harm(kind: str) -> None:
    base = small_base()
    bad = poisons(base)[kind]
    running = engine(base, source=Shelf({"bad": bad}))
    with pytest.raises(VeneerError):
        running.add("bad", bad)
    events = list(running.generate([Request(ids(0, 5), adapter="bad"), Request(ids(1, 5), max_tokens=4)]))
    assert [e.id for e in events if isinstance(e, Failed)] == ["0"]
    assert [e.id for e in events if isinstance(e, Finished)] == ["1"]


def test_scores_that_blow_up_end_one_stream_only() -> None:
    base = small_base()
    huge = lora(base, 1).map_tensors(lambda t: t * 1e30)
    running = engine(base)
    running.add("huge", huge)
    requests = [Request(ids(i, 9), adapter="huge" if i == 1 else None, max_tokens=6) for i in range(3)]
    events = list(running.generate(requests))
    assert [e.id for e in events if isinstance(e, Failed)] == ["1"]
    for event in events:
        if isinstance(event, Finished):
            assert list(event.tokens) == plain_greedy(base, ids(int(event.id), 9), None, 6)
    follow_up = tokens(running, [Request(ids(7, 9), max_tokens=6)])[0]
    assert follow_up == plain_greedy(base, ids(7, 9), None, 6)


def test_cancelling_and_timing_out_give_everything_back() -> None:
    now = [0.0]
    base = small_base()
    running = engine(base, clock=lambda: now[0])
    running.add("a", lora(base, 1))
    running.submit(Request(ids(0, 9), adapter="a", n=2, max_tokens=50, id="x"))
    running.submit(Request(ids(1, 9), adapter="a", max_tokens=50, id="y", timeout=5.0))
    running.step()
    running.step()
    cancelled = running.cancel("x")
    assert [e.reason for e in cancelled if isinstance(e, Finished)] == ["cancelled", "cancelled"]
    now[0] = 6.0
    ended = [e for e in running.step() if isinstance(e, Finished)]
    assert [(e.id, e.reason) for e in ended] == [("y", "timeout")]
    assert not running.busy
    assert running.book.promised == 0
    slot = next(iter(running.residency.slots.states()))
    assert running.residency.slots.slot(slot).uses == 0
    assert running.cancel("x") == []


def test_memory_of_keys_and_values_is_bounded_and_refusals_say_the_numbers() -> None:
    base = small_base()
    position = Engine(base, kv_bytes=MB, adapter_bytes=MB).book.position
    running = engine(base, kv_bytes=130 * position)
    with pytest.raises(ResourceError, match="positions"):
        running.submit(Request(ids(0, 100), max_tokens=100))
    prompts = [ids(i, 20) for i in range(6)]
    got = tokens(running, [Request(p, max_tokens=20) for p in prompts])
    assert got == [plain_greedy(base, p, None, 20) for p in prompts]
    assert running.book.promised + running.book.kept <= running.book.budget
    open_ended = running.complete([Request(ids(9, 20), max_tokens=None)])[0][0]
    assert open_ended.reason == "length"
    assert open_ended.usage.completion == 128 - 20 + 1


def test_too_many_waiting_requests_are_turned_away() -> None:
    running = engine(small_base(), limits=Limits(waiting=3))
    for i in range(3):
        running.submit(Request(ids(i, 5)))
    with pytest.raises(ResourceError, match="waiting"):
        running.submit(Request(ids(9, 5)))
    late = [Request(ids(i, 5), max_tokens=2, id=f"late-{i}") for i in range(9)]
    ended = {event.id for event in running.generate(late) if isinstance(event, Finished)}
    assert {request.id for request in late} <= ended


def test_the_reproducible_mode_gives_the_same_bits_in_any_company() -> None:
    base = small_base(dtype=torch.bfloat16)
    adapter = lora(base, 1)
    mine = Request(ids(0, 30), adapter="a", max_tokens=15, sampling=Sampling(0.9, seed=4), logprobs=5)

    def answer(company: list[Request]) -> Finished:
        running = engine(base, reproducible=True, limits=Limits(fixed=8))
        running.add("a", adapter)
        running.add("b", lora(base, 2))
        return running.complete([*company, mine])[-1][0]

    alone = answer([])
    crowd = [Request(ids(i, 5 + 9 * i), adapter="b" if i % 2 else None, max_tokens=9) for i in range(5)]
    together = answer(crowd)
    assert together.tokens == alone.tokens
    assert together.logprobs == alone.logprobs


def test_bad_prompts_are_refused_before_they_wait() -> None:
    running = engine(small_base())
    for prompt, word in (([], "empty"), ([999], "vocabulary"), ("text", "tokenizer"), (ids(0, 512), "context|reads")):
        with pytest.raises(VeneerError, match=word):
            running.submit(Request(prompt))
    with pytest.raises(VeneerError, match="context"):
        running.submit(Request(ids(0, 400), max_tokens=113))
    with pytest.raises(NotFound, match="did you mean"):
        running.add("tickets", lora(running.base, 1))
        running.submit(Request([1], adapter="tikets"))
    assert not running.busy


def test_leaving_the_iterator_early_ends_what_it_started() -> None:
    running = engine(small_base())
    for _ in running.generate([Request(ids(0, 5), max_tokens=50), Request(ids(1, 5), max_tokens=50)]):
        break
    assert not running.busy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_was_never_written_counts_for_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer for keys and values begins as NaN here: answers of unequal length, virtual rows, growth, prefixes, reuse."""
    base = small_base(dtype=dtype, hidden_size=64, intermediate_size=64)
    names = ["lora", "prefix", "prompt"]
    adapters = {name: shaken(base, name) for name in names}
    lengths = (3, 9, 17, 60, 66, 100)
    requests = [
        Request(ids(n, n), adapter=[None, *names][i % 4], max_tokens=20, ignore_eos=True, n=1 + (i == 4), logprobs=1)
        for i, n in enumerate(lengths)
    ]

    def answers() -> list[Any]:
        running = engine(base, limits=Limits(chunk=(8, 16), alone=48))
        for name, adapter in adapters.items():
            running.add(name, adapter)
        found = running.complete(requests)
        again = running.complete(requests[::-1])
        return [(c.tokens, c.logprobs) for choices in (*found, *again[::-1]) for c in choices]

    expected = answers()
    take = Arena._take
    taken: list[int] = []

    def poisoned(self: Arena, size: int) -> torch.Tensor:
        taken.append(size)
        return take(self, size).fill_(torch.nan)

    monkeypatch.setattr(Arena, "_take", poisoned)
    assert answers() == expected
    assert len(set(taken)) > 2, "buffers of several sizes were given out"


def held(base: Base, budget: float) -> Engine:
    """An engine with room for `budget` adapters of the size of those that it has, the first of them pinned."""
    probe = engine(base)
    probe.add("probe", lora(base, 1))
    size = probe.residency.slots.charged
    probe.close()
    made = engine(base, adapter_bytes=int(size * budget))
    made.add("pinned", lora(base, 1), pin=True)
    made.add("large", lora(base, 2))
    return made


def test_an_adapter_without_room_beside_pinned_ones_is_its_own_trouble() -> None:
    base = small_base()
    now = [0.0]
    running = held(base, 1.5)
    running._clock = lambda: now[0]
    prompt = ids(3, 6)
    running.submit(Request(prompt, adapter="pinned", max_tokens=12, id="before"))
    running.step()
    for at in range(20):
        running.submit(Request(prompt, adapter="large", max_tokens=2, id=f"large{at}"))
    now[0] = 10.0
    running.submit(Request(prompt, max_tokens=2, id="base"))
    running.submit(Request(prompt, adapter="pinned", max_tokens=2, id="after"))
    ends: dict[str, Finished | Failed] = {}
    for _ in range(40):
        ends |= {event.id: event for event in running.step() if not isinstance(event, Delta)}
    assert {id for id, event in ends.items() if isinstance(event, Finished)} == {"before", "base", "after"}
    failed = [event.error for event in ends.values() if isinstance(event, Failed)]
    assert len(failed) == 20 and all("pinned" in str(error) for error in failed)
    with pytest.raises(ResourceError, match="pinned"):
        running.load("large")
    running.residency.slots.pin(running.residency.resolve("pinned").digest, False)
    assert running.complete([Request(prompt, adapter="large", max_tokens=2)])[0][0].usage.completion == 2
    running.close()


def test_an_adapter_that_is_larger_in_memory_than_on_disk_waits_for_its_room() -> None:
    """As a bf16 file beside an fp32 base is: twice what its file takes."""
    base = small_base()
    adapters = {name: lora(base, seed, rank=16) for name, seed in (("a", 1), ("b", 2))}

    class Understating:
        def resolve(self, name: str) -> Found:
            adapter = adapters[name]
            size = sum(t.nbytes for part in adapter.parts for t in part.tensors.values())
            return Found(name, adapter.digest, size // 2, lambda: adapter)

    probe = engine(base)
    probe.add("a", adapters["a"])
    running = engine(base, source=Understating(), adapter_bytes=int(1.8 * probe.residency.slots.charged))
    requests = [
        Request(ids(1, 4), adapter="a", max_tokens=60, ignore_eos=True),
        Request(ids(2, 4), adapter="b", max_tokens=3, ignore_eos=True),
    ]
    found = running.complete(requests)
    assert [len(answers[0].tokens) for answers in found] == [60, 3]
    probe.close()
    running.close()


def test_a_limit_that_is_no_demand_is_cut_to_the_room_there_is() -> None:
    base = small_base()
    running = engine(base, limits=Limits(answer=20))
    context = base.config.max_positions

    def length(prompt: int, **fields: Any) -> int:
        return len(running.complete([Request(ids(1, prompt), ignore_eos=True, max_tokens=None, **fields)])[0][0].tokens)

    assert length(4) == 20
    assert length(4, up_to=7) == 7
    assert length(4, up_to=300) == 20
    assert length(context - 3, up_to=7) == 3
    with pytest.raises(ConfigError, match="min_tokens is 30"):
        length(4, min_tokens=30)
    with pytest.raises(ConfigError, match="7 where none is given"):
        length(4, up_to=7, min_tokens=8)
    running.close()


@pytest.fixture(scope="module")
def turning() -> tuple[Base, dict[str | None, Adapter], list[Request], list[list[int]]]:
    """A base with LongRoPE, adapters, requests around the length from which on it turns otherwise, and the answers."""
    scaling = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.0], "long_factor": [2.0, 5.0, 9.0, 20.0]}
    base = small_base("phi3", rope_scaling=scaling, original_max_position_embeddings=48, num_key_value_heads=4)
    adapters = {"lora": lora(base, 1), "prefix": shaken(base, "prefix"), "prompt": shaken(base, "prompt")}
    prompts = [(name, ids(5, 90)[:length]) for name in (None, *adapters) for length in (38, 47, 49, 90)]
    lowered = {name: None if name is None else lowered_of(base, adapters[name]) for name in (None, *adapters)}
    answers = [plain_greedy(base, prompt, lowered[name], 12) for name, prompt in prompts]
    return base, adapters, [Request(p, adapter=a, max_tokens=12, ignore_eos=True) for a, p in prompts], answers


@pytest.mark.parametrize("settings", [{}, {"limits": Limits(alone=7, chunk=(3, 5))}, {"reproducible": True}])
def test_a_base_that_turns_long_sequences_otherwise_answers_as_its_plain_forward(
    settings: dict[str, Any], turning: Any
) -> None:
    """LongRoPE: past its first length all positions are turned by other frequencies, also those that are stored."""
    base, adapters, requests, answers = turning
    running = engine(base, **settings)
    for name, adapter in adapters.items():
        running.add(name, adapter)
    assert base.decoder.turn == 48
    for _ in range(2):  # the second time on what the first has stored
        assert [list(found[0].tokens) for found in running.complete(requests)] == answers
    running.close()
