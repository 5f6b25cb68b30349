"""Who uses how many cores: several small pieces of work at a time, and work beside a stream of small parallel ones."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def side_by_side(most: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of up to `most` threads that share the cores among them: each multiplies with its share of torch's threads."""
    threads = torch.get_num_threads()
    workers = min(most, threads)
    try:
        with ThreadPoolExecutor(workers, initializer=_share, initargs=(threads // workers,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # the matrix library has one setting for all threads


def _share(threads: int) -> None:
    torch.get_num_threads()  # a thread takes over the common number when it is first asked: before it gets its own
    torch.set_num_threads(threads)


_beside: list[None] = []


@contextmanager
def own_core() -> Iterator[None]:
    """For work on one thread beside kernels that many threads share: `team` leaves it a core meanwhile.

    Such a kernel waits at every barrier for its slowest thread, so one that is pushed from its core stops them all. To do without
    the core costs less: memory is read hardly more slowly.
    """
    _beside.append(None)
    try:
        yield
    finally:
        _beside.pop()


def team() -> int:
    """Threads for a kernel that is bound by memory and gives the same bits with any number of them."""
    return max(1, torch.get_num_threads() - len(_beside))
