"""Loads happen beside steps and take nothing from them but a little time."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from veneer.engine.loader import TURN, Loader
from veneer.ops.threads import team


def test_a_load_multiplies_on_one_thread_and_others_keep_theirs() -> None:
    before, found = torch.get_num_threads(), []
    loader: Loader[int] = Loader()

    def load() -> int:
        torch.ones(1 << 20).add(1)  # the first operation is when a thread takes over the common number
        return torch.get_num_threads()

    for key in ("first", "second"):
        loader.start(key, load)
        loader.wait(10)
        (loaded,) = loader.finished()
        assert loaded.result == 1
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [before] and torch.get_num_threads() == before
    loader.close()


def test_a_load_has_a_core_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    usual = team()
    assert usual == 4
    loader: Loader[int] = Loader()
    begun, gate = threading.Event(), threading.Event()
    loader.start("a", lambda: (begun.set(), gate.wait(10), 1)[-1])
    assert begun.wait(10)
    assert team() == usual - 1, "the kernels of a step have one thread less"
    gate.set()
    loader.wait(10)
    assert team() == usual
    loader.finished()
    loader.start("b", lambda: 1 // 0)
    loader.wait(10)
    assert team() == usual, "also after a load that failed"
    loader.close()


def test_the_core_is_the_loaders_from_the_call_on_and_given_back_by_loads_that_never_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    loader: Loader[int] = Loader()
    begun, gate = threading.Event(), threading.Event()
    loader.start("a", lambda: (begun.set(), gate.wait(10), 1)[-1])
    assert team() == 3, "also before the worker has come to run"
    assert begun.wait(10)
    loader.start("b", lambda: 2)
    loader.start("c", lambda: 3)
    assert team() == 3, "one worker takes one core, however many wait for it"
    closing = threading.Thread(target=loader.close)
    closing.start()
    gate.set()
    closing.join(10)
    assert team() == 4
    with pytest.raises(RuntimeError):
        loader.start("d", lambda: 4)
    assert team() == 4, "nor for one that was refused"


def test_turns_are_short_only_while_something_loads() -> None:
    usual = sys.getswitchinterval()
    loader: Loader[float] = Loader()
    loader.start("a", sys.getswitchinterval)
    loader.wait(10)
    (loaded,) = loader.finished()
    assert loaded.result is not None and abs(loaded.result - TURN) < 1e-5
    assert sys.getswitchinterval() == usual
    loader.close()


def test_two_that_load_at_once_leave_the_turns_as_they_were() -> None:
    usual, first, second = sys.getswitchinterval(), Loader[None](), Loader[None]()
    gates = threading.Event(), threading.Event()
    begun = threading.Event()
    first.start("a", lambda: gates[0].wait(10) and None)
    second.start("b", lambda: (begun.set(), gates[1].wait(10), None)[-1])
    assert begun.wait(10)
    gates[0].set()
    first.wait(10)
    assert abs(sys.getswitchinterval() - TURN) < 1e-5, "the other still loads"
    gates[1].set()
    second.wait(10)
    assert sys.getswitchinterval() == usual
    first.close()
    second.close()
