"""How much memory is left, as the kernel and a container's limit see it."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes that can still be taken without swapping: the machine's, or the container's where that is less."""
    free = int(psutil.virtual_memory().available)
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        return min(free, max(0, int(text) - int(used.read_text()) + _reclaimable()))
    return free


def _reclaimable() -> int:
    """File pages that a container counts as used and that the kernel can drop at any time."""
    stat = CGROUP / "memory.stat"
    lines = stat.read_text().splitlines() if stat.is_file() else []
    values = dict(line.split() for line in lines if len(line.split()) == 2)
    return int(values.get("inactive_file", 0)) + int(values.get("active_file", 0))
