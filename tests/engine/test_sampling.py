"""Every sampling rule against its definition, and the promise of a seed."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.engine.request import Request, Sampling
from veneer.engine.sampling import Chooser, _drawn, choose_all
from veneer.errors import ConfigError

VOCAB = 40


def scores(seed: int, size: int = VOCAB, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def chosen(chooser: Chooser, logits: torch.Tensor) -> int:
    return choose_all(logits[None], [chooser], lambda token: str(token).encode())[0].token


def kept(sampling: Sampling, logits: torch.Tensor) -> set[int]:
    """The tokens that may be drawn, by the plain definition."""
    ordered = sorted(range(len(logits)), key=lambda i: -float(logits[i]))
    if sampling.top_k > 0:
        ordered = ordered[: sampling.top_k]
    weights = torch.softmax(logits[ordered].double() / sampling.temperature, 0)
    nucleus, reached = [], 0.0
    for token, weight in zip(ordered, weights.tolist(), strict=True):
        if reached >= sampling.top_p:
            break
        nucleus.append((token, weight))
        reached += weight
    most = max(w for _, w in nucleus)
    return {t for t, w in nucleus if w >= sampling.min_p * most}


@given(
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.2, 0.7, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 39, 100]),
    min_p=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_only_what_the_rules_allow_is_drawn(
    seed: int, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    sampling = Sampling(temperature, top_p, top_k, min_p, seed=seed)
    logits = scores(seed)
    chooser = Chooser(sampling, ())
    drawn = {chosen(chooser, logits) for _ in range(40)}
    assert drawn <= kept(sampling, logits)


@pytest.mark.parametrize("top_p,top_k", [(1.0, 0), (0.9, 0), (1.0, 5), (0.9999, 0)])
def test_draws_follow_the_distribution(top_p: float, top_k: int) -> None:
    sampling = Sampling(1.0, top_p, top_k, seed=3)
    logits = scores(1, 12, 1.0)
    chooser = Chooser(sampling, ())
    count = 4000
    drawn = Counter(chosen(chooser, logits) for _ in range(count))
    allowed = sorted(kept(sampling, logits))
    expected = torch.softmax(logits[allowed], 0)
    for token, share in zip(allowed, expected.tolist(), strict=True):
        assert abs(drawn[token] / count - share) < 5 * math.sqrt(share / count)
    assert set(drawn) <= set(allowed)


@given(seed=st.integers(0, 999), size=st.sampled_from([1, 5, 256, 257, 3000]), zeros=st.sampled_from([0.0, 0.5, 0.99]))
def test_a_draw_is_where_it_falls_in_the_sum(seed: int, size: int, zeros: float) -> None:
    """Found among blocks first: the same place as in one sum over all, and never one without weight."""
    generator = np.random.default_rng(seed)
    weights = generator.random(size, np.float32) * (generator.random(size) >= zeros)
    weights[generator.integers(size)] = 1.0
    sums = weights.astype(np.float64).cumsum()
    for draw in (0.0, *generator.random(20), 1 - 2**-53):
        place = _drawn(weights, draw)
        assert weights[place] > 0
        before = sums[place - 1] if place else 0.0
        assert before * (1 - 1e-12) <= draw * sums[-1] <= sums[place] * (1 + 1e-12)


def test_a_flat_distribution_falls_back_to_the_whole_vocabulary() -> None:
    sampling = Sampling(1.0, top_p=0.9, seed=0)
    chooser = Chooser(sampling, ())
    drawn = {chosen(chooser, torch.zeros(5000)) for _ in range(300)}
    assert len(drawn) > 200


def test_penalties_by_their_definitions() -> None:
    chooser = Chooser(Sampling(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25), (0, 1))
    for token in (2, 2, 3):
        chooser.took(token)
    raw = torch.tensor([4.0, -4.0, 4.0, 1.0, 1.0])
    adjusted = raw.numpy().copy()
    chooser.adjust(adjusted)
    assert adjusted.tolist() == [2.0, -8.0, 4.0 / 2 - 0.5 - 0.5, 1.0 / 2 - 0.5 - 0.25, 1.0]


def test_bias_and_minimum_length() -> None:
    chooser = Chooser(Sampling(logit_bias={1: 100.0, 3: -100.0, 999: 5.0}), (), minimum=2, banned=(1,))
    logits = torch.tensor([0.0, 0.0, 1.0, 50.0])
    assert [chosen(chooser, logits), chosen(chooser, logits)] == [2, 2]
    assert chosen(chooser, logits) == 1


def test_a_seed_gives_the_same_tokens_whatever_stands_beside() -> None:
    logits = torch.stack([scores(i, 200) for i in range(5)])
    sampling = Sampling(1.0, top_p=0.95, seed=11)

    def draws(company: int) -> list[int]:
        mine = Chooser(sampling, ())
        others = [Chooser(Sampling(1.0, seed=i), ()) for i in range(company)]
        found = []
        for i in range(5):
            batch = torch.cat([logits[:company], logits[i : i + 1]])
            found.append(choose_all(batch, [*others, mine], lambda token: str(token).encode())[-1].token)
        return found

    assert draws(0) == draws(3)
    other = Chooser(sampling, (), choice=1)
    assert [chosen(other, row) for row in logits] != draws(0)


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.stack([scores(0), scores(1)])
    choosers = [Chooser(Sampling(), (), logprobs=3), Chooser(Sampling(logit_bias={7: 100.0}), (), logprobs=0)]
    first, second = choose_all(logits, choosers, lambda token: str(token).encode())
    logs = torch.log_softmax(logits, 1)
    assert first.logprob is not None and second.logprob is not None
    assert first.token == int(logits[0].argmax())
    assert [t for t, _, _ in first.logprob.top] == logs[0].topk(3).indices.tolist()
    assert second.token == 7
    assert second.logprob.logprob == pytest.approx(float(logs[1, 7]))
    assert second.logprob.top == ()


def test_log_probabilities_of_large_scores_keep_their_digits() -> None:
    logits = scores(5, 3000) + 300
    (found,) = choose_all(logits[None], [Chooser(Sampling(), (), logprobs=2)], lambda token: str(token).encode())
    assert found.logprob is not None
    exact = torch.log_softmax(logits.double(), 0)
    assert found.logprob.logprob == pytest.approx(float(exact[found.token]), abs=1e-7)
    assert [v for _, _, v in found.logprob.top] == pytest.approx(exact.topk(2).values.tolist(), abs=1e-7)


def test_scores_that_are_not_finite_break_their_own_row_only() -> None:
    logits = torch.stack([scores(0), scores(1) * torch.nan, scores(2)])
    found = choose_all(logits, [Chooser(Sampling(), ()) for _ in range(3)], lambda token: str(token).encode())
    assert [c.broken for c in found] == [False, True, False]


def test_a_request_names_all_that_is_wrong_with_it() -> None:
    with pytest.raises(ConfigError) as error:
        Request("x", max_tokens=0, n=0, stop=("",), sampling=Sampling(temperature=-1, top_p=0, min_p=2), timeout=0)
    for word in ("max_tokens", "n must", "stop", "temperature", "top_p", "min_p", "timeout"):
        assert word in str(error.value)


def test_settings_at_the_edge_of_their_range_choose_what_is_allowed() -> None:
    scores = torch.tensor([3.0, 2.0, -1.0, -torch.inf])
    assert chosen(Chooser(Sampling(temperature=5e-324), ()), scores) == 0
    assert chosen(Chooser(Sampling(temperature=5e-324, repetition_penalty=0.01), (0,)), scores) == 0
    assert chosen(Chooser(Sampling(repetition_penalty=100.0, temperature=0.0), (0,)), scores) == 1
    assert list(Sampling(repetition_penalty=5e-324).problems())
