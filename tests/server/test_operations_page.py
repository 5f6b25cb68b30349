"""docs/howto/operations.md leaves nothing out: metrics, routes and options of the server are there, and what is there exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.server.conftest import Running
from veneer.cli.main import run

PAGE = (Path(__file__).resolve().parents[2] / "docs/howto/operations.md").read_text()


def test_metrics(running: Running) -> None:
    client = running.client()
    client.post("/v1/completions", json={"model": "tickets", "prompt": "hi", "max_tokens": 2})
    text = client.get("/metrics").text
    samples = set(re.findall(r"^((?:veneer_|vllm:)\w+)", text, re.M))
    found = {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples if not name.endswith("_created")}
    assert found == set(re.findall(r"`((?:veneer_|vllm:)\w+)", PAGE))


def test_routes(running: Running) -> None:
    for path in running.client().get("/openapi.json").json()["paths"]:
        if path.startswith(("/admin", "/v1/load", "/v1/unload", "/health", "/ready", "/metrics")):
            shown = path.replace("{ref}", "REF")
            last = "/" + shown.rsplit("/", 1)[1]
            assert f"{shown}`" in PAGE or (path.count("/") > 2 and f"`{last}`" in PAGE), path
    for path in re.findall(r"`(?:GET|POST) (/admin[^`]*)`", PAGE):
        asked = path.replace("NAME@VERSION", "REF").replace("REF", "{ref}")
        assert asked in running.client().get("/openapi.json").json()["paths"], path


def test_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["serve", "--help"]) == 0
    options = set(re.findall(r"^\s+(--[a-z-]+)", capsys.readouterr().out, re.M))
    assert len(options) > 12
    told = set(re.findall(r"(--[a-z-]+)", PAGE))
    assert options - told == set()
