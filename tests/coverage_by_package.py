"""Coverage of the fast tests by package, lines and branches together: `make coverage`. The foundation has to stay above the bar.

    python -m tests.coverage_by_package [.coverage]

Exit code 1 where a package of ranks 0 to 5 is below 90 %. Files that tests make for a moment (a method in one file) do not count.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from coverage import Coverage

from tests.test_architecture import PACKAGE, RANK

BAR, FOUNDATION = 90.0, range(0, 6)


def counts(data_file: str) -> tuple[Counter[str], Counter[str]]:
    """Package -> lines and branches in it, and how many of them ran."""
    measured = Coverage(data_file=data_file)
    measured.load()
    with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
        measured.json_report(outfile=report.name, include=[f"{PACKAGE}/*"])
        files = json.load(report)["files"]
    total: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    for name, found in files.items():
        package = Path(name).resolve().relative_to(PACKAGE).parts[0].removesuffix(".py")
        summary = found["summary"]
        total[package] += summary["num_statements"] + summary["num_branches"]
        ran[package] += summary["covered_lines"] + summary["covered_branches"]
    return total, ran


def main() -> int:
    total, ran = counts(sys.argv[1] if len(sys.argv) > 1 else ".coverage")
    low = []
    for package in sorted(total, key=lambda name: (RANK.get(name, 99), name)):
        rank, share = RANK.get(package, 99), 100 * ran[package] / max(1, total[package])
        if rank in FOUNDATION and share < BAR:
            low.append(package)
        print(f"{rank if rank < 99 else '-':>4}  {package:<12} {share:6.1f} %  of {total[package]}")
    foundation = [name for name in total if RANK.get(name, 99) in FOUNDATION]
    share = 100 * sum(ran[name] for name in foundation) / max(1, sum(total[name] for name in foundation))
    print(f"ranks 0 to 5: {share:.1f} %")
    if low or not foundation:
        print(f"below {BAR:.0f} %: {', '.join(low) or 'nothing was measured'}", file=sys.stderr)
    return 1 if low or not foundation else 0


if __name__ == "__main__":
    raise SystemExit(main())
