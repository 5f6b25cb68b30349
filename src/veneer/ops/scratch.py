"""One reused buffer for what is made, used at once and thrown away: dequantised weights.

A fresh tensor of tens of megabytes for each product costs as much as filling it, as the kernel must clear every page. A `Scratch`
is handed to whoever shares it; nothing in it outlives a `borrow`, and its contents never reach a result except through the
product they were made for.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # as in glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for the next step. True where the C library knows how (glibc).

    A training step allocates and frees the same gigabyte again and again. By default glibc gives the end of its heap back to the
    kernel, and maps what is larger than 32 MB anew each time; the kernel clears every page that is asked for. That took a third
    of a step with passes of 16,384 tokens on a 135M base. Call it once, early, in a process that trains.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


class Scratch:
    """A growing buffer that one borrower holds at a time; others wait."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self._bytes.numel()

    @contextmanager
    def borrow(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
        """A tensor with undefined contents, valid until the block ends."""
        needed = torch.Size(shape).numel() * dtype.itemsize
        with self._lock:
            if self._bytes.numel() < needed:
                self._bytes = torch.empty(needed, dtype=torch.uint8, device=self._bytes.device)
            yield self._bytes[:needed].view(dtype).view(shape)
