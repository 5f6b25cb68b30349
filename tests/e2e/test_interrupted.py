"""Runs that are cut short: killed, stopped with Ctrl+C, out of disk. --resume ends at the same numbers, bit for bit."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import veneer as package
from tests.e2e.world import STEPS, contents, losses, make, same_numbers, veneer
from veneer.adapter import Adapter
from veneer.train import loop

KILLED_IN_CHECKPOINT = """
import os, signal
seen, flush = [], os.fsync
def fsync(handle):
    flush(handle)
    if "state.safetensors" in os.readlink(f"/proc/self/fd/{handle}"):
        seen.append(handle)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
"""
WAITS_FOR_CTRL_C = """
import signal, time
from veneer.train import loop
step = loop._step
def wait(run, *others):
    while run.cursor.step >= 8 and not signal.getsignal(signal.SIGINT).__self__.asked:
        time.sleep(0.02)
    return step(run, *others)
loop._step = wait
"""
MAIN = "\nfrom veneer.cli.main import main\nmain()"


class World(NamedTuple):
    """A user's folder with an uninterrupted run in `whole/`, and two runs under way in processes of their own."""

    folder: Path
    killed: subprocess.Popen[str]
    interrupted: subprocess.Popen[str]

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from veneer.cli.main import run

    folder = make(tmp_path_factory.mktemp("cut"))
    processes = [
        start(folder, name, before)
        for name, before in (("killed", KILLED_IN_CHECKPOINT), ("interrupted", WAITS_FOR_CTRL_C))
    ]
    try:
        assert run(["train", str(folder / "run.yaml"), "--out", str(folder / "whole"), "--json"]) == 0
        assert len(losses(folder / "whole")) == STEPS
        yield World(folder, *processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def start(folder: Path, out: str, before: str) -> subprocess.Popen[str]:
    """`veneer train` as a process of its own, with `before` executed first."""
    source = str(Path(package.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", before + MAIN, "train", str(folder / "run.yaml"), "--out", str(folder / out)],
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def resumes_to_the_same_numbers(world: World, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = veneer(capsys, "train", world.config, "--out", out, "--resume")
    assert answer.code == 0, answer.err
    assert same_numbers(out, world.folder / "whole")
    leftovers = [name for name in contents(out) if name.endswith(".part") or ".new-" in name]
    assert leftovers == []


def test_a_run_killed_while_it_writes_a_checkpoint(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    out = world.folder / "killed"
    _, complaint = world.killed.communicate(timeout=120)
    assert world.killed.returncode == -signal.SIGKILL, complaint
    assert list(out.glob("checkpoint/.*.part")), "the kill was to come before the checkpoint is in place"
    Adapter.load(out / "adapter")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')  # a line that did not reach the disk whole
    refused = veneer(capsys, "train", world.config, "--out", out)
    assert refused.code == 1 and "--resume" in refused.help
    resumes_to_the_same_numbers(world, out, capsys)


def test_ctrl_c_saves_says_how_to_go_on_and_resumes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    out, process = world.folder / "interrupted", world.interrupted
    metrics, give_up = out / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 7):
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, complaint = process.communicate(timeout=120)
    assert process.returncode == 1, complaint
    assert "stopped" in said and "stopping after this step" in complaint
    assert "help: the same command with --resume" in complaint
    assert "Traceback" not in complaint
    assert 8 <= len(losses(out)) < STEPS
    Adapter.load(out / "adapter")
    resumes_to_the_same_numbers(world, out, capsys)


@pytest.mark.parametrize(("limit", "what"), [(1_000, "metrics.jsonl"), (10_000, "adapter"), (40_000, "checkpoint")])
def test_a_disk_that_fills_up_during_a_run(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    what: str,
) -> None:
    """After ten steps no file may grow beyond `limit` bytes: a real error of the system in the middle of a write."""
    out, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    kept: dict[str, str] = {}
    step = loop._step

    def full(run: Any, *others: Any) -> Any:
        if run.cursor.step == 10:
            kept.update(contents(out))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        return step(run, *others)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_step", full)
            answer = veneer(capsys, "train", world.config, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert answer.code == 1 and what in answer.err.split("error:")[1], answer.err
    assert "File too large" in answer.err and "space" in answer.help
    now = contents(out)
    assert now["checkpoint/state.safetensors"] == kept["checkpoint/state.safetensors"]
    Adapter.load(out / "adapter")
    resumes_to_the_same_numbers(world, out, capsys)
