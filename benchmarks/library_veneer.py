"""One merge of a checkpoint folder, in a process of its own: its seconds, and the memory it took beside what was there before.

    python benchmarks/library_veneer.py BASE ADAPTER OUT

Memory is anonymous: pages of the mapped base belong to the system's cache and go when they are wanted elsewhere.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from veneer.adapter import Adapter
from veneer.merge import merge


def anonymous_bytes() -> int:
    """What this process holds that is in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class Peak(threading.Thread):
    """Looks every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.highest = anonymous_bytes()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.highest = max(self.highest, anonymous_bytes())


def main() -> None:
    base, adapter, out = sys.argv[1:]
    loaded = Adapter.load(adapter)
    peak = Peak()
    peak.start()
    begin = time.perf_counter()
    report = merge(base, loaded, out)
    seconds = time.perf_counter() - begin
    peak.done.set()
    peak.join()
    extra = peak.highest - peak.before
    print(json.dumps({"seconds": seconds, "extra_bytes": extra, "tensors": len(report.tensors), "lost": report.lost}))


if __name__ == "__main__":
    main()
