"""What people's clients do with the server: the `openai` package's own helpers and exceptions, and `litellm`.

Greedy answers are compared with plain generation, so a client that gets a wrong adapter's answer is noticed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict

from tests.engine.small import lora, lowered_of, plain_greedy
from tests.server.conftest import ALICE, KEYS, TIGHT, Running, start

openai = pytest.importorskip("openai")
CHAT: Any = [{"role": "user", "content": "hello there"}]
TICKETS, LEGAL = 2, 3
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning")
"""litellm does that to its own models."""


class Ticket(BaseModel):
    """What the schema of the tests asks for. No free text, so that every valid answer is short."""

    model_config = ConfigDict(extra="forbid")
    priority: Literal[1, 2, 3]
    open: bool


def said(running: Running, seed: int | None, count: int, messages: Any = CHAT) -> str:
    """The greedy answer to a chat, by the plainest way there is."""
    base = running.base
    tokenizer = base.require_tokenizer()
    adapter = None if seed is None else lora(base, seed)
    prompt = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
    return tokenizer.decode(plain_greedy(base, prompt, lowered_of(base, adapter), count))


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with keys, and one adapter whose bytes have rotted on disk."""
    server = start(tmp_path_factory.mktemp("strict"), keys=KEYS, max_body=20_000)
    version = server.library.add(lora(server.base, 7), "legal-rotten").version
    weights = max(server.library.show(version.ref).files, key=lambda file: file.bytes)
    blob = next(Path(server.library.url).glob(f"blobs/*/{weights.blob}"))
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-4] + b"\0\0\0\1")
    yield server
    server.stop()


@pytest.fixture
def client(running: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made:
        yield made


# -- the openai package ------------------------------------------------------------------------------------------------


def test_openai_parses_structured_answers_into_a_model(client: Any) -> None:
    # Greedy: white space between the fields is allowed, and a random model that draws could go on with it to the limit.
    asked = {"model": "tickets", "messages": CHAT, "max_tokens": 200, "temperature": 0, "response_format": Ticket}
    answer = client.chat.completions.parse(**asked)
    assert isinstance(answer.choices[0].message.parsed, Ticket)
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Ticket)


def test_openai_stream_helper_collects_what_plain_generation_says(running: Running, client: Any) -> None:
    text = said(running, LEGAL, 12)
    stop = text[5:7]
    with client.chat.completions.stream(
        model="legal", messages=CHAT, max_tokens=12, temperature=0, stop=stop, logprobs=True, top_logprobs=2
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == text[: text.index(stop)]
    assert final.choices[0].finish_reason == "stop"
    scores = final.choices[0].logprobs.content
    assert len(scores) >= len([delta for delta in deltas if delta])
    assert all(len(token.top_logprobs) == 2 for token in scores)


def test_openai_streams_several_choices_and_stops(running: Running, client: Any) -> None:
    text = said(running, TICKETS, 12)
    stop = text[4:6]
    whole = text[: text.index(stop)]
    pieces: dict[int, str] = {}
    ends: dict[int, str] = {}
    for chunk in client.chat.completions.create(
        model="tickets", messages=CHAT, max_tokens=12, temperature=0, n=3, stop=[stop, "never"], stream=True
    ):
        for choice in chunk.choices:
            pieces[choice.index] = pieces.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert pieces == dict.fromkeys(range(3), whole)
    assert ends == dict.fromkeys(range(3), "stop")


def test_openai_async_clients_share_a_batch(running: Running) -> None:
    models: dict[str, int | None] = {"small": None, "tickets": TICKETS, "legal": LEGAL, "tickets@1": 1}

    async def ask(client: Any, model: str) -> str:
        answer = await client.chat.completions.create(model=model, messages=CHAT, max_tokens=8, temperature=0)
        return str(answer.choices[0].message.content)

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            return list(await asyncio.gather(*(ask(client, model) for model in models)))

    assert asyncio.run(all_at_once()) == [said(running, seed, 8) for seed in models.values()]


def test_openai_leaves_a_stream_half_way(running: Running, client: Any) -> None:
    stream = client.chat.completions.create(model="tickets", messages=CHAT, max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    scheduler, end = running.service.engine.scheduler, time.monotonic() + 10
    while (scheduler.running or scheduler.waiting) and time.monotonic() < end:
        time.sleep(0.02)
    assert not scheduler.running
    assert not scheduler.waiting


def test_openai_raises_its_own_exceptions(strict: Running) -> None:
    def ask(key: str, **change: Any) -> Any:
        with openai.OpenAI(base_url=f"{strict.url}/v1", api_key=key, max_retries=0) as client:
            return client.chat.completions.create(**{"model": "tickets", "messages": CHAT, "max_tokens": 2, **change})

    with pytest.raises(openai.AuthenticationError):
        ask("wrong")
    with pytest.raises(openai.PermissionDeniedError, match="may not use"):
        ask(ALICE, model="small")
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(ALICE, model="legal-nothing")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        ask(ALICE, temperature=9)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.APIStatusError) as large:
        ask(ALICE, messages=[{"role": "user", "content": "x" * 30_000}])
    assert large.value.status_code == 413
    for stream in (False, True):
        with pytest.raises(openai.UnprocessableEntityError) as rotten:
            ask(ALICE, model="legal-rotten", stream=stream)
        assert rotten.value.type == "adapter_error"
        assert rotten.value.request_id
    with pytest.raises(openai.RateLimitError) as limited:
        for _ in range(3):
            ask(TIGHT)
    assert int(limited.value.response.headers["retry-after"]) >= 1


def test_openai_gives_up_in_time(running: Running) -> None:
    with (
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=0.2) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.chat.completions.create(
            model="small", messages=CHAT, max_tokens=450, extra_body={"ignore_eos": True, "repetition_penalty": 1.1}
        )


# -- litellm -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def litellm() -> Any:
    """Imported here, for it takes seconds, and told to fetch nothing."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    found = pytest.importorskip("litellm")
    patch.undo()
    found.telemetry = False
    found.suppress_debug_info = True
    return found


@pytest.fixture
def options(running: Running) -> Iterator[dict[str, Any]]:
    """How litellm is pointed at any OpenAI-compatible server.

    It asks for this thread's event loop and never closes the one that it gets, which would fail whatever test runs when that
    is collected: here it gets one that is closed afterwards.
    """
    where = {"api_base": f"{running.url}/v1", "api_key": "none", "num_retries": 0, "max_retries": 0}
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield {**where, "messages": CHAT, "temperature": 0}
    finally:
        asyncio.set_event_loop(None)
        loop.close()


@pytest.mark.parametrize("model,seed", [("small", None), ("tickets", TICKETS), ("legal", LEGAL), ("tickets@1", 1)])
def test_litellm_reaches_any_adapter_by_model_name(
    running: Running, litellm: Any, options: dict[str, Any], model: str, seed: int | None
) -> None:
    answer = litellm.completion(model=f"openai/{model}", max_tokens=8, **options)
    assert answer.choices[0].message.content == said(running, seed, 8)
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].finish_reason == "length"


def test_litellm_streams(running: Running, litellm: Any, options: dict[str, Any]) -> None:
    chunks = list(
        litellm.completion(
            model="openai/legal", max_tokens=10, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == said(running, LEGAL, 10)
    whole = litellm.stream_chunk_builder(chunks, messages=CHAT)
    assert whole.choices[0].message.content == text
    assert whole.usage.completion_tokens == 10


def test_litellm_takes_what_openai_takes(running: Running, litellm: Any, options: dict[str, Any]) -> None:
    text = said(running, TICKETS, 12)
    stopped = litellm.completion(model="openai/tickets", max_tokens=12, stop=[text[4:6]], n=2, **options)
    assert [c.message.content for c in stopped.choices] == [text[: text.index(text[4:6])]] * 2
    assert {c.finish_reason for c in stopped.choices} == {"stop"}
    scored = litellm.completion(model="openai/tickets", max_tokens=4, logprobs=True, top_logprobs=3, **options)
    assert len(scored.choices[0].logprobs.content) == 4
    assert all(len(token.top_logprobs) == 3 for token in scored.choices[0].logprobs.content)
    schema = litellm.completion(model="openai/tickets", max_tokens=80, response_format=Ticket, **options)
    Ticket.model_validate_json(schema.choices[0].message.content)
    asked = {"type": "json_schema", "json_schema": {"name": "t", "schema": Ticket.model_json_schema(), "strict": True}}
    plain = litellm.completion(model="openai/tickets", max_tokens=80, response_format=asked, **options)
    Ticket.model_validate(json.loads(plain.choices[0].message.content))
    extra = litellm.completion(model="openai/small", max_tokens=8, extra_body={"adapter": "legal"}, **options)
    assert extra.choices[0].message.content == said(running, LEGAL, 8)


def test_litellm_asynchronously(running: Running, litellm: Any, options: dict[str, Any]) -> None:
    async def both() -> tuple[str, str]:
        whole = await litellm.acompletion(model="openai/tickets", max_tokens=8, **options)
        text = ""
        async for chunk in await litellm.acompletion(model="openai/legal", max_tokens=8, stream=True, **options):
            text += chunk.choices[0].delta.content or ""
        return str(whole.choices[0].message.content), text

    assert asyncio.run(both()) == (said(running, TICKETS, 8), said(running, LEGAL, 8))


def test_litellm_completes_texts(running: Running, litellm: Any, options: dict[str, Any]) -> None:
    rest = {name: value for name, value in options.items() if name != "messages"}
    answer = litellm.text_completion(model="text-completion-openai/legal", prompt="hello there", max_tokens=6, **rest)
    base = running.base
    tokens = base.require_tokenizer().encode("hello there")
    expected = plain_greedy(base, tokens, lowered_of(base, lora(base, LEGAL)), 6)
    assert answer.choices[0].text == base.require_tokenizer().decode(expected)


def test_litellm_raises_its_own_exceptions(strict: Running, litellm: Any) -> None:
    def ask(key: str, **change: Any) -> Any:
        options = {"model": "openai/tickets", "messages": CHAT, "max_tokens": 2, **change}
        return litellm.completion(api_base=f"{strict.url}/v1", api_key=key, num_retries=0, max_retries=0, **options)

    with pytest.raises(litellm.AuthenticationError):
        ask("wrong")
    with pytest.raises(litellm.NotFoundError, match="legal-nothing"):
        ask(ALICE, model="openai/legal-nothing")
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(ALICE, temperature=9)
    with pytest.raises(litellm.exceptions.APIError) as denied:
        ask(ALICE, model="openai/small")
    assert denied.value.status_code == 403
    with pytest.raises(litellm.BadRequestError, match="damaged"):  # what litellm makes of a 422
        ask(ALICE, model="openai/legal-rotten")
    with pytest.raises(litellm.RateLimitError):
        for _ in range(3):
            ask(TIGHT)
