"""Length policies, rows without labels, and the cache of encoded data."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.fake_tokenizer import PLAIN, FakeTokenizer
from veneer import data
from veneer.data import cache
from veneer.errors import ConfigError, DataError

TOKENIZER = FakeTokenizer()


def talk(answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer, **more}]}


def pairs(*lengths: int) -> data.Rows:
    """Prompt of two tokens, completion of so many, and the end."""
    return data.from_records([{"prompt": "ab", "completion": "x" * n} for n in lengths])


def test_rows_are_stored_end_to_end() -> None:
    dataset = data.encode(pairs(1, 3), TOKENIZER, max_length=10)
    assert dataset.lengths.tolist() == [4, 6] and dataset.tokens.dtype == np.int32
    tokens, weights = dataset.row(1)
    assert TOKENIZER.decode(tokens.tolist()) == "abxxx<|im_end|>" and weights.tolist() == [0, 0, 1, 1, 1, 1]
    assert dataset.take([1, 0]).lengths.tolist() == [6, 4] and dataset.take([1]).lines.tolist() == [2]


def test_too_long_is_an_error_that_names_every_row() -> None:
    with pytest.raises(DataError) as caught:
        data.encode(pairs(1, 30, 2, 40), TOKENIZER, max_length=10)
    assert "row 2: 33 tokens, but max_length is 10" in caught.value.message and "row 4: 43" in caught.value.message
    assert "truncate" in str(caught.value.help)


def test_truncate_cuts_the_end_and_counts() -> None:
    dataset = data.encode(pairs(1, 30, 7), TOKENIZER, max_length=10, on_too_long="truncate")
    assert dataset.lengths.tolist() == [4, 10, 10] and dataset.bytes.tolist() == [1, 8, 7]
    assert dataset.notes == {"truncated": 1, "tokens_lost": 23}


def test_labels_that_vanish_by_truncation_are_refused() -> None:
    rows = data.from_records([{"prompt": "p" * 20, "completion": "x"}, {"prompt": "p", "completion": "x"}])
    with pytest.raises(DataError, match="row 1: 22 tokens, and cutting to max_length 10 leaves nothing") as caught:
        data.encode(rows, TOKENIZER, max_length=10, on_too_long="truncate")
    assert "drop" in str(caught.value.help)


def test_drop_leaves_out_and_counts() -> None:
    dataset = data.encode(pairs(1, 30, 2), TOKENIZER, max_length=10, on_too_long="drop")
    assert dataset.lines.tolist() == [1, 3] and dataset.notes == {"dropped": 1, "tokens_lost": 33}
    with pytest.raises(DataError, match="every row is longer"):
        data.encode(pairs(30, 40), TOKENIZER, max_length=10, on_too_long="drop")


def test_rows_without_a_label_are_named() -> None:
    rows = data.from_records([talk("a"), talk("b", weight=0), {"messages": talk("c")["messages"]}])
    with pytest.raises(DataError, match="row 2: nothing in this row is learned"):
        data.encode(rows, TOKENIZER, max_length=100)
    silent = FakeTokenizer(None, eos=[])
    with pytest.raises(DataError, match="nothing in this row is learned"):
        data.encode(data.from_records([{"text": "a"}]), silent, max_length=10)


def test_problems_of_the_template_are_collected_with_their_lines() -> None:
    rows = data.from_records(
        [{"messages": talk("a")["messages"][1:]}, talk("b"), {"messages": talk("a")["messages"][1:]}]
    )
    with pytest.raises(DataError, match="has 2 problems") as caught:
        data.encode(rows, TOKENIZER, max_length=100)
    assert "row 3: messages[0] is from the assistant" in caught.value.message


def test_notes_are_counted() -> None:
    rows = data.from_records([talk(""), talk("a")])
    assert data.encode(rows, TOKENIZER, max_length=100).notes == {"empty_answers": 1}
    assert data.encode(rows, FakeTokenizer(PLAIN), max_length=100).notes["without_stop"] == 2


@pytest.mark.parametrize("wrong", [{"max_length": 1}, {"on_too_long": "cut"}, {"train_on": "asistant"}])
def test_unknown_choices(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        data.encode(pairs(1), TOKENIZER, **{"max_length": 10, **wrong})


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(talk(answer)) for answer in ("a", "bb", "ccc")))
    return path


def entries(root: Path) -> list[Path]:
    return sorted((root / "tokens").glob("*/*"))


def same(a: data.Dataset, b: data.Dataset) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in cache.ARRAYS) and a.notes == b.notes


def test_the_second_time_is_mapped_and_equal(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.prepare(file, TOKENIZER, max_length=100, cache=tmp_path)
    direct = data.encode(data.load(file), TOKENIZER, max_length=100)
    monkeypatch.setattr(cache, "encode", lambda *_, **__: pytest.fail("encoded again"))
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(file.read_bytes())
    second = data.prepare(copy, TOKENIZER, max_length=100, cache=tmp_path)
    assert same(first, second) and same(first, direct) and isinstance(second.tokens, np.memmap)
    assert second.name == str(copy) and second.sha256 == data.file_digest(file)


def test_everything_that_matters_is_in_the_key(file: Path, tmp_path: Path) -> None:
    def prepare(tokenizer: FakeTokenizer = TOKENIZER, **change: Any) -> None:
        data.prepare(file, tokenizer, **{"max_length": 100, "cache": tmp_path, **change})

    prepare()
    prepare()
    assert len(entries(tmp_path)) == 1
    prepare(max_length=90)
    prepare(on_too_long="drop")
    prepare(train_on="last")
    prepare(format="messages")
    prepare(FakeTokenizer(pieces=["us"]))
    prepare(FakeTokenizer(f"{TOKENIZER.template}{{# other #}}"))
    file.write_text(file.read_text() + "\n")
    prepare()
    assert len(entries(tmp_path)) == 8


@pytest.mark.parametrize("damage", ["cut", "missing", "nonsense", "meta"])
def test_a_damaged_entry_is_made_again(file: Path, tmp_path: Path, damage: str) -> None:
    data.prepare(file, TOKENIZER, max_length=100, cache=tmp_path)
    first = data.encode(data.load(file), TOKENIZER, max_length=100)
    entry = entries(tmp_path)[0]
    target = entry / ("meta.json" if damage == "meta" else "tokens.npy")
    if damage == "missing":
        target.unlink()
    else:
        target.write_bytes(target.read_bytes()[:-8] if damage == "cut" else b"{}")
    assert same(first, data.prepare(file, TOKENIZER, max_length=100, cache=tmp_path))
    assert len(entries(tmp_path)) == 1 and same(first, data.prepare(file, TOKENIZER, max_length=100, cache=tmp_path))


def test_a_full_disk_costs_the_cache_and_nothing_else(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    dataset = data.prepare(file, TOKENIZER, max_length=100, cache=tmp_path)
    assert len(dataset) == 3 and "No space left" in caplog.text
    assert not entries(tmp_path), "nothing half-written is left"


def test_problems_are_not_cached(file: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError):
            data.prepare(file, TOKENIZER, max_length=5, cache=tmp_path)
    assert not entries(tmp_path)


def _prepare(file: Path, root: Path) -> None:
    for max_length in range(60, 90):
        data.prepare(file, TOKENIZER, max_length=max_length, cache=root)


def test_two_processes_at_once(file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_prepare, args=(file, tmp_path)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0] and len(entries(tmp_path)) == 30
    assert not list((tmp_path / "tokens").glob("*/.making-*"))
