"""Several small pieces of work at a time, where one alone leaves cores idle."""

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
