"""Several runs over one base: each bitwise what it is alone, and one that fails stops alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import tinylm
from veneer.adapter import Adapter
from veneer.cli.main import run
from veneer.errors import ConfigError
from veneer.models.load import load_base
from veneer.train import Failed, loop, read_runs, read_task, run_many, run_task


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tinylm.chat_rows(folder / "train.jsonl", 12)
    tinylm.chat_rows(folder / "other.jsonl", 10, start=50)
    values = {
        "base": str(folder / "base"),
        "data": {"train": "train.jsonl"},
        "method": {"kind": "lora", "rank": 2},
        "train": {"epochs": 2, "tokens_per_step": 150, "lr": "5e-3"},
        "runs": [
            {"out": str(folder / "one")},
            {"out": str(folder / "two"), "method": {"rank": 4}, "data": {"train": "other.jsonl"}, "train": {"seed": 5}},
        ],
    } | changes
    (folder / "runs.yaml").write_text(yaml.safe_dump(values))
    return folder / "runs.yaml"


def test_each_run_is_bitwise_what_it_is_alone(tmp_path: Path) -> None:
    tinylm.folder(tmp_path / "base")
    runs = read_runs(write(tmp_path))
    base = load_base(str(tmp_path / "base"), dtype="float32")
    tasks = {r.config.out.name: (read_task(base, r), r.config.out) for r in runs}
    list(run_many(base, tasks))
    for resolved in runs:
        alone = tmp_path / f"{resolved.config.out.name}-alone"
        list(run_task(base, read_task(base, resolved), alone))
        together, separate = (Adapter.load(f / "adapter") for f in (resolved.config.out, alone))
        for a, b in zip(together.parts, separate.parts, strict=True):
            assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    tinylm.folder(tmp_path / "base")
    path = write(
        tmp_path,
        runs=[{"out": str(tmp_path / "bad"), "train": {"lr": 1e38, "clip": None}}, {"out": str(tmp_path / "good")}],
    )
    base = load_base(str(tmp_path / "base"), dtype="float32")
    tasks = {r.config.out.name: (read_task(base, r), r.config.out) for r in read_runs(path)}
    failed = [name for name, event in run_many(base, tasks) if isinstance(event, Failed)]
    assert failed == ["bad"]
    lines = (tmp_path / "good/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == len(lines)
    assert (tmp_path / "good/adapter").exists()


def test_a_defect_in_one_run_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tinylm.folder(tmp_path / "base")
    real = loop.rate_at

    def broken(step: int, total: int, config: Any) -> float:
        return real(step, total, config) if config.seed else {}["gone"]

    monkeypatch.setattr(loop, "rate_at", broken)
    assert run(["train", str(write(tmp_path))]) == 1
    told = capsys.readouterr().out
    assert f"{tmp_path / 'one'}: failed: KeyError: 'gone' (a defect in veneer" in told
    assert f"the adapter is in {tmp_path / 'two' / 'adapter'}" in told and (tmp_path / "two" / "report.md").exists()


def test_a_section_may_be_empty_and_a_whole_one_may_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "files", train=None, runs=None, out="x")
    (one,) = read_runs(path, ["train.epochs=3", "data={train: mine.jsonl}"])
    assert one.config.train.epochs == 3 and one.config.data.train == Path("mine.jsonl")
    assert one.origins["data.train"] == "--set"
    (two,) = read_runs(path, ["train.epochs=3"])
    assert two.config.data.train == (tmp_path / "files" / "train.jsonl").resolve()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.epochs", ".inf"),
        ("train.lr", ".nan"),
        ("train.lr", "true"),
        ("train.seed", "true"),
        ("method.alpha", ".inf"),
        ("method.rank", "true"),
    ],
)
def test_numbers_are_numbers(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: (expected a finite number|expected another value than true)"):
        read_runs(write(tmp_path), [f"{key}={value}"])


def test_entries_are_laid_over_the_shared_keys_with_their_origins(tmp_path: Path) -> None:
    one, two = read_runs(write(tmp_path), ["train.clip=0.5"])
    assert (one.config.method["rank"], two.config.method["rank"]) == (2, 4)
    assert two.config.train.seed == 5 and two.config.train.clip == 0.5
    assert two.origins["train.seed"] == "runs.yaml runs[1]" and two.origins["train.clip"] == "--set"
    assert two.config.data.train == (tmp_path / "other.jsonl").resolve()


def test_the_command_line_stands_above_the_entries(tmp_path: Path) -> None:
    one, two = read_runs(write(tmp_path), ["train.seed=9", "method.rank=8"])
    assert [run.config.train.seed for run in (one, two)] == [9, 9]
    assert [run.config.method["rank"] for run in (one, two)] == [8, 8]
    assert two.origins["train.seed"] == two.origins["method.rank"] == "--set"


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([{"out": "x"}, {"out": "x"}], "two runs write to"),
        ([{"out": "x"}, {"out": "y", "quantize": "nf4"}], "different bases"),
        ("x", "must be a list"),
        ([], "must be a list"),
        ([{"out": "x", "train": {"epoch": 1}}], "did you mean 'epochs'"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path: Path, runs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_runs(write(tmp_path, runs=runs))
