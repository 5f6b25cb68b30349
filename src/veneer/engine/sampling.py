"""Choosing the next token of each row from its scores.

Order: logit bias, penalties, minimum length and constraint, temperature, top-k, top-p, min-p, one draw. Repetition
penalty is CTRL's (arXiv 1909.05858: scores of tokens seen, prompt included, divided where positive and multiplied
where negative); presence and frequency penalties are OpenAI's, over generated tokens. min-p is arXiv 2407.01082.

One number is drawn per token from the row's own generator and looked up in the cumulative distribution, so a seed
gives the same answer whatever else is in the batch, as far as the scores are the same. Plain greedy rows are one
argmax for all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from veneer.engine.constraint import Matcher
from veneer.engine.request import Sampling, TokenLogprob
from veneer.ops.native import few

_SHORTLIST = 512


@dataclass(eq=False)
class Chooser:
    """How one answer goes on, and what that needs to remember.

    banned   tokens that may not come before `minimum` tokens are there: those that would end the answer
    matcher  the constraint on the answer, if any
    """

    sampling: Sampling
    prompt: Sequence[int]
    choice: int = 0
    minimum: int = 0
    banned: tuple[int, ...] = ()
    matcher: Matcher | None = None
    logprobs: int | None = None
    counts: Counter[int] = field(default_factory=Counter)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator()
        if self.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed((self.sampling.seed * 1_000_003 + self.choice) % 2**63)

    @property
    def plain(self) -> bool:
        """The likeliest token as it is: no row of its own is needed."""
        s = self.sampling
        neutral = s.repetition_penalty == 1.0 and not (s.presence_penalty or s.frequency_penalty or s.logit_bias)
        return s.temperature == 0 and neutral and self.matcher is None and not self._too_short

    @property
    def greedy(self) -> bool:
        """Nothing but the likeliest token is asked for."""
        return self.plain and self.logprobs is None

    @property
    def _too_short(self) -> bool:
        return bool(self.banned) and self.counts.total() < self.minimum

    def choose(self, scores: Tensor) -> int:
        """The next token for fp32 `scores` `[vocab]`, which are changed."""
        self._adjust(scores)
        if self.sampling.temperature == 0:
            return int(scores.argmax())
        # The largest first becomes 0, so that no temperature, however small, makes it infinite; nor is any rounded to 0.
        temperature = max(self.sampling.temperature, torch.finfo(scores.dtype).tiny)
        return self._draw(scores.sub_(scores.max()).div_(temperature))

    def took(self, token: int) -> None:
        """`token` is part of the answer now."""
        self.counts[token] += 1
        if self.matcher is not None:
            self.matcher.accept(token)

    def _adjust(self, scores: Tensor) -> None:
        s = self.sampling
        if s.logit_bias:
            inside = [(t, b) for t, b in s.logit_bias.items() if 0 <= t < len(scores)]
            scores[[t for t, _ in inside]] += torch.tensor([b for _, b in inside])
        if s.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*self.prompt, *self.counts}))
            values = scores[seen]
            scores[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if self.counts and (s.presence_penalty or s.frequency_penalty):
            tokens, counts = list(self.counts), torch.tensor(list(self.counts.values()), dtype=scores.dtype)
            scores[tokens] -= s.presence_penalty + s.frequency_penalty * counts
        if self._too_short and not (self.matcher is not None and self.matcher.complete):
            scores[list(self.banned)] = -torch.inf
        if self.matcher is not None:
            scores.masked_fill_(~self.matcher.allowed(len(scores)), -torch.inf)

    def _draw(self, scores: Tensor) -> int:
        s = self.sampling
        most = min(s.top_k, len(scores)) if s.top_k > 0 else len(scores)
        total = torch.logsumexp(scores, 0)
        if most >= len(scores) and s.top_p >= 1.0:
            weights, order = (scores - total).exp(), None
        else:
            weights, order = self._nucleus(scores, total, most)
        if s.min_p > 0:
            weights = weights * (weights >= s.min_p * weights.max())
        steps = weights.double().cumsum(0)
        draw = torch.rand((), generator=self.generator, dtype=torch.float64) * steps[-1]
        index = int(torch.searchsorted(steps, draw, right=True).clamp(max=len(steps) - 1))
        return index if order is None else int(order[index])

    def _nucleus(self, scores: Tensor, total: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The candidates of top-k and top-p, the likeliest first.

        A short list is tried before the whole vocabulary is sorted.
        """
        p = self.sampling.top_p
        size = min(most, _SHORTLIST)
        values, order = scores.topk(size)
        if most < len(scores):
            total = torch.logsumexp(values, 0) if size == most else torch.logsumexp(scores.topk(most).values, 0)
        weights = (values - total).exp()
        if size < most and (p >= 1.0 or weights.sum() < p):
            values, order = scores.topk(most)
            weights = (values - total).exp()
        before = weights.cumsum(0) - weights
        keep = before < p
        return weights[keep], order[keep]


@dataclass(frozen=True)
class Chosen:
    """A token and, where asked for, its log-probability; `broken` where the scores were not finite."""

    token: int
    logprob: TokenLogprob | None = None
    broken: bool = False


def take_all(likeliest: tuple[list[int], list[float]], choosers: Sequence[Chooser]) -> list[Chosen]:
    """The likeliest token of each row, which is what every chooser asks for."""
    chosen = []
    for token, score, chooser in zip(*likeliest, choosers, strict=True):
        if not math.isfinite(score):
            chosen.append(Chosen(-1, broken=True))
            continue
        chooser.took(token)
        chosen.append(Chosen(token))
    return chosen


def choose_all(logits: Tensor, choosers: Sequence[Chooser], spell: Callable[[int], str]) -> list[Chosen]:
    """One token per row of `logits` `[n, vocab]`."""
    plain, finite = _likeliest(logits)
    chosen: list[Chosen] = []
    for row, chooser in enumerate(choosers):
        if not finite[row]:
            chosen.append(Chosen(-1, broken=True))
            continue
        token = plain[row] if chooser.plain else chooser.choose(logits[row].float().clone())
        logprob = None if chooser.logprobs is None else _logprob(logits[row], token, chooser.logprobs, spell)
        chooser.took(token)
        chosen.append(Chosen(token, logprob))
    return chosen


def _likeliest(logits: Tensor) -> tuple[list[int], list[bool]]:
    """Where the largest score of each row is, and whether it is a finite number. A NaN is larger than any number."""
    found = few.largest(logits)
    if found is not None:
        return found[0], [math.isfinite(value) for value in found[1]]
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        best, places = logits.max(dim=1)
        return places.tolist(), best.isfinite().tolist()
    scores = logits.numpy()  # ten times faster at this than torch
    where = scores.argmax(axis=1)
    return where.tolist(), np.isfinite(scores[np.arange(len(where)), where]).tolist()


def _logprob(scores: Tensor, token: int, top: int, spell: Callable[[int], str]) -> TokenLogprob:
    logs = torch.log_softmax(scores.float(), dim=0)
    best: tuple[tuple[int, str, float], ...] = ()
    if top:
        values, ids = logs.topk(min(top, len(logs)))
        best = tuple((i, spell(i), v) for i, v in zip(ids.tolist(), values.tolist(), strict=True) if not math.isnan(v))
    return TokenLogprob(token, spell(token), float(logs[token]), best)
