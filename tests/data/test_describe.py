"""What is said about a dataset before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.fake_tokenizer import FakeTokenizer
from veneer import data

TOKENIZER = FakeTokenizer()


def pairs(*texts: tuple[str, str], **options: Any) -> data.Dataset:
    rows = data.from_records([{"prompt": prompt, "completion": completion} for prompt, completion in texts])
    return data.encode(rows, TOKENIZER, **{"max_length": 1000, **options})


def test_counts_and_label_share() -> None:
    found = data.statistics(pairs(("abc", "x"), ("abcdefg", "yyyyyyyy")))
    assert (found.rows, found.tokens, found.labels) == (2, 5 + 16, 2 + 9)
    assert found.label_share == 11 / 21 and found.lengths["max"] == 16 and found.lengths["min"] == 5
    assert found.histogram == ((4, 8, 1), (8, 16, 0), (16, 32, 1))
    assert json.loads(json.dumps(found.as_dict()))["rows"] == 2


def test_the_first_token_of_a_text_is_not_counted_as_learned() -> None:
    dataset = data.encode(data.from_records([{"text": "abc"}]), TOKENIZER, max_length=10)
    assert data.statistics(dataset).labels == 3 == data.batch(dataset, [0]).num_labels


def test_repeats_are_grouped_by_line() -> None:
    found = data.statistics(pairs(("a", "x"), ("b", "x"), ("a", "x"), ("a", "x")))
    assert found.duplicates == ((1, 3, 4),)
    assert found.warnings() == ["2 rows repeat an earlier one (for instance lines 1, 3, 4)"]


def test_the_summary_shows_sizes_a_histogram_and_every_warning() -> None:
    dataset = pairs(("a" * 300, ""), ("a" * 300, "x" * 40), max_length=320, on_too_long="truncate")
    text = data.statistics(dataset).summary()
    assert "2 rows, 621 tokens, 21 of them learned (3.4%)" in text and "256-511" in text
    assert "! 1 rows were cut to max_length; 21 tokens lost" in text
    assert "! 1 rows with an empty answer" in text and "! only 3.4% of the tokens carry a loss" in text


def test_keys_that_are_not_used_are_named_also_from_the_cache(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b", "compeltion": "c"}\n{"prompt": "d", "completion": "e"}\n')
    for _ in range(2):
        dataset = data.prepare(file, TOKENIZER, max_length=10, cache=tmp_path / "cache")
        for found in (dataset, dataset.take([0])):
            assert "keys that the data's format has no use for: compeltion" in data.statistics(found).warnings()


def test_leaks_are_found_whole_and_by_prompt() -> None:
    train = pairs(("what", "a"), ("who", "b"), ("what", "a"))
    held_out = pairs(("new", "a"), ("what", "a"), ("who", "c"))
    found = data.leaks(train, held_out)
    assert found.rows == ((2, 1),) and found.prompts == ((3, 2),)
    assert len(found.warnings()) == 2 and "2 = 1" in found.warnings()[0]
    assert not data.leaks(train, pairs(("new", "z"))).warnings()


def test_texts_do_not_share_an_empty_prompt() -> None:
    texts = [data.encode(data.from_records([{"text": text}]), TOKENIZER, max_length=10) for text in ("a", "b")]
    assert data.leaks(*texts) == data.Leaks((), ())


def test_weights_do_not_hide_a_leak() -> None:
    train, held_out = pairs(("what", "a")), pairs(("what", "a"))
    held_out.weights[:] = np.where(held_out.weights > 0, 0.5, 0)
    assert data.leaks(train, held_out).rows == ((1, 1),)
