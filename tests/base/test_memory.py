"""What is left of memory, in a container and outside."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from veneer.base import memory

GB = 2**30


@pytest.mark.parametrize(
    ("limit", "used", "stat", "expected"),
    [
        (None, None, None, "machine"),
        ("max", "5", None, "machine"),
        (str(4 * GB), str(3 * GB), None, 1 * GB),
        (str(4 * GB), str(3 * GB), f"anon 7\nactive_file {GB}\ninactive_file {GB}\n", 3 * GB),  # the kernel drops these
        (str(2 * GB), str(3 * GB), None, 0),
        (str(2**60), "0", None, "machine"),
    ],
)
def test_the_smaller_of_machine_and_container(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str | None,
    used: str | None,
    stat: str | None,
    expected: int | str,
) -> None:
    for name, text in (("memory.max", limit), ("memory.current", used), ("memory.stat", stat)):
        if text is not None:
            (tmp_path / name).write_text(f"{text}\n")
    available = psutil.virtual_memory()._replace(available=64 * GB)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    assert memory.available_bytes() == (64 * GB if expected == "machine" else expected)
