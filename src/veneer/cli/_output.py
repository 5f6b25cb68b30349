"""What verbs print with: one JSON document, or plain text and tables that survive a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

PIPE_WIDTH = 240


def say(text: str = "") -> None:
    """A line of the answer, on standard output."""
    sys.stdout.write(f"{text}\n")


def note(text: str) -> None:
    """A line about the work, on standard error: never part of the answer."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def say_json(value: Any) -> None:
    """The one JSON document of a `--json` run. Numbers that are not finite are an error: JSON has none."""
    say(json.dumps(value, indent=2, allow_nan=False))


def say_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table of strings. Columns whose cells are all numbers stand to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # In a pipe rich assumes 80 columns and would break lines that a program wants to read.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def _is_number(cell: str) -> bool:
    return cell == "" or cell.lstrip("+-~<>")[:1].isdigit()


def bytes_text(count: float) -> str:
    """A number of bytes in decimal units, three digits: 13.5 GB, 80.0 MB.

    >>> bytes_text(79_954_000), bytes_text(512)
    ('80.0 MB', '512 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size * 0.9995:
            value = count / size
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    return f"{count:.0f} B"


def count_text(count: float) -> str:
    """A number of things: 39.98 M, 6.738 B, 512.

    >>> count_text(39_976_960), count_text(512)
    ('39.98 M', '512')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f}"
