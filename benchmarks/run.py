"""Every benchmark, one after the other: `make bench`. Rivals live in an environment of their own, made on first use.

    python benchmarks/run.py [NAME ...] [-- ARGUMENTS OF THAT SCRIPT]

Nothing else may run meanwhile: on a shared machine the ratios hold better than the figures, but neither holds well.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers"
NAMES = sorted(p.stem for p in HERE.glob("[!_]*.py") if p.stem != "run" and not p.stem.endswith("_veneer"))


def make_peers() -> None:
    """`.venv-peers` with the pinned rivals; torch first, so that nothing pulls in another build."""
    stamp = PEERS / ".installed"
    pins = HERE / "peers" / "constraints.txt"
    if stamp.exists() and stamp.stat().st_mtime >= pins.stat().st_mtime:
        return
    print(f"making {PEERS.name} (a few minutes)", file=sys.stderr)
    venv.create(PEERS, with_pip=True)
    pip = [str(PEERS / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    torch_pin = next(line for line in pins.read_text().splitlines() if line.startswith("torch=="))
    subprocess.run([*pip, torch_pin], check=True)
    subprocess.run([*pip, "-r", str(pins)], check=True)
    stamp.touch()


def main() -> None:
    ours, extra = sys.argv[1:], []
    if "--" in ours:
        ours, extra = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all where none is given")
    names = parser.parse_args(ours).names or NAMES
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if extra and len(names) != 1:
        parser.error("arguments after -- are for one benchmark: name it")
    make_peers()
    for name in names:
        print(f"== {name}", file=sys.stderr)
        subprocess.run([sys.executable, str(HERE / f"{name}.py"), *extra], check=True)


if __name__ == "__main__":
    main()
