"""The event files of a run, read back frame by frame, hold the numbers of metrics.jsonl."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tinylm
from veneer.errors import NotFound
from veneer.methods.lora import LoRA
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.train import Step, train
from veneer.train.tensorboard import FOLDER, SHOWN


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    tinylm.folder(folder / "base")
    tinylm.chat_rows(folder / "train.jsonl", 20)
    tinylm.chat_rows(folder / "eval.jsonl", 4, start=100)
    return folder


@pytest.fixture(scope="module")
def base(files: Path) -> Base:
    return load_base(str(files / "base"), dtype="float32")


def run(base: Base, files: Path, out: Path, **settings: Any) -> None:
    fixed = {"max_steps": 6, "eval_every": 2, "save_every": 2, "tokens_per_step": 80, "epochs": 9}
    train(base, files / "train.jsonl", eval=files / "eval.jsonl", method=LoRA(rank=2), out=out, **fixed | settings)


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum, bit by bit, masked as TFRecord files mask it."""
    rest = 0xFFFFFFFF
    for byte in data:
        rest ^= byte
        for _ in range(8):
            rest = rest >> 1 ^ (0x82F63B78 if rest & 1 else 0)
    rest ^= 0xFFFFFFFF
    return ((rest >> 15 | rest << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(folder: Path) -> Iterator[Any]:
    """Every event of a run, files in the order of their names (which begin with the time)."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted((folder / FOLDER).glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            head, body = data[:8], data[12 : 12 + struct.unpack("<Q", data[:8])[0]]
            stored = struct.unpack("<I", data[8:12])[0], struct.unpack("<I", data[12 + len(body) :][:4])[0]
            assert stored == (crc32c(head), crc32c(body))
            data = data[16 + len(body) :]
            yield Event.FromString(body)


def scalars(found: list[Any]) -> dict[str, dict[int, float]]:
    table: dict[str, dict[int, float]] = {}
    for event in found:
        for value in event.summary.value:
            table.setdefault(value.tag, {})[event.step] = value.simple_value
    return table


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_events_are_the_metrics(base: Base, files: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    run(base, files, tmp_path / "run", tensorboard=True)
    found, metrics = scalars(list(events(tmp_path / "run"))), lines(tmp_path / "run")
    assert set(found) == {*(f"train/{name}" for name in SHOWN), "eval/loss"}
    for name in SHOWN:
        wanted = {line["step"]: line[name] for line in metrics}
        assert found[f"train/{name}"] == pytest.approx(wanted, rel=1e-6), name
    wanted = {line["step"]: line["eval_loss"] for line in metrics if line.get("eval_loss") is not None}
    assert list(wanted) == [2, 4, 6] and found["eval/loss"] == pytest.approx(wanted, rel=1e-6)


def test_a_resumed_run_takes_back_the_steps_after_its_checkpoint(base: Base, files: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")

    def kill(event: Any) -> None:
        if isinstance(event, Step) and event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, files, tmp_path / "run", tensorboard=True, on_event=kill)
    assert max(scalars(list(events(tmp_path / "run")))["train/loss"]) == 5
    run(base, files, tmp_path / "run", tensorboard=True, resume=True)
    restart = [e.step for e in events(tmp_path / "run") if e.session_log.status]
    assert restart == [1, 5], "the checkpoint is of step 4, so step 5 is done again"
    assert max(scalars(list(events(tmp_path / "run")))["train/loss"]) == 6 == len(lines(tmp_path / "run"))


def test_it_can_be_switched_on_when_a_run_goes_on(base: Base, files: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    run(base, files, tmp_path / "run")
    assert not (tmp_path / "run" / FOLDER).exists()
    run(base, files, tmp_path / "run", tensorboard=True, resume=True)


def test_without_the_package_nothing_begins(
    base: Base, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboardX" else find(name))
    with pytest.raises(NotFound, match="tensorboardX") as caught:
        run(base, files, tmp_path / "run", tensorboard=True)
    assert "pip install 'veneer[tensorboard]'" in str(caught.value.help)
    assert not (tmp_path / "run").exists()
