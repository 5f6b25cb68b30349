"""Root obeys the permission bits of files while this holds: where tests run as root, a read-only folder has to mean something."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words each of effective, permitted, inheritable
OVERRIDE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def obeying_permissions() -> Iterator[None]:
    """Without the right to ignore permissions, for this thread and those it starts; given back at the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0, ctypes.get_errno()
    before = data[0]
    data[0] &= ~OVERRIDE
    assert libc.capset(header, data) == 0, ctypes.get_errno()
    try:
        yield
    finally:
        data[0] = before
        assert libc.capset(header, data) == 0, ctypes.get_errno()
