"""Merging one adapter beside the base through the admin routes, while streams run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.small import lora, lowered_of, plain_greedy
from tests.server.conftest import ADMIN, ALICE, Running, eventually, start
from tests.server.test_operations import BODY, ask, expected
from veneer.engine import Engine

LONG = {**BODY, "max_tokens": 200, "ignore_eos": True, "stream": True}


def text_of(lines: list[str]) -> str:
    pieces = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(piece["choices"][0]["text"] for piece in pieces if piece.get("choices"))


def plain(running: Running, seed: int, count: int) -> str:
    tokenizer = running.base.require_tokenizer()
    adapter = lora(running.base, seed)
    prompt = tokenizer.encode(str(BODY["prompt"]))
    return tokenizer.decode(plain_greedy(running.base, prompt, lowered_of(running.base, adapter), count))


def test_an_adapter_is_heated_and_cooled_under_streams(tmp_path: Path) -> None:
    server = start(tmp_path)
    try:
        client = server.client()
        assert client.get("/admin/hot").json()["state"] == "cold"
        with client.stream("POST", "/v1/completions", json={**LONG, "model": "tickets@2"}) as answer:
            lines = answer.iter_lines()
            text = [next(lines)]
            begun = client.post("/admin/adapters/tickets@2/heat").json()
            assert begun["state"] in ("merging", "hot")
            assert eventually(lambda: client.get("/admin/hot").json()["state"] == "hot")
            assert ask(server, "legal").json()["choices"][0]["text"] == expected(server, 3)
            assert client.post("/admin/adapters/legal/heat").status_code == 409
            text += list(lines)
        assert text_of(text) == plain(server, 2, 200)
        answer = ask(server, "tickets@2")
        assert answer.json()["choices"][0]["text"] == expected(server, 2)
        assert answer.headers["x-veneer-adapter"] == "tickets@2"
        hot = client.get("/admin/hot").json()
        assert hot["digest"] == server.library.resolve("tickets@2").digest
        assert hot["bytes"] > 0
        shown = client.get("/metrics").text
        assert f'veneer_tier_bytes{{tier="merged"}} {float(hot["bytes"])}' in shown
        assert 'veneer_tier_adapters{tier="merged"} 1.0' in shown
        assert 'veneer_steps_total{weights="merged"}' in shown
        listed = client.get("/admin/adapters").json()
        local = server.service.engine.residency.resolve("local").digest
        assert [other["digest"] for other in listed["others"]] == [local], "a merged set is not an adapter"
        cooled = client.post("/admin/cool").json()
        assert cooled["freed_bytes"] == hot["bytes"]
        assert eventually(lambda: client.get("/admin/hot").json()["intact"] is True)
        assert ask(server, "tickets@2").json()["choices"][0]["text"] == expected(server, 2)
        assert client.post("/admin/adapters/small/heat").status_code == 400
        assert client.post("/admin/adapters/nothing/heat").status_code == 404
    finally:
        server.stop()


def test_unloading_a_hot_adapter_drops_its_merged_set(running: Running) -> None:
    client = running.client()
    client.post("/admin/adapters/legal/heat")
    assert eventually(lambda: client.get("/admin/hot").json()["state"] == "hot")
    size = client.get("/admin/hot").json()["bytes"]
    freed = client.post("/admin/adapters/legal/unload").json()["freed_bytes"]
    assert freed >= size
    assert eventually(lambda: client.get("/admin/hot").json()["state"] == "cold")
    assert ask(running, "legal").json()["choices"][0]["text"] == expected(running, 3)


def test_heating_needs_the_right_scope(guarded: Running) -> None:
    alice, admin = guarded.client(ALICE), guarded.client(ADMIN)
    assert alice.post("/admin/adapters/tickets/heat").status_code == 403
    assert alice.post("/admin/cool").status_code == 403
    assert alice.get("/admin/hot").status_code == 403
    assert admin.get("/admin/hot").status_code == 200
    assert admin.post("/admin/cool").json()["freed_bytes"] == 0


def test_the_command_line_heats_an_adapter_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engine.small import small_base
    from veneer.cli.main import run
    from veneer.server.service import Service

    base = small_base()
    lora(base, 1).save(tmp_path / "tickets")
    engines: list[Engine] = []

    def serve(service: Service) -> None:
        engines.append(service.engine)

    monkeypatch.setattr("veneer.models.load.load_base", lambda *a, **k: base)
    monkeypatch.setattr("veneer.server.run.serve", serve)
    command: list[Any] = ["serve", "--base", "x", "--adapter", f"tickets={tmp_path / 'tickets'}", "--hot", "tickets"]
    assert run(command) == 0
    assert engines[0].settle().state == "hot"
    assert run([*command[:-1], "tikets"]) == 1
