"""Steps, passes and batches: every row once, never above the budget, always the same for a seed and an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.fake_tokenizer import FakeTokenizer
from veneer import data
from veneer.data.packing import order
from veneer.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=60)
BUDGET = st.integers(1, 150)


def rows_of(lengths: list[int]) -> data.Dataset:
    """A dataset with rows of these lengths."""
    total = sum(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    weights = np.ones(total, np.float32)
    sizes = np.ones(len(lengths), np.int64)
    return data.Dataset("made", np.arange(total, dtype=np.int32), weights, offsets, np.arange(len(lengths)), sizes, "")


@given(LENGTHS, BUDGET, BUDGET, st.integers(0, 3))
def test_an_epoch_has_every_row_once_in_steps_and_passes_within_budget(
    lengths: list[int], per_step: int, per_pass: int, epoch: int
) -> None:
    dataset = rows_of(lengths)
    plan = data.plan_epoch(dataset, 7, epoch, per_step, per_pass)
    assert sorted(row for step in plan for rows in step for row in rows) == list(range(len(lengths)))
    for step in plan:
        assert sum(lengths[row] for rows in step for row in rows) <= per_step or sum(len(rows) for rows in step) == 1
        for rows in step:
            assert sum(lengths[row] for row in rows) <= per_pass or len(rows) == 1
    assert plan == data.plan_epoch(dataset, 7, epoch, per_step, per_pass)


@given(LENGTHS, BUDGET, st.integers(0, 2**70), st.integers(0, 5))
def test_a_step_takes_rows_until_the_next_would_exceed_it(
    lengths: list[int], per_step: int, seed: int, epoch: int
) -> None:
    plan = data.plan_epoch(rows_of(lengths), seed, epoch, per_step, 10**9)
    shuffled = order(len(lengths), seed, epoch)
    at = 0
    for step in plan:
        (rows,) = step
        expected = [shuffled[at]]
        while at + len(expected) < len(shuffled):
            if sum(lengths[row] for row in expected) + lengths[shuffled[at + len(expected)]] > per_step:
                break
            expected.append(shuffled[at + len(expected)])
        assert sorted(rows) == sorted(expected)
        at += len(expected)
    assert at == len(lengths)


def test_a_step_may_be_full_to_the_last_token() -> None:
    assert [len(rows) for step in data.plan_epoch(rows_of([5] * 6), 0, 0, 10, 100) for rows in step] == [2, 2, 2]


def test_how_rows_are_packed_does_not_change_which_share_a_step() -> None:
    dataset = rows_of([5, 9, 30, 2, 8, 8, 8, 14, 3])
    plans = [data.plan_epoch(dataset, 0, 1, 32, per_pass) for per_pass in (1, 8, 32, 1000)]
    steps = [[sorted(row for rows in step for row in rows) for step in plan] for plan in plans]
    assert all(step == steps[0] for step in steps)


def test_the_order_is_fixed_for_all_time() -> None:
    assert order(10, 0, 0) == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7] and order(6, 2, 3) == [0, 2, 4, 5, 1, 3]
    assert len({tuple(order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}) == 25


def test_best_fit_fills_passes() -> None:
    dataset = rows_of([6, 4, 6, 4, 5, 5])
    assert [sorted(dataset.lengths[rows].tolist()) for rows in data.pack(dataset, range(6), 10)] == [
        [4, 6],
        [4, 6],
        [5, 5],
    ]
    assert [len(rows) for rows in data.plan_rows(rows_of([50, 1, 1]), 10)] == [1, 2], "a longer row stands alone"
    with pytest.raises(ConfigError):
        data.plan_epoch(dataset, 0, 0, 0, 10)


def test_a_batch_lines_labels_up_with_the_positions_that_predict_them() -> None:
    records = [{"prompt": "ab", "completion": "xy"}, {"prompt": "c", "completion": "z"}]
    tokenizer = FakeTokenizer()
    dataset = data.encode(data.from_records(records), tokenizer, max_length=100)
    packed = data.batch(dataset, [1, 0], adapter=[3, -1])
    (end,) = tokenizer.eos_ids
    c, z, a, b, x, y = (tokenizer.encode(letter)[0] for letter in "czabxy")
    assert packed.tokens.tolist() == [c, z, a, b, x, y]
    assert packed.labels.tolist() == [z, end, -100, x, y, end]
    assert packed.weights.tolist() == [1, 1, 0, 1, 1, 1] and packed.labelled.tolist() == [0, 1, 3, 4, 5]
    assert [(s.length, s.sequence, s.adapter, s.start) for s in packed.segments] == [(2, 0, 3, 0), (4, 1, -1, 0)]
    assert packed.rows == (1, 0) and packed.num_tokens == 8 and packed.num_labels == 5
    assert [s.adapter for s in data.batch(dataset, [0, 1]).segments] == [0, 0]
    with pytest.raises(DataError):
        data.batch(dataset, [])


@given(LENGTHS, BUDGET)
def test_a_batch_loses_no_token(lengths: list[int], per_pass: int) -> None:
    dataset = rows_of(lengths)
    for rows in data.plan_rows(dataset, per_pass):
        packed = data.batch(dataset, rows)
        assert packed.num_tokens == sum(lengths[row] for row in rows) == len(packed.tokens) + len(rows)
        assert sum(segment.length for segment in packed.segments) == len(packed.tokens) == len(packed.labels)
        assert (packed.labels[:-1][packed.labels[:-1] == packed.tokens[1:]]).numel() >= len(packed.tokens) - len(rows)
