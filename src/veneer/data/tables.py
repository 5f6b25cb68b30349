"""Rows of CSV, TSV and Parquet tables.

CSV must quote strictly; a row with too many or too few cells is a problem of its own. Parquet needs the extra `parquet`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from veneer.data.records import DECODER, HALF_WRITTEN, JSON_COLUMNS, MAX_ROW_BYTES, Problems, Record, whole_text
from veneer.errors import DataError, Unsupported


def read_csv(file: BufferedReader, problems: Problems, delimiter: str = "") -> Iterator[Record]:
    """Rows of a table with a header. Cells of `messages`, `conversations`, `tools`, `history` and `accepted` hold JSON."""
    text = whole_text(file, problems)
    if problems.count:
        return
    first = text.split("\n", 1)[0]
    delimiter = delimiter or max(",;\t", key=first.count)
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        yield from _table(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), problems)
    finally:
        csv.field_size_limit(limit)


def _table(reader: Any, problems: Problems) -> Iterator[Record]:
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) != len(header):
                    problems.add(1, f"a column name stands twice: {', '.join(header)}")
                    return
            elif len(cells) == len(header):
                yield Record(start, {key: _cell(key, cell) for key, cell in zip(header, cells, strict=True)})
            elif cells:
                problems.add(
                    start,
                    f"{len(cells)} cells, but the header has {len(header)}",
                    help="put texts with commas or line breaks in double quotes",
                )
    except csv.Error as error:
        problems.add(line, f"not CSV: {error}", help="a quote that never closes swallows the rest of the file")


def _cell(key: str, cell: Any) -> Any:
    """The list that a text holds, in a column that is to hold lists."""
    if key not in JSON_COLUMNS or not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return cell
    try:
        return DECODER.decode(cell)
    except (ValueError, RecursionError):
        return cell


def read_parquet(file: BufferedReader, problems: Problems) -> Iterator[Record]:
    """Rows of a Parquet file; problems name the row, not a line."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise Unsupported(
            f"{problems.name}: reading Parquet needs pyarrow, which is not installed",
            help="pip install 'veneer[parquet]', or save the data as JSON lines",
        ) from None
    problems.unit = "row"
    try:
        rows = parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{problems.name} is damaged: {str(error).splitlines()[0]}",
            help=HALF_WRITTEN,
        ) from error
    for number, row in enumerate(rows, 1):
        yield Record(number, {key: _cell(key, _without_nulls(cell)) for key, cell in row.items()})


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct all the keys of its type: an absent `weight` comes back as null."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
