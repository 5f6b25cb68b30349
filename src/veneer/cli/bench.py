"""Run the project's benchmarks: ratios against other tools and against the machine, in one run.

    veneer bench train

The scripts live in a checkout of the project (`benchmarks/`), with the results that were committed; an installed package has
none. The first run makes an environment for the other tools.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli._options import Json
from veneer.cli._output import say_json, say_table
from veneer.errors import NotFound
from veneer.registry import did_you_mean

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


def command(
    name: Annotated[str | None, typer.Argument(help="Which one; without a name, the list.")] = None,
    as_json: Json = False,
) -> None:
    known = _benchmarks()
    if name is None:
        if as_json:
            say_json(known)
        else:
            say_table(("benchmark", "measures"), list(known.items()))
        return
    if name not in known:
        raise NotFound(f"no benchmark is called '{name}'", help=did_you_mean(name, list(known)))
    done = subprocess.run([sys.executable, str(FOLDER / "run.py"), name], check=False)
    results = FOLDER / "results" / f"{name}.json"
    if done.returncode == 0 and as_json and results.is_file():
        sys.stdout.write(results.read_text())
    raise typer.Exit(min(done.returncode, 1))


def _benchmarks() -> dict[str, str]:
    """Name -> the first line of its script."""
    if not (FOLDER / "run.py").is_file():
        raise NotFound(
            f"there are no benchmarks at {FOLDER}",
            help="run this from a checkout of the project, where `make setup` was run",
        )
    scripts = (p for p in sorted(FOLDER.glob("*.py")) if p.stem not in ("run", "train_veneer"))
    return {p.stem: p.read_text().splitlines()[0].strip('"') for p in scripts}
