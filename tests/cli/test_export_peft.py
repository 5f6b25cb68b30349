"""export --format peft of an adapter that PEFT's format has no words for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from veneer.adapter import Adapter, Part
from veneer.cli.main import run
from veneer.methods import parse


def test_what_peft_cannot_say_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = Part("bitfit", "weight", "o_proj", {"bias": torch.ones(4)})
    Adapter(parse({"kind": "bitfit", "targets": ["o_proj"]}), (part,)).save(tmp_path / "a")
    assert run(["export", "--format", "peft", "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 1
    assert "can't say this adapter (bitfit)" in capsys.readouterr().err and not (tmp_path / "out").exists()
