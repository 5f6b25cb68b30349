"""Intervals against theory, and text scores against their definitions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.evaluate import bootstrap, text
from veneer.evaluate.bootstrap import Interval, Measure, change, interval, ratio


def normal(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=rows)


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    x = normal(400)
    found = interval(ratio(x), 0, 4000)
    half = 1.96 * x.std() / 20
    assert found.value == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_intervals_hold_the_truth_nineteen_times_in_twenty() -> None:
    intervals = [interval(ratio(normal(60, seed)), seed, 300) for seed in range(200)]
    assert 0.90 <= np.mean([found.low <= 0 <= found.high for found in intervals]) <= 0.98


def test_a_ratio_is_resampled_as_a_ratio() -> None:
    weights = np.array([1.0, 100.0, 1.0, 100.0])
    found = interval(ratio(weights * 2.0, weights), 0, 200)
    assert found == Interval(2.0, 2.0, 2.0), "two nats a token, however the tokens are spread over rows"


def test_pairing_cancels_what_both_sides_find_hard() -> None:
    hard = 10 * normal(200)
    base, better = ratio(hard), ratio(hard - 0.1 + 0.01 * normal(200, 1))
    paired = change(better, base, 0, 1000)
    assert paired.value == pytest.approx(-0.1, abs=0.01) and paired.high < 0
    assert paired.high - paired.low < 0.01 * (interval(base, 0, 1000).high - interval(base, 0, 1000).low)
    assert change(base, base, 0, 100) == Interval(0.0, 0.0, 0.0)
    mirrored = change(base, better, 0, 1000)
    assert (mirrored.low, mirrored.high) == pytest.approx((-paired.high, -paired.low))


def test_the_same_seed_draws_the_same_whatever_fits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = ratio(normal(50))
    whole = interval(x, 3, 500)
    monkeypatch.setattr(bootstrap, "CHUNK", 700)
    assert interval(x, 3, 500) == whole != interval(x, 4, 500)


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("a cat", "the cat", 1.0),
        ("The cat sat.", "a cat ran", 0.5),
        ("", "x", 0.0),
        ("", "the", 1.0),
        ("x x", "x", 2 / 3),
    ],
)
def test_word_f1(answer: str, right: str, score: float) -> None:
    assert text.word_f1(answer, right) == pytest.approx(score)


def defined_chrf(pairs: list[tuple[str, str]]) -> float:
    """chrF as its paper writes it, over a corpus, orders without n-grams on either side left out."""
    precisions, recalls = [], []
    for n in range(1, 7):
        said = [
            Counter(a.replace(" ", "")[i : i + n] for i in range(len(a.replace(" ", "")) - n + 1)) for a, _ in pairs
        ]
        wanted = [
            Counter(b.replace(" ", "")[i : i + n] for i in range(len(b.replace(" ", "")) - n + 1)) for _, b in pairs
        ]
        common = sum(min(count, b[gram]) for a, b in zip(said, wanted, strict=True) for gram, count in a.items())
        total_said, total_wanted = (sum(sum(c.values()) for c in side) for side in (said, wanted))
        if total_said and total_wanted:
            precisions.append(common / total_said)
            recalls.append(common / total_wanted)
    if not precisions or not sum(precisions):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * 5 * p * r / (4 * p + r)


WORDS = st.text(alphabet="ab c", max_size=9)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_chrf_is_its_definition(pairs: list[tuple[str, str]]) -> None:
    sums = np.stack([text.ngram_sums(answer, right) for answer, right in pairs])
    assert Measure(sums, text.chrf).value == pytest.approx(defined_chrf(pairs))


def test_several_right_answers() -> None:
    found = text.measures([" ls -a\n", "ls", "nonsense"], [("ls", "ls -a"), ("ls",), ("du", "df")])
    assert found["exact"].value == pytest.approx(2 / 3)
    assert found["f1"].value == pytest.approx(2 / 3)
    perfect = text.measures(["abc def"], [("abc def",)])
    assert perfect["chrf"].value == pytest.approx(100) and perfect["exact"].value == 1
