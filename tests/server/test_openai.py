"""The routes as OpenAI's own client uses them: streaming and not, adapters by every way of naming them, errors as it expects."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.small import lora, lowered_of, plain_greedy
from tests.server.conftest import Running, eventually

openai = pytest.importorskip("openai")
PROMPT = "hello there"
CHAT: Any = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def expected(running: Running, seed: int | None, count: int, prompt: str = PROMPT) -> str:
    tokenizer = running.base.require_tokenizer()
    adapter = None if seed is None else lora(running.base, seed)
    return tokenizer.decode(
        plain_greedy(running.base, tokenizer.encode(prompt), lowered_of(running.base, adapter), count)
    )


@pytest.mark.parametrize(
    "model,seed,ref",
    [
        ("small", None, "base"),
        ("tickets", 2, "tickets@2"),
        ("tickets@1", 1, "tickets@1"),
        ("small:legal", 3, "legal@1"),
        ("local", 9, "local"),
    ],
)
def test_the_model_field_chooses_what_answers(running: Running, client: Any, model: str, seed: int, ref: str) -> None:
    raw = client.completions.with_raw_response.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0)
    answer = raw.parse()
    assert answer.choices[0].text == expected(running, seed, 8)
    assert answer.model == model
    assert raw.headers["x-veneer-adapter"] == ref
    assert raw.headers["x-request-id"]
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].finish_reason == "length"


def test_aliases_are_followed_and_rolled_back(running: Running, client: Any) -> None:
    def answer(model: str) -> str:
        done = client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0)
        return str(done.choices[0].text)

    running.library.alias("tickets@1", "production")
    try:
        assert answer("tickets") == expected(running, 1, 8)
        running.library.alias("tickets@2", "production")
        assert answer("tickets") == answer("tickets@production") == expected(running, 2, 8)
        running.library.rollback("tickets")
        assert answer("tickets") == expected(running, 1, 8)
    finally:
        running.library.unalias("tickets", "production")


def test_chat_streams_what_it_says_whole(client: Any) -> None:
    options = {"model": "tickets", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1


def test_several_prompts_and_choices(running: Running, client: Any) -> None:
    prompts = [PROMPT, "another one"]
    answer = client.completions.create(model="legal", prompt=prompts, n=2, max_tokens=5, temperature=0, echo=True)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(answer.choices, [p for p in prompts for _ in range(2)], strict=True):
        assert choice.text == prompt + expected(running, 3, 5, prompt)
    tokens = running.base.require_tokenizer().encode(PROMPT)
    by_ids = client.completions.create(model="legal", prompt=tokens, max_tokens=5, temperature=0)
    assert by_ids.choices[0].text == expected(running, 3, 5)
    streamed: dict[int, str] = {}
    for chunk in client.completions.create(model="legal", prompt=prompts, max_tokens=5, temperature=0, stream=True):
        streamed[chunk.choices[0].index] = streamed.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert streamed == {0: expected(running, 3, 5), 1: expected(running, 3, 5, prompts[1])}


def test_log_probabilities(client: Any) -> None:
    answer = client.chat.completions.create(
        model="small", messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    for token in content:
        assert token.logprob <= 0
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert len(token.top_logprobs) == 3
    text = client.completions.create(model="small", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2)
    assert len(text.choices[0].logprobs.token_logprobs) == 4
    assert len(text.choices[0].logprobs.text_offset) == 4


def test_a_part_of_a_character_has_the_bytes_that_it_stands_for(client: Any) -> None:
    smiles = {"max_tokens": 30, "extra_body": {"guided_regex": "(a🙂){3}"}}
    answer = client.chat.completions.create(model="small", messages=CHAT, logprobs=True, **smiles)
    content = answer.choices[0].logprobs.content
    assert len(content) > 6 and "\ufffd" in {token.token for token in content}
    assert bytes(byte for token in content for byte in token.bytes).decode() == "a🙂a🙂a🙂"
    text = client.completions.create(model="small", prompt=PROMPT, logprobs=0, **smiles)
    offsets = text.choices[0].logprobs.text_offset
    assert set(offsets) == {0, 1, 2, 3, 4, 5} and offsets == sorted(offsets)


@pytest.mark.parametrize("regex,stop", [("(a🙂){3}", None), ("aab(aab🙂)*z", "aabz"), ("x🙂aaay", "aab")])
def test_offsets_are_the_same_streamed_and_whole(client: Any, regex: str, stop: str | None) -> None:
    """Held back or not, half a character or not: a token is where its text is."""
    body = {"model": "small", "prompt": PROMPT, "logprobs": 0, "max_tokens": 30, "seed": 2, "stop": stop}
    whole = client.completions.create(**body, extra_body={"guided_regex": regex}).choices[0]
    offsets: list[int] = []
    for chunk in client.completions.create(**body, stream=True, extra_body={"guided_regex": regex}):
        if chunk.choices[0].logprobs is not None:
            offsets += chunk.choices[0].logprobs.text_offset
    assert offsets == whole.logprobs.text_offset
    for at, token in zip(offsets, whole.logprobs.tokens, strict=True):
        assert token == "\ufffd" or whole.text[at:].startswith(token) or at + len(token) > len(whole.text)


def test_a_completion_without_a_limit_takes_the_room_there_is(running: Running) -> None:
    answer = running.client().post("/v1/completions", json={"prompt": "x" * 505, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 512 - 505


def test_echo_with_log_probabilities_is_refused(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="log-probabilities of a prompt"):
        client.completions.create(model="small", prompt=PROMPT, logprobs=1, echo=True)


def test_null_means_not_given(client: Any) -> None:
    """As OpenAI takes it: its client sends None for a field that is None."""
    names = [
        "temperature",
        "top_p",
        "n",
        "stop",
        "stream",
        "logprobs",
        "presence_penalty",
        "logit_bias",
        "stream_options",
    ]
    empty = dict.fromkeys(names)
    answer = client.chat.completions.create(model="small", messages=CHAT, max_tokens=3, seed=1, **empty)
    assert answer == client.chat.completions.create(model="small", messages=CHAT, max_tokens=3, seed=1).model_copy(
        update={"id": answer.id, "created": answer.created}
    )
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        client.completions.create(model="small", prompt=PROMPT, extra_body={"nonsense": None})


def test_an_answer_can_be_given_back_whole(client: Any) -> None:
    said = client.chat.completions.create(model="small", messages=CHAT, max_tokens=3).choices[0].message
    again = client.chat.completions.create(model="small", messages=[*CHAT, said.model_dump(), CHAT[-1]], max_tokens=3)
    assert again.choices[0].message.role == "assistant"


def test_json_schema(client: Any) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="tickets",
        messages=CHAT,
        max_tokens=60,
        seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content)["n"] in (1, 2)
    choice = client.chat.completions.create(
        model="small", messages=CHAT, max_tokens=60, extra_body={"guided_choice": ["red", 'bl"ue']}
    )
    assert choice.choices[0].message.content in ("red", 'bl"ue')


def test_stop_seed_and_extras(running: Running, client: Any) -> None:
    text = expected(running, None, 12)
    stopped = client.completions.create(model="small", prompt=PROMPT, max_tokens=12, temperature=0, stop=[text[3:5]])
    assert stopped.choices[0].text == text[: text.index(text[3:5])]
    assert stopped.choices[0].finish_reason == "stop"

    def drawn(seed: int) -> str:
        done = client.completions.create(
            model="small", prompt=PROMPT, max_tokens=12, seed=seed, extra_body={"top_k": 20, "min_p": 0.01}
        )
        return str(done.choices[0].text)

    assert drawn(1) == drawn(1)
    assert len({drawn(i) for i in range(4)}) > 1


def test_the_adapter_field_takes_scales_and_lists(running: Running, client: Any) -> None:
    def answer(adapter: Any, model: str = "small") -> str:
        done = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"adapter": adapter}
        )
        return str(done.choices[0].text)

    assert answer("legal") == expected(running, 3, 8)
    assert answer({"name": "legal", "scale": 0.0}) == expected(running, None, 8)
    both = answer([{"name": "legal", "scale": 1.0}, "tickets@1", {"name": "tickets@1", "scale": -1.0}])
    assert both == expected(running, 3, 8)
    with pytest.raises(openai.BadRequestError, match="adapter field"):
        answer("legal", model="tickets")


def test_models_are_listed_with_what_they_are(running: Running, client: Any) -> None:
    found = {m.id: m for m in client.models.list()}
    assert set(found) == {"small", "tickets", "legal", "local"}
    assert found["tickets"].root == "tickets@2"
    assert found["tickets"].parent == "small"
    assert found["local"].state == "resident"
    one = client.models.retrieve("tickets@1")
    assert one.root == "tickets@1"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


@pytest.mark.parametrize(
    "model",
    ["gpt-4", "tickets@9", "tickets@nope", "../../etc/passwd", "/etc/passwd", "tickets/../legal", "TICKETS", "a" * 200],
)
def test_an_unknown_model_is_never_the_base(client: Any, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model=model, prompt=PROMPT)
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    "change,param",
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"n": True}, "n"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"n": 0}, "n"),
        ({"stop": ""}, "stop"),
        ({"logprobs": 99}, "logprobs"),
        ({"max_tokens": 5000}, None),
        ({"max_tokens": 600}, None),
        ({"prompt": ""}, None),
        ({"prompt": [9999]}, None),
        ({"stop_token_ids": [300], "min_tokens": 2}, None),
        ({"logit_bias": {"300": 1.0}}, None),
        ({"guided_regex": "("}, None),
        ({"guided_regex": "a", "guided_grammar": "b"}, None),
        ({"suffix": "x"}, None),
    ],
)
def test_bad_requests_are_refused_as_openai_does(running: Running, change: dict[str, Any], param: str | None) -> None:
    body = {"model": "small", "prompt": PROMPT, **change}
    answer = running.client().post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


def test_tools_images_and_nonsense_are_refused(running: Running) -> None:
    client = running.client()
    for change in (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"tool_choice": "required"},
        {"reasoning_effort": "banana"},
        {"stream_options": {"include_usage": True}},
    ):
        body = {"model": "small", "messages": CHAT, **change}
        assert client.post("/v1/chat/completions", json=body).status_code == 400
    assert client.post("/v1/completions", content=b"{not json").status_code == 400
    untyped = client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert untyped.status_code == 400
    assert "content-type: application/json; it came as text/plain" in untyped.json()["error"]["message"]
    assert client.get("/v1/nothing").status_code == 404
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"


def test_a_client_that_leaves_frees_what_it_held(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = running.service.engine
    scheduler, step = engine.scheduler, engine.step

    def slowly() -> Any:
        time.sleep(0.05)  # the whole answer would take 24 s, longer than `eventually` waits
        return step()

    monkeypatch.setattr(engine, "step", slowly)
    body = {"model": "tickets", "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "stream": True}
    with running.client().stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # held: when it is collected, the connection is closed
        next(lines)
        assert scheduler.running
    assert eventually(lambda: not scheduler.running and not scheduler.waiting)
    with pytest.raises(httpx.ReadTimeout):
        running.client().post("/v1/completions", json={**body, "stream": False}, timeout=0.3)
    assert eventually(lambda: not scheduler.running and not scheduler.waiting)
    assert engine.book.promised == 0


def test_many_streams_of_many_adapters_at_once(running: Running) -> None:
    import asyncio

    models = ["small", "tickets@1", "tickets@2", "legal", "local"]
    seeds = [None, 1, 2, 3, 9]

    async def ask(client: Any, model: str) -> str:
        text = ""
        stream = await client.completions.create(model=model, prompt=PROMPT, max_tokens=10, temperature=0, stream=True)
        async for chunk in stream:
            text += chunk.choices[0].text
        return text

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
            return list(await asyncio.gather(*(ask(client, model) for model in models * 4)))

    answers = asyncio.run(all_at_once())
    assert answers == [expected(running, seed, 10) for seed in seeds] * 4


def test_an_adapter_of_the_library_is_spoken_to_in_its_own_template(
    running: Running, client: Any, tmp_path: Path
) -> None:
    lora(running.base, 41).save(tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    running.library.add(tmp_path / "own", "own")
    try:
        answer = client.chat.completions.create(model="own", messages=CHAT, max_tokens=8, temperature=0)
        assert answer.choices[0].message.content == expected(running, 41, 8, f"[{PROMPT}]")
        plain = client.chat.completions.create(model="tickets", messages=CHAT, max_tokens=8, temperature=0)
        assert plain.choices[0].message.content == expected(running, 2, 8, f"<user>{PROMPT}<end>")
        assert (running.library.checkout("own@1", tmp_path / "out") / "chat_template.jinja").is_file()
    finally:
        running.library.remove("own", force=True)


@pytest.mark.parametrize(
    "field",
    [
        '"prompt": "a\\ud800b"',
        '"prompt": "a", "user": "\\ud800"',
        '"prompt": "a", "stop": ["\\udfff"]',
        '"prompt": [true]',
    ],
)
def test_what_is_no_text_and_no_token_is_refused(running: Running, field: str) -> None:
    """JSON can write half of a surrogate pair, which no tokenizer and no answer can."""
    headers = {"content-type": "application/json"}
    answer = running.client().post("/v1/completions", content="{" + field + ', "max_tokens": 2}', headers=headers)
    assert answer.status_code == 400 and re.search(
        r"half of a character|prompt\.0: expected text, a whole number or a list, got True", answer.text
    ), answer.text


def test_a_request_id_may_be_sent_with_several_requests(running: Running) -> None:
    """As gateways do that number what belongs together."""

    def ask(_: int) -> httpx.Response:
        body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0}
        return running.client().post("/v1/completions", json=body, headers={"x-request-id": "one-trace"})

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert {answer.headers["x-request-id"] for answer in answers} == {"one-trace"}


def test_more_answers_than_may_wait_are_refused_before_they_are_read(running: Running, client: Any) -> None:
    most = running.service.engine.limits.waiting
    with pytest.raises(openai.BadRequestError, match=f"{most + 2:,} answers are asked for at once"):
        client.completions.create(model="small", prompt=["a"] * (most // 2 + 1), n=2, max_tokens=1)
