"""Every field of a request does over HTTP what it does in the engine, and does something: each case changes the answer."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.small import ids, lora
from tests.server.conftest import MB, Running
from veneer.engine import Constraint, Engine, Request, Sampling, Use

PROMPT = "hello there"
COUNT = 40
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
GREEDY: dict[str, Any] = {"temperature": 0}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "logit_bias": ({**GREEDY, "logit_bias": {"65": 100}}, {"sampling": Sampling(logit_bias={65: 100.0})}),
    "frequency_penalty": ({**GREEDY, "frequency_penalty": 2}, {"sampling": Sampling(frequency_penalty=2.0)}),
    "presence_penalty": ({**GREEDY, "presence_penalty": 2}, {"sampling": Sampling(presence_penalty=2.0)}),
    "repetition_penalty": ({**GREEDY, "repetition_penalty": 3}, {"sampling": Sampling(repetition_penalty=3.0)}),
    "temperature": ({"temperature": 1.5, "seed": 3}, {"sampling": Sampling(1.5, seed=3)}),
    "top_k": ({"temperature": 2, "seed": 3, "top_k": 2}, {"sampling": Sampling(2.0, top_k=2, seed=3)}),
    "top_p": ({"temperature": 2, "seed": 3, "top_p": 0.3}, {"sampling": Sampling(2.0, top_p=0.3, seed=3)}),
    "min_p": ({"temperature": 2, "seed": 3, "min_p": 0.3}, {"sampling": Sampling(2.0, min_p=0.3, seed=3)}),
    "stop": ({**GREEDY, "stop": "STOP"}, {"stop": ("STOP",)}),
    "include_stop_str_in_output": (
        {**GREEDY, "stop": ["STOP"], "include_stop_str_in_output": True},
        {"stop": ("STOP",), "include_stop": True},
    ),
    "stop_token_ids": ({**GREEDY, "stop_token_ids": [-1]}, {"stop_tokens": (-1,)}),
    "min_tokens": ({**GREEDY, "stop_token_ids": [-1], "min_tokens": 20}, {"stop_tokens": (-1,), "min_tokens": 20}),
    "json_object": (
        {"seed": 1, "response_format": {"type": "json_object"}},
        {"constraint": Constraint("json"), "sampling": Sampling(1.0, seed=1)},
    ),
    "json_schema": (
        {"seed": 1, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        {"constraint": Constraint("json_schema", SCHEMA), "sampling": Sampling(1.0, seed=1)},
    ),
    "guided_json": (
        {"seed": 1, "guided_json": SCHEMA},
        {"constraint": Constraint("json_schema", SCHEMA), "sampling": Sampling(1.0, seed=1)},
    ),
    "guided_regex": (
        {**GREEDY, "guided_regex": "[0-9]{3}-(ab|cd)"},
        {"constraint": Constraint("regex", "[0-9]{3}-(ab|cd)")},
    ),
    "guided_grammar": (
        {**GREEDY, "guided_grammar": 'start: "yes" | "no"'},
        {"constraint": Constraint("grammar", 'start: "yes" | "no"')},
    ),
    "guided_choice": (
        {**GREEDY, "guided_choice": ["red", "blue"]},
        {"constraint": Constraint("grammar", 'start: "red" | "blue"')},
    ),
    "adapter": ({**GREEDY, "adapter": "legal"}, {"adapter": "legal"}),
    "adapter at a scale": (
        {**GREEDY, "adapter": {"name": "legal", "scale": 0.5}},
        {"adapter": Use("legal", 0.5)},
    ),
    "adapters with weights": (
        {**GREEDY, "adapter": [{"name": "legal", "scale": 0.7}, {"name": "tickets@1", "scale": 0.4}]},
        {"adapter": (Use("legal", 0.7), Use("tickets@1", 0.4))},
    ),
}


@pytest.fixture(scope="module")
def alone(running: Running) -> Any:
    """An engine over the same base and library, without a server."""
    engine = Engine(running.base, source=running.service.shelf, kv_bytes=64 * MB, adapter_bytes=64 * MB)
    yield engine
    engine.close()


def with_real_stops(value: Any, token: int, text: str) -> Any:
    """A case with a token and a text that the plain answer has."""
    if isinstance(value, dict):
        return {key: with_real_stops(entry, token, text) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_real_stops(entry, token, text) for entry in value)
    return token if value == -1 and isinstance(value, int) else text if value == "STOP" else value


@pytest.mark.parametrize("field", CASES)
def test_a_field_means_the_same_over_http_and_changes_the_answer(running: Running, alone: Engine, field: str) -> None:
    plain = alone.complete([Request(PROMPT, max_tokens=COUNT)])[0][0]
    body, request = (with_real_stops(case, plain.tokens[9], plain.text[12:14]) for case in CASES[field])
    expected = alone.complete([Request(PROMPT, max_tokens=COUNT, **request)])[0][0]
    answer = running.client().post(
        "/v1/completions", json={"model": "small", "prompt": PROMPT, "max_tokens": COUNT, **body}
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["choices"][0]["text"] == expected.text
    assert found["choices"][0]["finish_reason"] == expected.reason
    assert found["usage"]["completion_tokens"] == expected.usage.completion
    assert (expected.text, expected.reason) != (plain.text, plain.reason)


def test_an_end_token_ends_an_answer_unless_it_is_ignored(running: Running) -> None:
    eos = running.base.require_tokenizer().eos_id
    body = {"model": "small", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logit_bias": {str(eos): 100}}
    client = running.client()
    ended = client.post("/v1/completions", json=body).json()
    assert (ended["choices"][0]["finish_reason"], ended["usage"]["completion_tokens"]) == ("stop", 1)
    ignored = client.post("/v1/completions", json={**body, "ignore_eos": True}).json()
    assert (ignored["choices"][0]["finish_reason"], ignored["usage"]["completion_tokens"]) == ("length", 8)
    least = client.post("/v1/completions", json={**body, "min_tokens": 5}).json()
    assert least["usage"]["completion_tokens"] == 6


def test_constrained_answers_are_what_was_asked_for(running: Running) -> None:
    client = running.client()

    def said(**fields: Any) -> str:
        body = {"model": "tickets", "prompt": PROMPT, "max_tokens": 100, "seed": 5, **fields}
        return str(client.post("/v1/completions", json=body).json()["choices"][0]["text"])

    assert json.loads(said(guided_json=SCHEMA))["n"] in (1, 2)
    assert json.loads(said(guided_json=json.dumps(SCHEMA)))["n"] in (1, 2)
    assert re.fullmatch("[0-9]{3}-(ab|cd)", said(guided_regex="[0-9]{3}-(ab|cd)"))
    assert said(guided_grammar='start: "yes" | "no"') in ("yes", "no")
    assert said(guided_choice=["red", "blue"]) in ("red", "blue")
    labels = [f"label {number}" for number in range(5000)]
    assert said(guided_choice=labels) in labels
    for odd in ("a b-c#d&e~f", "\n\t%<>", "é😀", '"\\/|()[]{}.*+?^$', "\x7f\u2028", "a/b"):
        assert said(guided_choice=[odd]) == odd


def test_choices_of_one_request_are_drawn_apart_and_repeat_with_their_seed(running: Running) -> None:
    body = {"model": "legal", "prompt": PROMPT, "max_tokens": 12, "temperature": 1.5, "seed": 4, "n": 3}
    first, second = (running.client().post("/v1/completions", json=body).json() for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert [choice["text"] for choice in second["choices"]] == texts
    assert first["usage"]["completion_tokens"] == 36
    assert first["usage"]["prompt_tokens"] == len(PROMPT)


def test_an_invoked_adapter_takes_the_bases_keys_and_values_up_to_its_invocation(running: Running) -> None:
    plain = lora(running.base, 51)
    spec = plain.spec.model_copy(update={"invocation": (7, 8)})  # type: ignore[attr-defined]
    running.library.add(replace(plain, spec=spec), "invoked")
    try:
        prompt = [*ids(61, 40), 7, 8, 3, 4]
        body = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
        client = running.client()
        base = client.post("/v1/completions", json={**body, "model": "small"}).json()
        invoked = client.post("/v1/completions", json={**body, "model": "invoked"}).json()
        again = client.post("/v1/completions", json={**body, "model": "invoked"}).json()
        assert base["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert invoked["usage"]["prompt_tokens_details"]["cached_tokens"] == 32
        assert invoked["choices"][0]["text"] == again["choices"][0]["text"]
        assert invoked["choices"][0]["text"] != base["choices"][0]["text"]
    finally:
        running.library.remove("invoked", force=True)
