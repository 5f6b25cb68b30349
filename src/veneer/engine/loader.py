"""Adapters are read, checked and packed on a worker thread, so that no stream waits for a disk.

The engine asks for results between steps. The worker gives way: it runs torch on one thread and, where the system
allows, at low priority. The kernels of decoding leave it a core meanwhile (`ops/threads.py`).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from veneer.errors import VeneerError
from veneer.ops.threads import own_core

T = TypeVar("T")
log = logging.getLogger(__name__)

TURN = 0.0002
"""Seconds after which a load gives the interpreter to a step that wants it; Python's own 5 ms are half a step."""


@dataclass(frozen=True, eq=False)
class Loaded(Generic[T]):
    """The end of one load: `result`, or the `error` that people should see."""

    key: str
    seconds: float
    result: T | None
    error: str = ""


class Loader(Generic[T]):
    """Loads in the background, one after the other."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="veneer-load", initializer=_give_way, initargs=(threads,))
        self._running: dict[str, Future[tuple[T, float]]] = {}
        # Held from `start` on: a step asks for its threads at its begin, and one with all cores would keep the load standing.
        self._core = _Shared(own_core)

    def __len__(self) -> int:
        return len(self._running)

    def start(self, key: str, load: Callable[[], T], then: Callable[[], None] | None = None) -> None:
        """Begin to load `key`; `then` is called on the worker when it is over, whatever the end."""
        assert key not in self._running
        self._core.begin()
        try:
            future = self._pool.submit(self._timed, load)
        except RuntimeError:  # it is closed
            self._core.end()
            raise
        self._running[key] = future
        future.add_done_callback(lambda ended: self._core.end() if ended.cancelled() else None)
        if then is not None:
            future.add_done_callback(lambda _: then())

    def finished(self) -> list[Loaded[T]]:
        """Loads that have ended since the last call."""
        ended = [key for key, future in self._running.items() if future.done()]
        return [self._result(key, self._running.pop(key)) for key in ended]

    def wait(self, timeout: float | None = None) -> None:
        """Until some load ends."""
        wait(list(self._running.values()), timeout=timeout, return_when="FIRST_COMPLETED")

    def close(self) -> None:
        """Drop what has not begun and wait for the rest."""
        self._pool.shutdown(cancel_futures=True)

    def _timed(self, load: Callable[[], T]) -> tuple[T, float]:
        start = time.perf_counter()
        _turns.begin()
        try:
            result = load()
        finally:
            _turns.end()
            self._core.end()
        return result, time.perf_counter() - start

    def _result(self, key: str, future: Future[tuple[T, float]]) -> Loaded[T]:
        error = future.exception()
        if error is None:
            result, seconds = future.result()
            return Loaded(key, seconds, result)
        if isinstance(error, VeneerError | OSError):
            return Loaded(key, 0.0, None, str(error))
        log.error("loading adapter %s failed", key[:12], exc_info=error)
        return Loaded(key, 0.0, None, f"it can't be read: {type(error).__name__}: {error}")


class _Shared:
    """A context that several loads share: entered with the first of them, left with the last."""

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._context, self._held = context, ExitStack()
        self._lock, self._loads = threading.Lock(), 0

    def begin(self) -> None:
        with self._lock:
            if self._loads == 0:
                self._held.enter_context(self._context())
            self._loads += 1

    def end(self) -> None:
        with self._lock:
            self._loads -= 1
            if self._loads == 0:
                self._held.close()


@contextmanager
def _short_turns() -> Iterator[None]:
    """Threads take short turns: a load is Python, and so is what is between kernels."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


_turns = _Shared(_short_turns)
"""One for the process: the interval is."""


def _give_way(threads: int) -> None:
    """One torch thread here.

    Torch would give the same to every thread that starts later, so the number is put back for those. A thread takes that number
    over when it is first asked, so it is asked before: with two threads here OpenMP would have more threads than two processors,
    and then it lets them sleep at every barrier of a step, which makes it a third slower.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)
    others = threading.Thread(target=torch.set_num_threads, args=(threads,))
    others.start()
    others.join()
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)
