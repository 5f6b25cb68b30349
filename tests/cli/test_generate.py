"""`generate` and `chat`: several voices out of one batch, a memory for each, JSON for machines."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.engine.small import lora, small_base, with_tokenizer
from veneer.cli.main import run
from veneer.models import load


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Two adapter folders, and a small base behind every name."""
    base = with_tokenizer(small_base())
    monkeypatch.setattr(load, "load_base", lambda name: base)
    for i, name in enumerate(("red", "blue")):
        lora(base, i).save(tmp_path / name)
    return ["--adapter", str(tmp_path / "red"), "--adapter", f"b={tmp_path / 'blue'}@0.5"]


def test_voices_side_by_side(adapters: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "hi", "--base", "x", "--max-tokens", "5", "--with-base", "--json", *adapters]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["base", "red", "b"]
    assert found["base"]["adapter"] is None
    assert len(found["red"]["adapter"]) == 64
    assert len({answer["text"] for answer in found.values()}) == 3
    assert run(["generate", "hi", "--base", "x", "--max-tokens", "5", *adapters]) == 0
    out = capsys.readouterr().out
    assert "red:" in out
    assert "b:" in out


def test_a_single_voice_speaks_plainly(adapters: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "hi", "--base", "x", "--max-tokens", "5", "--raw", "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["base"]["text"]
    assert run(["generate", "hi", "--base", "x", "--max-tokens", "5", "--raw"]) == 0
    assert capsys.readouterr().out == f"{text}\n"


def test_each_voice_remembers_its_own_words(
    adapters: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n/reset\ntwo\nthree\n/exit\nfour\n"))
    assert run(["chat", "--base", "x", "--max-tokens", "4", "--temperature", "0", "--json", *adapters]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["red", "b"]
    for said in found.values():
        assert [turn["content"] for turn in said if turn["role"] == "user"] == ["two", "three"]
        assert [turn["role"] for turn in said] == ["user", "assistant"] * 2


def test_a_missing_adapter_is_a_usage_error(adapters: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "hi", "--base", "x", "--adapter", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
