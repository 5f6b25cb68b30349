"""What a user has on disk: a base, data, a run file and a finished run; and the command line as they meet it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import tinylm
from veneer.cli.main import run

STEPS = 30
TRAIN = f"""
epochs: 10
max_steps: {STEPS}
lr: 0.01
tokens_per_step: 80
eval_every: 7
save_every: 5
dtype: float32
"""


def make(folder: Path) -> Path:
    """Base, data and run file in `folder`."""
    tinylm.folder(folder / "base")
    tinylm.chat_rows(folder / "train.jsonl", 30)
    tinylm.chat_rows(folder / "eval.jsonl", 6, start=100)
    (folder / "run.yaml").write_text(
        f"base: {folder / 'base'}\n"
        "data: {train: train.jsonl, eval: eval.jsonl}\n"
        "method: {kind: lora, rank: 2, dropout: 0.1}\n"
        f"train:{TRAIN.replace(chr(10), chr(10) + '  ').rstrip()}\n"
        f"out: {folder / 'run'}\n"
    )
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` with the digest of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def help(self) -> str:
        """The next step, as the message gives it."""
        found = re.search(r"^help: (.+)", self.err, re.M)
        return found[1] if found else ""


def veneer(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Answer:
    """Run a command line in this process."""
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return Answer(code, said.out, said.err)


def same_numbers(one: Path, other: Path) -> bool:
    """Whether two run folders hold the same adapters, bit for bit, and the same losses step by step."""
    for name in ("adapter", "last"):
        file = f"{name}/adapter_model.safetensors"
        if (one / file).read_bytes() != (other / file).read_bytes():
            return False
    return losses(one) == losses(other)


def losses(folder: Path) -> list[tuple[int, float, float | None]]:
    """(step, loss, held-out loss) of each line of a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line.get("eval_loss")) for line in lines]
