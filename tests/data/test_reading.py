"""Files as users have them, good and bad. Every refusal says which file and line, what was found, and the next step."""

from __future__ import annotations

import builtins
import json
import time
from pathlib import Path
from typing import Any

import pytest

from veneer import data
from veneer.errors import DataError, NotFound, Unsupported, VeneerError

GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "日本"}]}
LINE = json.dumps(GOOD, ensure_ascii=False)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, format: str = "auto") -> VeneerError:
    with pytest.raises(VeneerError) as caught:
        data.load(path, format)
    assert str(path.name) in caught.value.message, "the file is named"
    return caught.value


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f"{LINE}\n{LINE}\n"),
        ("a.ndjson", f"{LINE}\n\n{LINE}"),
        ("a.jsonl", f"\ufeff{LINE}\r\n{LINE}\r\n"),
        ("a.jsonl", f"[{LINE},\n{LINE}]"),
        ("a.json", f"{LINE}\n{LINE}\n"),
        ("a.json", json.dumps([GOOD, GOOD], indent=2)),
        ("a.json", f"\ufeff \n[\r\n{LINE},{LINE} ]\n"),
        ("data", f"{LINE}\n{LINE}"),
    ],
)
def test_json_in_all_its_shapes(tmp_path: Path, name: str, content: str) -> None:
    rows = data.load(write(tmp_path, name, content))
    assert rows.format == "messages" and len(rows) == 2
    assert rows[1].messages[1]["content"] == "日本"  # type: ignore[union-attr]
    assert rows.sha256 == data.file_digest(tmp_path / name)


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    lines = [row.line for row in data.load(write(tmp_path, "a.jsonl", f"\n{LINE}\n\n{LINE}"))]
    assert lines == [2, 4]
    lines = [row.line for row in data.load(write(tmp_path, "b.json", f"[\n{LINE},\n\n{LINE}]"))]
    assert lines == [2, 4]


def test_csv_with_quotes_line_breaks_and_json_cells(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", '\ufeffprompt,completion,id\r\n"a, b",c,1\r\n"two\r\nlines","say ""x""",2\r\n')
    rows = data.load(path)
    assert [(row.line, row.prompt, row.completion) for row in rows] == [
        (2, "a, b", "c"),
        (3, "two\r\nlines", 'say "x"'),
    ]  # type: ignore[union-attr]
    assert rows.ignored == ("id",)
    cell = json.dumps(GOOD["messages"]).replace('"', '""')
    assert data.load(write(tmp_path, "m.csv", f'messages\n"{cell}"\n')).format == "messages"
    assert data.load(write(tmp_path, "s.csv", "prompt;completion\na;b\n")).format == "prompt/completion"
    assert data.load(write(tmp_path, "t.tsv", "text\tid\na, b\t1\n"))[0].completion == "a, b"  # type: ignore[union-attr]
    assert data.load(write(tmp_path, "u.tsv", "prompt\tcompletion\ta,b,c\nd\te\t1\n")).ignored == ("a,b,c",)
    accepted = data.load(write(tmp_path, "n.csv", f'messages,accepted\n"{cell}","[""b"",""c""]"\n'))[0]
    assert accepted.accepted == ("b", "c")  # type: ignore[union-attr]


def test_parquet_gives_rows_and_drops_the_nulls_it_adds(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    weighted = {"messages": [*GOOD["messages"], {"role": "assistant", "content": "x", "weight": 0.5}]}
    parquet.write_table(pyarrow.Table.from_pylist([GOOD, weighted]), tmp_path / "a.parquet")
    rows = data.load(tmp_path / "a.parquet")
    assert rows.unit == "row" and rows[1].weights == (None, None, 0.5)  # type: ignore[union-attr]
    assert "weight" not in rows[0].messages[0]  # type: ignore[union-attr]
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"]}), tmp_path / "b.parquet")
    assert "b.parquet, row 1: found the keys prompt (and 1 more" in refusal(tmp_path / "b.parquet").message
    texts = {"messages": [json.dumps(GOOD["messages"])], "accepted": ['["b"]']}
    parquet.write_table(pyarrow.table(texts), tmp_path / "texts.parquet")
    assert data.load(tmp_path / "texts.parquet")[0].messages == rows[0].messages  # type: ignore[union-attr]
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    assert "null.parquet, row 2: 'text' is null" in refusal(tmp_path / "null.parquet").message
    optional = {"instruction": ["a"], "output": ["b"], "input": [None], "history": [None], "tools": [None]}
    parquet.write_table(pyarrow.table(optional), tmp_path / "optional.parquet")
    assert len(data.load(tmp_path / "optional.parquet")[0].messages) == 2  # type: ignore[union-attr]
    whole = (tmp_path / "a.parquet").read_bytes()
    assert "half-written" in str(refusal(write(tmp_path, "c.parquet", whole[: len(whole) // 2])).help)
    assert "not a Parquet file" in refusal(write(tmp_path, "d.parquet", LINE)).message
    assert "Parquet" in refusal(write(tmp_path, "e.jsonl", whole)).message


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Unsupported, match="pyarrow") as caught:
        data.load(write(tmp_path, "a.parquet", b"PAR1...PAR1"))
    assert "veneer[parquet]" in str(caught.value.help)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", LINE)
    error = refusal(tmp_path / "trian.jsonl")
    assert isinstance(error, NotFound) and "train.jsonl?" in str(error.help)
    assert "folder" in str(refusal(tmp_path / "no" / "a.jsonl").help)
    assert "folder" in refusal(tmp_path).message
    with pytest.raises(NotFound):
        data.file_digest(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"\n \n", "no rows"),
        (b"[]", "no rows"),
        (b"\x7fELF\x00\x01", "binary"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PK\x03\x04", "zip"),
        (LINE.encode("utf-16"), "UTF-16"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"GGUF\x03", "a model"),
    ],
)
def test_files_that_hold_no_rows(tmp_path: Path, content: bytes, word: str) -> None:
    assert word in refusal(write(tmp_path, "a.jsonl", content)).message


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    assert ".parquet" in str(refusal(write(tmp_path, "a.xlsx", "hello")).help)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", f"{LINE}\n{LINE[:-9]}", 2),
        ("a.json", f"[\n{LINE},\n{LINE[:-9]}", 3),
        ("a.json", f"[\n{LINE}", 2),
        ("a.json", f"[\n{LINE},\n", 3),
    ],
)
def test_half_written_files(tmp_path: Path, name: str, content: str, line: int) -> None:
    error = refusal(write(tmp_path, name, content))
    assert f"{name}:{line}:" in error.message and "half-written" in str(error.help)


def test_an_unclosed_quote_in_csv(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, "a.csv", 'text\nfine\n"never closed\nmore\n'))
    assert "a.csv:3: not CSV" in error.message and "quote" in str(error.help)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"text": "a" "b"}', "not JSON"),
        ('{"text": "a", "text": "b"}', "'text' stands twice"),
        ('{"text": NaN}', "NaN is not JSON"),
        ('["a"]', "a list, expected an object"),
        ('"a"', "a text, expected an object"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "limit"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, line: str, word: str) -> None:
    for name, content in (("a.jsonl", f"{LINE}\n{line}\n"), ("a.json", f"[{LINE},\n{line}\n]")):
        if name == "a.json" and line.startswith("["):
            continue
        error = refusal(write(tmp_path, name, content))
        assert f"{name}:2: " in error.message and word in error.message


def test_bytes_that_are_not_utf8_are_placed(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, "a.jsonl", LINE.encode() + b'\n{"text": "\xff"}\n'))
    assert "a.jsonl:2: byte 0xff at column 11 is not UTF-8" in error.message and "iconv" in str(error.help)
    assert "a.csv:2: byte 0xff at column 2" in refusal(write(tmp_path, "a.csv", b"text\nx\xff\n")).message


def test_a_row_of_ten_megabytes_is_refused_fast(tmp_path: Path) -> None:
    huge = json.dumps({"text": "word " * 2_000_000})
    started = time.monotonic()
    error = refusal(write(tmp_path, "a.jsonl", f"{huge}\n{LINE}\n{huge}"))
    assert (
        "a.jsonl:1: 10.0 MB" in error.message and "a.jsonl:3: 10.0 MB" in error.message and "split" in str(error.help)
    )
    assert "10.0 MB" in refusal(write(tmp_path, "a.json", f"[{huge}]")).message
    assert time.monotonic() - started < 20, "read once, not once for each buffer"


def test_a_json_object_that_hides_its_rows(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, "a.json", json.dumps({"data": [GOOD]}, indent=1)))
    assert "list of rows" in error.message and "jq" in str(error.help)


@pytest.mark.parametrize("content", [f"[{LINE} {LINE}]", f"[{LINE}]\n{LINE}"])
def test_broken_lists(tmp_path: Path, content: str) -> None:
    assert "a.json:" in refusal(write(tmp_path, "a.json", content)).message


def test_csv_cells_and_columns_that_do_not_match(tmp_path: Path) -> None:
    assert "a.csv:3: 2 cells, but the header has 1" in refusal(write(tmp_path, "a.csv", "text\na\nb,c\n")).message
    assert "stands twice" in refusal(write(tmp_path, "b.csv", "text,text\na,b\n")).message
    assert "'messages' is text" in refusal(write(tmp_path, "c.csv", "messages\n[{'role': 'user'}]\n")).message


def test_all_problems_come_at_once_and_long_lists_are_cut(tmp_path: Path) -> None:
    content = "\n".join(['{"text": 1}', LINE, '{"text": "fine"}', "{", '{"text": null}'] * 10)
    error = refusal(write(tmp_path, "a.jsonl", content), "text")
    assert "a.jsonl has 31 problems" in error.message and error.message.count("\n") == 4
    assert "a.jsonl:4: not JSON" in error.message
    assert "(and at 9 more: 6, 11, 16, 21, 26, 31, 36, 41, 46)" in error.message
    many = refusal(write(tmp_path, "b.jsonl", "{\n" * 5000))
    assert "5000 problems" in many.message and "(and at 999 more: 2, 3, 4, " in many.message
    assert "and 4000 more" in many.message
    different = "".join('{"text": ' + " " * n + "x}\n" for n in range(40))
    assert "and 20 more" in refusal(write(tmp_path, "c.jsonl", different)).message


def test_rows_from_python_objects() -> None:
    rows = data.from_records([GOOD])
    assert rows.unit == "row" and rows.sha256 == data.from_records([GOOD]).sha256
    with pytest.raises(DataError, match="mine, row 2: "):
        data.from_records([GOOD, {"x": 1}], name="mine")
    with pytest.raises(DataError, match="no rows"):
        data.from_records([])
    with pytest.raises(DataError, match="row 1: a value that JSON can't hold"):
        data.from_records([{"text": b"bytes"}])


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.jsonl", LINE)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in refusal(path).message
