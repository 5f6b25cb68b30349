"""What a run file may say is read by something, and what a run leaves on its page is what was measured."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.e2e.world import make
from veneer.cli.main import run
from veneer.train import RunConfig, TrainConfig
from veneer.train.config import DataConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("page"))


def train(folder: Path, out: Path, *settings: str) -> Path:
    words = [word for setting in settings for word in ("--set", setting)]
    assert run(["train", str(folder / "run.yaml"), "--out", str(out), *words]) == 0
    return out


def test_every_key_of_a_run_file_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    for section in (RunConfig, DataConfig, TrainConfig):

        def record(self: object, name: str, section: type = section) -> object:
            if name in section.model_fields:
                seen.add(f"{section.__name__}.{name}")
            return object.__getattribute__(self, name)

        monkeypatch.setattr(section, "__getattribute__", record)
    train(folder, tmp_path / "run", "train.max_steps=3")
    keys = {f"{s.__name__}.{key}" for s in (RunConfig, DataConfig, TrainConfig) for key in s.model_fields}
    assert keys - seen == set()


def test_the_report_says_what_the_metrics_say(folder: Path, tmp_path: Path) -> None:
    general = f"data.general={folder / 'eval.jsonl'}"
    out = train(folder, tmp_path / "run", "train.max_steps=9", "train.eval_every=3", general)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    page = (out / "report.md").read_text()
    rows = {row.group(1): row.group(2) for row in re.finditer(r"^\| (.+?) \| (.+) \|$", page, re.M)}
    held = [(line["eval_loss"], line["step"]) for line in lines if line.get("eval_loss") is not None]
    best, at = min(held)
    assert rows["held-out loss, first, best and last"] == f"{held[0][0]:.4f}, {best:.4f} (step {at}), {held[-1][0]:.4f}"
    assert rows["training loss, first and last"] == f"{lines[0]['loss']:.4f}, {lines[-1]['loss']:.4f}"
    assert rows["steps"] == "9" and "general loss, first, best and last" in rows
    assert rows["useful tokens"].startswith(f"{sum(line['tokens'] for line in lines):,} in ")
    assert rows["base"].startswith("base (`") and rows["dtype"] == "float32"
    assert "![loss over steps](loss.png)" in page and (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "loss.svg").read_text()[:1000]


def test_a_report_without_matplotlib_has_no_picture(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    out = train(folder, tmp_path / "run", "train.max_steps=1")
    page = (out / "report.md").read_text()
    assert "![" not in page and "| steps | 1 |" in page and not (out / "loss.png").exists()
