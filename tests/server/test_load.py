"""A server under load, in a process of its own: every answer is its adapter's own, and memory stays flat.

The soak takes VENEER_SOAK_SECONDS (300). Adapters have different ranks and memory holds a part of them, so they come
and go all the time.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.outside import PROMPTS, Expected, Outside, Shop, body, heard, slope

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECONDS = float(os.environ.get("VENEER_SOAK_SECONDS", "300"))
STREAMS, ADAPTERS, TOKENS, MB = 64, 100, 12, 1 << 20


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"), ADAPTERS)


@pytest.fixture
def server(shop: Shop) -> Iterator[Outside]:
    made = Outside(shop, "--adapter-memory", "0.01")
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def answers(shop: Shop) -> dict[tuple[str, str], Expected]:
    found = {(f"a{i}", p): shop.expected(i, p, TOKENS) for i in range(ADAPTERS) for p in PROMPTS[:2]}
    clear = {key: answer for key, answer in found.items() if answer is not None}
    assert len(clear) > 0.8 * len(found)
    assert len({answer.logprobs for answer in clear.values()}) == len(clear)
    return clear


class Clients:
    """Streams that ask, check what they hear, and ask again; some leave half-way."""

    def __init__(self, url: str, expected: dict[tuple[str, str], Expected]) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.enough = False
        self._url, self._expected = url, expected
        names = sorted({model for model, _ in expected}, key=lambda name: int(name[1:]))
        self._names, self._law = names, [1 / (place + 1) for place in range(len(names))]

    async def run(self, streams: int, seconds: float, *others: Any) -> None:
        limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=60) as http:
            end = time.monotonic() + seconds
            await asyncio.gather(*(self._client(http, random.Random(i), end) for i in range(streams)), *others)

    async def _client(self, http: httpx.AsyncClient, draw: random.Random, end: float) -> None:
        while time.monotonic() < end and not self.wrong and not self.enough:
            model = draw.choices(self._names, self._law)[0]
            prompt = draw.choice([p for p in PROMPTS if (model, p) in self._expected])
            kind = draw.choices(["stream", "whole", "left"], [70, 25, 5])[0]
            try:
                await self._ask(http, model, prompt, kind)
            except (AssertionError, httpx.HTTPError, KeyError) as error:
                self.wrong.append(f"{model}, {prompt!r}, {kind}: {error!r}")

    async def _ask(self, http: httpx.AsyncClient, model: str, prompt: str, kind: str) -> None:
        asked = body(model, prompt, TOKENS, stream=kind != "whole")
        async with http.stream("POST", "/v1/completions", json=asked) as answer:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                self.counts["turned away"] += 1
                await asyncio.sleep(0.2)
                return
            assert answer.status_code == 200, (answer.status_code, (await answer.aread())[:300])
            assert answer.headers["x-veneer-adapter"] == f"{model}@1"
            if kind == "whole":
                choice = (await answer.aread(), answer.json())[1]["choices"][0]
                text, logprobs = choice["text"], choice["logprobs"]["token_logprobs"]
            elif kind == "left":
                await anext(answer.aiter_lines())
                self.counts[kind] += 1
                return
            else:
                text, logprobs = heard([line async for line in answer.aiter_lines() if line])
        self._expected[model, prompt].check(text, logprobs)
        self.counts[kind] += 1


def number(metrics: str, name: str) -> float:
    """One value out of Prometheus's text."""
    return next(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(f"{name} "))


def test_sixty_four_streams_over_a_hundred_adapters(server: Outside, answers: dict[tuple[str, str], Expected]) -> None:
    clients = Clients(server.url, answers)
    asyncio.run(clients.run(STREAMS, 5))  # every path is warm, the caches are full
    memory: list[tuple[float, float]] = []

    async def watch() -> None:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            memory.append((time.monotonic(), server.rss() / MB))
            await asyncio.sleep(0.5)

    asyncio.run(clients.run(STREAMS, SECONDS, watch()))
    assert not clients.wrong, (clients.wrong[:5], server.said())
    assert clients.counts["stream"] > 100 and clients.counts["whole"] > 30 and clients.counts["left"] > 5, (
        clients.counts
    )

    metrics = httpx.get(f"{server.url}/metrics").text
    assert number(metrics, "veneer_running") == number(metrics, "veneer_waiting") == 0
    assert number(metrics, 'veneer_adapter_events_total{event="eviction"}') > 10
    assert number(metrics, 'veneer_tier_bytes{tier="memory"}') <= 10e6
    late = memory[
        2 * len(memory) // 3 :
    ]  # until then oneDNN has met the shapes that it keeps code for: a bounded number
    seconds = late[-1][0] - late[0][0]
    grown = slope(late) * seconds
    assert grown < 24, f"{grown:.1f} MB more over {seconds:.0f} s: {[round(m) for _, m in memory[::20]]}"


def test_two_hundred_loads_and_unloads_under_traffic(
    shop: Shop, server: Outside, answers: dict[tuple[str, str], Expected]
) -> None:
    """An adapter of half a megabyte comes and goes; if each left itself behind, the process would grow by a hundred."""
    size = max(shop.library.resolve(f"a{i}").bytes for i in range(4))
    cycles, warm = 200, 80
    clients = Clients(server.url, answers)
    memory: list[float] = []

    async def cycle() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as admin:
            for turn in range(cycles):
                name = f"a{4 * (turn % 20) + 1}"
                assert (await admin.post(f"/admin/adapters/{name}/load")).status_code == 200
                end = time.monotonic() + 30
                while (await admin.get(f"/admin/adapters/{name}")).status_code != 200:
                    assert time.monotonic() < end
                    await asyncio.sleep(0.005)
                freed = await admin.post(f"/admin/adapters/{name}/unload")
                assert freed.status_code == 200, freed.text
                assert freed.json()["state"] != "failed", freed.text  # somebody may have asked for it again at once
                if turn >= warm:
                    memory.append(server.rss() / MB)
            clients.enough = True

    asyncio.run(clients.run(6, 120, cycle()))
    assert clients.enough and not clients.wrong, (clients.wrong[:5], server.said())
    assert clients.counts["stream"] > 20, clients.counts
    grown = slope(list(enumerate(memory))) * len(memory)
    assert grown < 0.4 * size * (cycles - warm) / MB, f"{grown:.1f} MB more: {[round(m) for m in memory[::10]]}"


def test_draining_ends_with_the_last_stream(shop: Shop, server: Outside) -> None:
    """Unloaded while it streams: the stream goes on to its own end, then the bytes are gone; the next request loads again."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        asked = {**body("a1", PROMPTS[0], 450), "stream": True}
        with http.stream("POST", "/v1/completions", json=asked) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            assert http.post("/admin/adapters/a1/unload").json()["state"] == "draining"
            rest = [first, *(line for line in lines if line)]
        text, logprobs = heard([line for line in rest if line])
        assert len(logprobs) == 450 and text
        end = time.monotonic() + 10
        while (state := http.get("/admin/adapters/a1").json()["state"]) != "available" and time.monotonic() < end:
            time.sleep(0.02)
        assert state == "available"
        expected = next(e for p in PROMPTS if (e := shop.expected(1, p, TOKENS)) and (prompt := p))
        choice = http.post("/v1/completions", json=body("a1", prompt, TOKENS)).json()["choices"][0]
        expected.check(choice["text"], choice["logprobs"]["token_logprobs"])


def test_the_library_may_be_changed_by_others_meanwhile(shop: Shop, server: Outside, tmp_path: Path) -> None:
    """New versions are published under traffic: every answer is wholly one version's."""
    name, first, second = "moving", 201, 202
    olds, news = (shop.expected(seed, PROMPTS[1], TOKENS) for seed in (first, second))
    assert olds is not None and news is not None
    shop.library.add(shop.adapter(first), name)

    async def traffic() -> Counter[str]:
        seen: Counter[str] = Counter()
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:

            async def asks() -> None:
                while seen["moving@2"] < 20:
                    answer = await http.post("/v1/completions", json=body(name, PROMPTS[1], TOKENS))
                    choice, ref = answer.json()["choices"][0], answer.headers["x-veneer-adapter"]
                    {"moving@1": olds, "moving@2": news}[ref].check(
                        choice["text"], choice["logprobs"]["token_logprobs"]
                    )
                    seen[ref] += 1

            async def publishes() -> None:
                while seen["moving@1"] < 20:
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(shop.library.add, shop.adapter(second), name)

            await asyncio.wait_for(asyncio.gather(publishes(), *(asks() for _ in range(8))), 60)
        return seen

    assert set(asyncio.run(traffic())) == {"moving@1", "moving@2"}
