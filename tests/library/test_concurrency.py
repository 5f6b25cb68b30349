"""Writers in several processes, killed at every point and at random: no lost update, no half adapter, nothing left after gc."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.library.shelf import files_under, folder, make
from veneer.errors import VeneerError
from veneer.library import Library

FORK = multiprocessing.get_context("fork")
POINTS = {
    "open",
    "os.rename",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "sqlite3.connect",
    "os.scandir",
}


def _run(work: Callable[[], None]) -> BaseProcess:
    process = FORK.Process(target=work)
    process.start()
    return process


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(point: int) -> None:
    """Kill this process at the `point`-th thing it asks of the file system, or at a commit."""
    from sqlalchemy import Engine, event

    seen = -1
    lock = threading.Lock()

    def reached(*_: Any) -> None:
        nonlocal seen
        with lock:
            seen += 1
            if seen == point:
                _kill_self()

    sys.addaudithook(lambda name, _: reached() if name in POINTS else None)
    event.listen(Engine, "commit", reached)


def _sound(root: Path) -> Library:
    """Nothing half-done can be seen, and after gc nothing is left over."""
    library = Library(root)
    report = library.verify()
    assert report.is_clean, report.problems
    library.gc()
    assert library.verify().orphans == 0
    return library


def _lives_through_kills(root: Path, stride: int, offset: int, work: Callable[[int], None]) -> int:
    """Run `work(k)` in processes that die at point offset, offset + stride, ... until one gets through. Kills are counted."""
    for kills in range(400):

        def doomed(point: int = offset + kills * stride) -> None:
            _die_at(point)
            work(point)
            os._exit(0)

        process = _run(doomed)
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        _sound(root).close()
        if process.exitcode == 0:
            return kills
    raise AssertionError("no process got through")


def _add_and_move(root: Path, sources: Path) -> Callable[[int], None]:
    def work(point: int) -> None:
        library = Library(root)
        added = library.add(sources / str(point % 8), "tickets")
        library.alias(added.version.ref, "production")
        if not added.new:
            library.unalias("tickets", "production")
            library.remove(added.version.ref)

    return work


@pytest.mark.parametrize("stride", [pytest.param(7), pytest.param(1, marks=pytest.mark.slow)])
def test_a_writer_may_die_anywhere(tmp_path: Path, stride: int) -> None:
    root, sources = tmp_path / "library", tmp_path / "sources"
    for seed in range(8):
        folder(sources / str(seed), seed)
    Library(root).add(make(99), "first")
    kills = _lives_through_kills(root, stride, random.randrange(stride), _add_and_move(root, sources))
    assert kills > 40 / stride
    library = _sound(root)
    known = library.list(), library.aliases()
    library.close()
    for file in root.glob("catalogue.sqlite*"):
        file.unlink()
    again = Library(root)
    again.rebuild()
    assert (again.list(), again.aliases()) == known


def test_a_library_may_die_while_it_is_made(tmp_path: Path) -> None:
    source = folder(tmp_path / "a")
    for point in range(0, 60, 9):
        root = tmp_path / f"library{point}"

        def doomed(root: Path = root, point: int = point) -> None:
            _die_at(point)
            Library(root).add(source, "tickets")
            os._exit(0)

        process = _run(doomed)
        process.join(60)
        Library(root).add(source, "tickets")
        assert [v.ref for v in _sound(root).list()] == ["tickets@1"]


@dataclass(frozen=True)
class Writer:
    """Adds its own adapters and moves a shared alias to each; what the library confirmed is in `confirmed`, a line a fact."""

    root: Path
    sources: Path
    number: int
    items: int

    @property
    def confirmed(self) -> Path:
        return self.sources / f"confirmed-{self.number}"

    def done(self) -> list[list[str]]:
        lines = self.confirmed.read_text().splitlines() if self.confirmed.exists() else []
        return [line.split() for line in lines if line.endswith(".")]

    def __call__(self) -> None:
        library = Library(self.root)
        start = sum(1 for fact in self.done() if fact[0] == "moved")
        with open(self.confirmed, "a") as log:
            for item in range(start, self.items):
                added = library.add(self.sources / f"{self.number}-{item}", f"name{item % 3}").version
                print("added", added.ref, added.digest, ".", file=log, flush=True)
                reason = f"w{self.number}i{item}"
                library.alias(added.ref, "production", reason=reason)
                print("moved", added.name, added.version, reason, ".", file=log, flush=True)
                if item % 5 == 4:
                    library.gc()
        os._exit(0)


def _storm(tmp_path: Path, writers: int, items: int, kills: int, seconds: float) -> None:
    root, sources = tmp_path / "library", tmp_path / "sources"
    pattern = folder(tmp_path / "pattern")
    for writer in range(writers):
        for item in range(items):
            _vary(pattern, sources / f"{writer}-{item}", 1 + writer * items + item)
    generator = random.Random()
    team = [Writer(root, sources, number, items) for number in range(writers)]
    running = {writer: _run(writer) for writer in team}
    end = time.monotonic() + seconds
    while running:
        assert time.monotonic() < end, "the writers did not finish"
        time.sleep(generator.uniform(0.01, 0.15))
        if kills > 0:
            victim = generator.choice(list(running))
            process = running[victim]
            if process.is_alive():
                kills -= 1
                process.kill()
        for writer, process in list(running.items()):
            if not process.is_alive():
                process.join()
                if process.exitcode == 0:
                    del running[writer]
                else:
                    assert process.exitcode == -signal.SIGKILL, process.exitcode
                    running[writer] = _run(writer)
    _check(_sound(root), team, items)
    shutil.rmtree(root)


def _vary(pattern: Path, target: Path, seed: int) -> None:
    """An adapter folder of its own, without the cost of flushing each."""
    import torch
    from safetensors.torch import save_file

    target.mkdir(parents=True)
    shutil.copy(pattern / "adapter_config.json", target)
    tensors = {
        f"base_model.model.{part.target}.lora_{name}.weight": tensor
        if name == "A"
        else torch.full_like(tensor, float(seed))
        for part in make().parts
        for name, tensor in part.tensors.items()
    }
    save_file(tensors, target / "adapter_model.safetensors")


def _check(library: Library, team: list[Writer], items: int) -> None:
    facts = [fact for writer in team for fact in writer.done()]
    versions = {version.ref: version for version in library.list()}
    for ref, digest in [(fact[1], fact[2]) for fact in facts if fact[0] == "added"]:
        assert versions[ref].digest == digest, f"lost or changed: {ref}"
    assert len(versions) == len(team) * items, "an adapter was added twice, or is missing"
    assert {v.digest for v in versions.values()} == {library.load(v).digest for v in versions.values()}
    for name in {version.name for version in versions.values()}:
        numbers = sorted(v.version for v in versions.values() if v.name == name)
        assert numbers == list(range(1, len(numbers) + 1)), "a version number has a gap"
        moves = library.history(name, "production")
        assert [move.number for move in moves] == list(range(1, len(moves) + 1))
        told = {(int(fact[2]), fact[3]) for fact in facts if fact[0] == "moved" and fact[1] == name}
        assert told <= {(move.version, move.reason) for move in moves}, "a confirmed move is lost"
        assert library.resolve(name).version == moves[-1].version


def test_writers_killed_at_random(tmp_path: Path) -> None:
    _storm(tmp_path, writers=4, items=6, kills=10, seconds=60)


@pytest.mark.slow
def test_eight_writers_of_fifty_killed_at_random(tmp_path: Path) -> None:
    _storm(tmp_path, writers=8, items=50, kills=150, seconds=280)


def test_threads_share_a_library(tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    library.add(make(0), "tickets")
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(3):
                added = library.add(make(seed * 10 + step), "tickets").version
                library.alias(added.ref, "production")
                assert library.load(added).digest == added.digest
                library.list(), library.resolve("tickets"), library.revision()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(library.list()) == 13 and len(library.history("tickets")) == 12
    assert _sound(tmp_path / "library").resolve("tickets").version == library.history("tickets")[-1].version


def test_readers_see_before_or_after(tmp_path: Path) -> None:
    """While one process moves an alias between two versions, another never sees it missing or elsewhere."""
    root = tmp_path / "library"
    library = Library(root)
    library.add(make(0), "tickets")
    library.add(make(1), "tickets")
    library.alias("tickets@1", "production")
    library.close()

    def mover() -> None:
        own = Library(root)
        for step in range(60):
            own.alias(f"tickets@{2 - step % 2}", "production")
        os._exit(0)

    process = _run(mover)
    seen, revisions = set(), []
    while process.is_alive():
        seen.add(library.resolve("tickets@production").version)
        revisions.append(library.revision())
    process.join()
    assert process.exitcode == 0
    assert seen <= {1, 2} and revisions == sorted(revisions)
    assert len(library.history("tickets")) == 61


def test_gc_beside_adds_deletes_nothing_that_is_needed(tmp_path: Path) -> None:
    root = tmp_path / "library"
    Library(root).add(make(0), "first")

    def sweeper() -> None:
        own = Library(root)
        for _ in range(15):
            own.gc()
        os._exit(0)

    process = _run(sweeper)
    library = Library(root)
    seed = 1
    while process.is_alive() and seed < 25:
        version = library.add(make(seed), "tickets").version
        assert library.load(version).digest == version.digest
        seed += 1
    process.join(60)
    assert process.exitcode == 0
    assert _sound(root).verify().versions == seed
    assert all(name.startswith(("blobs", "manifests")) for name in files_under(root))


def test_a_library_may_be_carried_over_a_fork(tmp_path: Path) -> None:
    """SQLite's locks don't survive a fork with open connections: a writer on each side would lose the other's work."""
    library = Library(tmp_path / "library")
    library.add(make(0), "tickets")

    def child() -> None:
        for _ in range(12):
            library.record("tickets", {"child": float(library.show("tickets").metrics.get("child", 0.0)) + 1})
        os._exit(0)

    process = _run(child)
    for _ in range(6):
        library.record("tickets", {"parent": float(library.show("tickets").metrics.get("parent", 0.0)) + 1})
        library.close()
    process.join(60)
    assert process.exitcode == 0
    assert _sound(tmp_path / "library").show("tickets").metrics == {"child": 12.0, "parent": 6.0}


def test_a_reader_of_what_is_being_removed_gets_a_plain_answer(tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    version = library.add(make(), "tickets").version
    other = Library(tmp_path / "library")
    assert other.resolve("tickets") == version
    library.remove("tickets@1")
    library.gc()
    with pytest.raises(VeneerError, match="not in the library any more"):
        other.load(version)
