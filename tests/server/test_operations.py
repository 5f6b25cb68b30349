"""Admin, metrics, health, faults: what runs is never wrong or stale, and one request's trouble is its own."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine.small import lora, lowered_of, plain_greedy
from tests.server.conftest import Running, eventually, start
from veneer.engine import Limits
from veneer.server import logs
from veneer.server.metrics import Metrics

BODY = {"prompt": "hello there", "max_tokens": 6, "temperature": 0}


def ask(running: Running, model: str, **more: Any) -> Any:
    return running.client().post("/v1/completions", json={**BODY, "model": model, **more})


def expected(running: Running, seed: int, count: int = 6) -> str:
    tokenizer = running.base.require_tokenizer()
    prompt = tokenizer.encode(str(BODY["prompt"]))
    return tokenizer.decode(
        plain_greedy(running.base, prompt, lowered_of(running.base, lora(running.base, seed)), count)
    )


def test_adapters_are_loaded_pinned_and_unloaded_by_name(running: Running) -> None:
    client = running.client()
    assert client.post("/admin/adapters/legal/load", json={"pinned": True}).json()["ref"] == "legal@1"
    assert eventually(lambda: client.get("/admin/adapters/legal").status_code == 200)
    assert client.get("/admin/adapters/legal").json()["pinned"]
    listed = {a["ref"]: a["state"] for a in client.get("/admin/adapters").json()["adapters"]}
    assert listed["legal@1"] == "resident"
    freed = client.post("/admin/adapters/legal/unload").json()
    assert freed["state"] == "available"
    assert freed["freed_bytes"] > 0
    assert client.get("/admin/adapters/legal").status_code == 503
    assert ask(running, "legal").json()["choices"][0]["text"] == expected(running, 3)
    for path in ("../secret", "%2e%2e%2fsecret", "small"):
        assert client.post(f"/admin/adapters/{path}/load").status_code in (400, 404, 405)


def test_vllm_routes_take_names_and_never_paths(running: Running) -> None:
    client = running.client()
    good = client.post("/v1/load_lora_adapter", json={"lora_name": "tickets", "lora_path": "tickets@1"})
    assert good.json()["ref"] == "tickets@1"
    for path in ("/etc", "../library", "other"):
        bad = client.post("/v1/load_lora_adapter", json={"lora_name": "tickets", "lora_path": path})
        assert bad.status_code == 400
        assert "never paths" in bad.json()["error"]["message"]
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "unheard-of"}).status_code == 404
    assert eventually(lambda: client.get("/admin/adapters/tickets@1").status_code == 200)
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "tickets@1"}).json()["state"] == "available"


def test_a_new_version_answers_at_once_and_running_streams_keep_theirs(running: Running) -> None:
    body = {**BODY, "model": "moving", "max_tokens": 60, "ignore_eos": True}
    running.library.add(lora(running.base, 21), "moving")
    with running.client().stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = answer.iter_lines()
        text = [next(lines)]
        running.library.add(lora(running.base, 22), "moving")
        fresh = ask(running, "moving")
        text += list(lines)
    assert fresh.headers["x-veneer-adapter"] == "moving@2"
    assert fresh.json()["choices"][0]["text"] == expected(running, 22)
    streamed = "".join(
        json.loads(line[6:])["choices"][0]["text"] for line in text if line.startswith("data: {") and "choices" in line
    )
    tokenizer = running.base.require_tokenizer()
    prompt = tokenizer.encode(str(BODY["prompt"]))
    old = plain_greedy(running.base, prompt, lowered_of(running.base, lora(running.base, 21)), 60)
    assert streamed == tokenizer.decode(old)


def test_usage_counts_what_came_from_the_cache(running: Running) -> None:
    prompt = "a long prompt that is asked again and again " * 3
    first = ask(running, "tickets@1", prompt=prompt).json()["usage"]
    second = ask(running, "tickets@1", prompt=prompt).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == 128
    assert second["prompt_tokens"] == len(prompt)
    usage = running.client().get("/admin/usage").json()["usage"]
    assert usage["adapter tickets@1"]["cached_tokens"] >= 128
    assert usage["key local"]["requests"] >= 2


def test_usage_has_one_line_for_each_version_whatever_its_scale(running: Running) -> None:
    """Scales are the client's to choose: a line for each would be memory for the asking."""
    pair = {"adapter": [{"name": "tickets@1", "scale": 0.37}, {"name": "legal", "scale": 0.5}]}
    before = running.client().get("/admin/usage").json()["usage"]
    assert ask(running, "small", **pair).status_code == 200
    usage = running.client().get("/admin/usage").json()["usage"]
    assert not any("*" in who or "," in who for who in usage)
    for who in ("adapter tickets@1", "key local"):
        assert usage[who]["requests"] == before.get(who, {}).get("requests", 0) + 1


def test_metrics_have_few_labels(running: Running) -> None:
    ask(running, "legal")
    text = running.client().get("/metrics").text
    for name in (
        'veneer_requests_total{adapter="legal",outcome="ok"}',
        "veneer_first_token_seconds_bucket",
        "veneer_inter_token_seconds_count",
        "veneer_queue_seconds_sum",
        "veneer_step_adapters_bucket",
        'veneer_adapters{state="resident"}',
        f'veneer_tier_adapters{{tier="library"}} {running.library.stock()[0]}.0',
        'veneer_tier_adapters{tier="memory"}',
        'veneer_tier_bytes{tier="merged"} 0.0',
        "veneer_adapter_load_seconds_count",
        'veneer_adapter_events_total{event="hit"}',
        'veneer_tokens_total{adapter="legal",kind="completion"}',
        'vllm:lora_requests_info{max_lora="32"',
        'veneer_kv_bytes{kind="budget"}',
    ):
        assert name in text, name
    metrics = Metrics(2)
    assert [metrics.label(n) for n in ("a", "b", "c", "a", None, "c")] == ["a", "b", "other", "a", "base", "other"]


def test_logs_name_what_answered(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="veneer.requests"):
        answer = running.client().post(
            "/v1/completions", json={**BODY, "model": "legal"}, headers={"x-request-id": "my-id-1"}
        )
        assert answer.headers["x-request-id"] == "my-id-1"
        assert eventually(lambda: bool(caplog.records))
    line = json.loads(logs.JsonLines().format(caplog.records[-1]))
    assert line["event"] == "request"
    assert line["adapter"] == "legal@1"
    assert line["digest"] == running.library.resolve("legal").digest
    assert (line["outcome"], line["completion_tokens"], line["key"]) == ("ok", 6, "local")
    odd = running.client().get("/health", headers={"x-request-id": "no spaces allowed"})
    assert odd.headers["x-request-id"] != "no spaces allowed"


def test_a_defect_in_a_step_ends_requests_and_not_the_server(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = running.service.engine
    healthy = engine._runner.run

    def broken(*_: Any, **__: Any) -> Any:
        monkeypatch.setattr(engine._runner, "run", healthy)
        raise RuntimeError("cosmic ray")

    monkeypatch.setattr(engine._runner, "run", broken)
    answer = ask(running, "legal")
    assert answer.status_code == 500
    assert "cosmic" not in answer.text
    assert ask(running, "legal").json()["choices"][0]["text"] == expected(running, 3)


def test_a_damaged_adapter_is_its_own_trouble(running: Running, tmp_path: Path) -> None:
    running.library.add(lora(running.base, 30), "damaged")
    blobs = running.library.show("damaged").files
    weights = next(f.blob for f in blobs if f.path.endswith("safetensors"))
    stored = next(p for p in Path(running.library.url).rglob(f"*{weights[8:]}*") if p.is_file())
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.chmod(0o644)
    stored.write_bytes(bytes(content))
    for stream in (False, True):
        answer = ask(running, "damaged", stream=stream)
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]["type"] == "adapter_error"
    facts = running.client().get("/admin/adapters/damaged").json()
    assert facts["state"] == "failed"
    assert facts["reason"]
    assert ask(running, "legal").status_code == 200
    running.library.remove("damaged", force=True)


def test_too_many_requests_are_turned_away_with_a_time(tmp_path: Path) -> None:
    limits = Limits(streams=1, waiting=1)
    server = start(tmp_path, engine={"limits": limits})
    try:
        body = {**BODY, "model": "small", "max_tokens": 100, "ignore_eos": True}
        codes: list[Any] = []

        def post() -> None:
            codes.append(server.client().post("/v1/completions", json=body))

        threads = [threading.Thread(target=post) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        statuses = sorted(c.status_code for c in codes)
        assert statuses[0] == 200
        assert statuses[-1] == 429
        turned = next(c for c in codes if c.status_code == 429)
        assert int(turned.headers["retry-after"]) >= 1
    finally:
        server.stop()


def test_a_late_answer_is_an_error_or_a_cut_stream(tmp_path: Path) -> None:
    server = start(tmp_path, timeout=0.3)
    try:
        body = {"max_tokens": 480, "ignore_eos": True}
        answer = ask(server, "small", **body)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        streamed = ask(server, "small", **body, stream=True)
        assert streamed.status_code == 200
        assert '"finish_reason": "length"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
    finally:
        server.stop()


def test_stopping_finishes_the_streams_and_takes_no_new_ones(tmp_path: Path) -> None:
    server = start(tmp_path, drain=20.0)
    body = {**BODY, "model": "tickets", "max_tokens": 120, "ignore_eos": True, "stream": True}
    with server.client().stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.service.loop.refuse_new()
        assert server.client().get("/ready").status_code == 503
        refused = ask(server, "small")
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "unavailable_error")
        assert int(refused.headers["retry-after"]) >= 1
        server.server.should_exit = True
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    pieces = [json.loads(line[6:]) for line in rest if line.startswith("data: {")]
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    server.stop()
    assert not server.service.loop.alive


def test_health_says_when_the_engine_is_gone(tmp_path: Path) -> None:
    server = start(tmp_path)
    try:
        server.service.loop.stop(5.0)
        assert not server.service.loop.alive
        assert server.client().get("/health").status_code == 503
        assert server.client().get("/metrics").status_code == 503
    finally:
        server.stop()


def test_an_idle_server_that_is_told_to_stop_still_says_how_it_is(tmp_path: Path) -> None:
    server = start(tmp_path)
    try:
        server.service.loop.refuse_new()
        time.sleep(0.1)
        for path in ("/metrics", "/v1/models", "/admin/hot", "/health"):
            assert server.client().get(path, timeout=5).status_code == 200, path
        assert ask(server, "small").status_code == 503
    finally:
        server.stop()


def test_what_was_answered_counts_though_the_client_left(running: Running) -> None:
    client = running.client()

    def counted() -> dict[str, int]:
        return dict(client.get("/admin/usage").json()["usage"].get("adapter legal@1", {}))

    before = counted()
    body = {**BODY, "model": "legal", "max_tokens": 480, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        for _ in range(12):
            next(lines)
    assert eventually(lambda: counted().get("cancelled", 0) == before.get("cancelled", 0) + 1)
    assert counted()["completion_tokens"] - before.get("completion_tokens", 0) >= 5
    assert counted()["prompt_tokens"] - before.get("prompt_tokens", 0) == len(str(BODY["prompt"]))


def test_the_servers_limit_holds_for_who_names_none(tmp_path: Path) -> None:
    server = start(tmp_path, max_tokens=8)
    try:
        chat = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
        answer = server.client().post("/v1/chat/completions", json=chat).json()
        assert answer["usage"]["completion_tokens"] == 8
        completion = server.client().post("/v1/completions", json={"prompt": "hi", "ignore_eos": True}).json()
        assert completion["usage"]["completion_tokens"] == 8
        assert server.client().post("/v1/completions", json={"prompt": "hi", "max_tokens": 9}).status_code == 400
        assert server.client().post("/v1/completions", json={"prompt": "hi", "min_tokens": 9}).status_code == 400
    finally:
        server.stop()


def test_versions_with_the_same_content_are_both_shown_as_they_are(running: Running) -> None:
    client = running.client()
    running.library.add(lora(running.base, 1), "twin")
    try:
        ask(running, "twin")
        listed = client.get("/admin/adapters").json()
        states = {a["ref"]: a["state"] for a in listed["adapters"]}
        assert states["twin@1"] == states["tickets@1"] == "resident"
        assert not {a["digest"] for a in listed["others"]} & {a["digest"] for a in listed["adapters"]}
    finally:
        running.library.remove("twin@1", force=True)


def test_admin_means_production_by_a_bare_name_whatever_the_canaries_take(running: Running) -> None:
    """What a client's request draws by chance is no way to say which version to unload."""
    client = running.client()
    for ref, alias, weight in (("tickets@2", "production", None), ("tickets@1", "canary", 0.9)):
        assert client.post("/admin/alias", json={"ref": ref, "alias": alias, "weight": weight}).status_code == 200
    assert client.post("/admin/adapters/tickets/load").json()["ref"] == "tickets@2"
    assert eventually(lambda: client.get("/admin/adapters/tickets@2").status_code == 200)
    assert client.post("/admin/adapters/tickets/unload").json()["ref"] == "tickets@2"
    assert client.get("/admin/adapters/tickets").json()["ref"] == "tickets@2"
    assert client.get("/v1/models/tickets").json()["root"] == "tickets@2"
