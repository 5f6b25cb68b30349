"""Records from JSONL, JSON, CSV and Parquet files, each with the place it came from.

Everything wrong with a file is collected in `Problems` and raised once, so that one look at the message is enough to repair
the file. What can't be read at all (missing, empty, binary, compressed) is raised at once.

The surprise: names lie. A `.json` file often holds one object a line, and a `.jsonl` file one long list; both are read.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from veneer.data.formats import convert
from veneer.data.records import (
    DECODER,
    HALF_WRITTEN,
    MAX_ROW_BYTES,
    SPLIT_HELP,
    UTF8_HELP,
    Problems,
    Record,
    json_type,
    not_utf8,
    reason,
    syntax,
    too_long,
    whole_text,
)
from veneer.data.rows import Rows
from veneer.data.tables import read_csv, read_parquet
from veneer.errors import DataError, NotFound

MAGIC = {
    b"\x1f\x8b": "gzip-compressed; decompress it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; decompress it first (unzstd)",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\xff\xfe": "UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"PAR1": "Parquet; name it .parquet",
    b"GGUF": "a model, not data",
}


def load(path: str | Path, format: str = "auto") -> Rows:
    """The rows of a data file. `format` is "auto" or one of formats.FORMATS.

    Raises one DataError with everything that is wrong, each with file and line; NotFound where there is no file.
    """
    path = Path(path)
    problems = Problems(str(path))
    records, digest = read(path, problems)
    found, rows, ignored = convert(records, format, problems)
    problems.raise_any()
    return Rows(str(path), problems.unit, found, tuple(rows), digest, ignored)


def from_records(records: Sequence[Mapping[str, Any]], format: str = "auto", name: str = "rows") -> Rows:
    """Rows from plain objects, as a JSON file would hold them. `Row.line` counts them from 1."""
    problems = Problems(name, "row")
    if not records:
        raise DataError(f"{name}: there are no rows", help="at least one row is needed")
    kept = [found for i, value in enumerate(records, 1) for found in _object(value, i, problems)]
    found, rows, ignored = convert(kept, format, problems)
    problems.raise_any()
    digest = hashlib.sha256(json.dumps([record.value for record in kept], sort_keys=True).encode()).hexdigest()
    return Rows(name, problems.unit, found, tuple(rows), digest, ignored)


def read(path: Path, problems: Problems) -> tuple[list[Record], str]:
    """All records of a file and the SHA-256 of its bytes. Problems of single rows go to `problems`."""
    with _opened(path) as file:
        reader = _check(file, path, READERS.get(path.suffix.lower()))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        records = list(reader(file, problems))
    if not records and not problems.count:
        raise DataError(f"{path} has no rows", help="a data file needs at least one row")
    return records, digest


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes: the data hash that provenance and caches use."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        _raise_missing(path)
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, expected a file", help="name one file in it") from None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}", help="check its permissions") from error


Reader = Callable[[BufferedReader, Problems], Iterator[Record]]


RELATIVE = "paths on the command line are relative to where it runs, those in a run file to that file"


def _raise_missing(path: Path) -> NoReturn:
    beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    if near:
        hint = f"did you mean {path.parent / near[0]}?"
    elif not path.parent.is_dir():
        hint = f"the folder {path.parent} does not exist either; {RELATIVE}"
    else:
        hint = RELATIVE
    raise NotFound(f"no data file at {path}", help=hint) from None


def _check(file: BufferedReader, path: Path, reader: Reader | None) -> Reader:
    """Refuse what is empty, compressed or binary, and choose a reader where the name does not say."""
    head = file.read(4096)
    file.seek(0)
    if not head:
        raise DataError(f"{path} is empty (0 bytes)", help="a data file needs at least one row")
    if reader is read_parquet:
        if not head.startswith(b"PAR1"):
            raise DataError(f"{path} is not a Parquet file", help="name it after what it holds: .jsonl, .json or .csv")
        return reader
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            kind, _, fix = what.partition("; ")
            raise DataError(f"{path} is {kind}, not text", help=fix or None)
    if b"\x00" in head:
        raise DataError(f"{path} is binary, not text", help=f"expected one of {', '.join(READERS)}")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if reader is None:
        if start not in (b"{", b"["):
            raise DataError(
                f"{path}: can't tell the format from the name '{path.suffix}'", help=f"known: {', '.join(READERS)}"
            )
        reader = _json_lines
    return _json_list if reader in (_json_lines, _json_object) and start == b"[" else reader


def _object(value: Any, line: int, problems: Problems) -> Iterator[Record]:
    """A parsed value as a record, if it is an object of proper text."""
    if not isinstance(value, dict):
        problems.add(line, f'a {json_type(value)}, expected an object such as {{"messages": [...]}}')
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        problems.add(line, "half of a surrogate pair (\\ud800-\\udfff) in a text, which is no character")
        return
    except TypeError as error:
        problems.add(line, f"a value that JSON can't hold: {error}")
        return
    yield Record(line, value)


def _lines(file: BufferedReader, problems: Problems) -> Iterator[tuple[int, str, bool]]:
    """(number, text, complete) of each line that is UTF-8 and of bearable size; the others become problems."""
    number = 0
    while raw := file.readline(MAX_ROW_BYTES):
        number += 1
        size = len(raw)
        while not raw.endswith(b"\n") and size >= MAX_ROW_BYTES and (raw := file.readline(MAX_ROW_BYTES)):
            size += len(raw)
        if size >= MAX_ROW_BYTES:
            problems.add(number, too_long(size), help=SPLIT_HELP)
            continue
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8"), raw.endswith(b"\n")
        except UnicodeDecodeError as error:
            problems.add(number, not_utf8(error.object[error.start], error.start + 1), help=UTF8_HELP)


def _json_lines(file: BufferedReader, problems: Problems) -> Iterator[Record]:
    for number, text, complete in _lines(file, problems):
        if not text.strip():
            continue
        try:
            value = DECODER.decode(text)
        except json.JSONDecodeError as error:
            if complete:
                problems.add(number, f"not JSON: {syntax(error)}")
            else:
                what = f"the file ends inside this row: {syntax(error)}"
                problems.add(number, what, help=HALF_WRITTEN)
        except (ValueError, RecursionError) as error:
            problems.add(number, reason(error))
        else:
            yield from _object(value, number, problems)


def _json_object(file: BufferedReader, problems: Problems) -> Iterator[Record]:
    """A `.json` file that does not start with '[': lines of JSON after all, or one object that hides the list."""
    first = file.readline(MAX_ROW_BYTES)
    file.seek(0)
    try:
        DECODER.decode(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        problems.add(
            1,
            "expected a list of rows ([{...}, {...}]) or one object a line",
            help="if the rows are under a key, keep only the list (jq '.data' file.json); else write JSON lines",
        )
    else:
        yield from _json_lines(file, problems)


def _json_list(file: BufferedReader, problems: Problems) -> Iterator[Record]:
    """The elements of one top-level list, each with the line where it starts."""
    text = whole_text(file, problems)
    if problems.count:
        return
    at, line, counted = _skip(text, text.index("[") + 1), 1, 0
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        element = _element(text, at, line, problems)
        if element is None:
            return
        value, end = element
        if end - at > MAX_ROW_BYTES:
            problems.add(line, too_long(end - at), help=SPLIT_HELP)
        else:
            yield from _object(value, line, problems)
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] not in ("]", ""):
            problems.add(text.count("\n", 0, at) + 1, "expected ',' or ']' after a row")
            return
    _check_end(text, at, problems)


def _element(text: str, at: int, line: int, problems: Problems) -> tuple[Any, int] | None:
    """The JSON value at `at` and where it ends. After a broken one nothing can be trusted: None."""
    try:
        return DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated")
        what = "the file ends inside this row" if cut else "not JSON"
        fix = HALF_WRITTEN if cut else None
        problems.add(error.lineno, f"{what}: {syntax(error)}", help=fix)
    except (ValueError, RecursionError) as error:
        problems.add(line, reason(error))
    return None


def _check_end(text: str, at: int, problems: Problems) -> None:
    last = text.count("\n", 0, at) + 1
    if at >= len(text):
        problems.add(last, "the list has no closing ']'", help=HALF_WRITTEN)
    elif text[at + 1 :].strip():
        problems.add(last, "something follows the closing ']'")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_object,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
}
