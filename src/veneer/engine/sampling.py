"""Choosing the next token of each row from its scores.

Order: logit bias, penalties, minimum length and constraint, temperature, top-k, top-p, min-p, one draw. Repetition
penalty is CTRL's (arXiv 1909.05858: scores of tokens seen, prompt included, divided where positive and multiplied
where negative); presence and frequency penalties are OpenAI's, over generated tokens. min-p is arXiv 2407.01082.

One number is drawn per token from the row's own generator and looked up in the cumulative distribution, so a seed
gives the same answer whatever else is in the batch, as far as the scores are the same. Plain greedy rows are one
argmax for all.

All rows that draw are one call of `native/draw.c`, where there are kernels. Otherwise rows are numpy's: on a vocabulary its
passes cost a third of torch's, which wakes its threads for each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from veneer.engine.constraint import Matcher
from veneer.engine.request import Sampling, TokenLogprob
from veneer.errors import Unsupported, VeneerError
from veneer.ops.native import draw as native
from veneer.ops.native import few
from veneer.ops.native.draw import Draw

Scores: TypeAlias = npt.NDArray[np.float32]
NO_TOKEN = "constraint, bias and penalties of this request leave no token of the base's vocabulary to go on with"
_BLOCK = 256


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
    _seen: npt.NDArray[np.bool_] | None = None

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

    @property
    def adjusts(self) -> bool:
        """The scores are changed before a token is chosen by them."""
        s = self.sampling
        penalties = s.repetition_penalty != 1.0 or (self.counts and (s.presence_penalty or s.frequency_penalty))
        return bool(penalties or s.logit_bias or self.matcher is not None or self._too_short)

    def draw(self) -> Draw:
        """How the next token is to be drawn. Takes a number from the row's generator."""
        s = self.sampling
        temperature = max(s.temperature, float(np.finfo(np.float32).tiny))  # which is not rounded to 0
        draw = torch.rand((), generator=self.generator, dtype=torch.float64).item()
        return Draw(temperature, max(s.top_k, 0), s.top_p, s.min_p, draw)

    def took(self, token: int) -> None:
        """`token` is part of the answer now."""
        self.counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True
        if self.matcher is not None:
            self.matcher.accept(token)

    def adjust(self, scores: Scores) -> None:
        """Bias, penalties, minimum length and constraint, in place."""
        s = self.sampling
        if s.logit_bias:
            inside = [(t, b) for t, b in s.logit_bias.items() if 0 <= t < len(scores)]
            scores[[t for t, _ in inside]] += np.array([b for _, b in inside], scores.dtype)
        if s.repetition_penalty != 1.0:
            seen = self._seen_in(len(scores))
            values = scores[seen]
            scores[seen] = np.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if self.counts and (s.presence_penalty or s.frequency_penalty):
            tokens = np.fromiter(self.counts, np.int64, len(self.counts))
            counts = np.fromiter(self.counts.values(), scores.dtype, len(self.counts))
            scores[tokens] -= (s.presence_penalty + s.frequency_penalty * counts).astype(scores.dtype)
        if self.matcher is not None or self._too_short:
            scores[~self._allowed(len(scores))] = -np.inf

    def _allowed(self, vocab: int) -> npt.NDArray[np.bool_]:
        """What constraint and minimum length let come next. Where together they let nothing, the constraint decides."""
        allowed = np.ones(vocab, np.bool_) if self.matcher is None else self.matcher.allowed(vocab)
        if not self._too_short:
            return allowed
        longer = allowed.copy()
        longer[list(self.banned)] = False
        return longer if longer.any() else allowed

    def _seen_in(self, vocab: int) -> npt.NDArray[np.intp]:
        """The tokens of prompt and answer, each once."""
        if self._seen is None:
            self._seen = np.zeros(vocab, np.bool_)
            self._seen[[*self.prompt, *self.counts]] = True
        return np.flatnonzero(self._seen)


def draw_plainly(scores: Scores, how: Draw) -> int:
    """The place in `scores`, which are changed, that a draw falls on: tokens lie side by side in their order."""
    scores -= scores.max()  # first, so that no temperature, however small, makes the largest infinite
    with np.errstate(over="ignore"):
        scores /= np.float32(how.temperature)
    tokens: npt.NDArray[np.intp] | None = None
    if 0 < how.top_k < len(scores):
        tokens = np.sort(np.argpartition(scores, -how.top_k)[-how.top_k :])
    weights = np.exp(scores, out=scores) if tokens is None else np.exp(scores[tokens])
    if how.top_p < 1.0:
        inside = np.sort(_nucleus(weights, how.top_p))
        tokens, weights = inside if tokens is None else tokens[inside], weights[inside]
    if how.min_p > 0:
        weights[weights < how.min_p] = 0
    place = _drawn(weights, how.draw)
    return place if tokens is None else int(tokens[place])


def _nucleus(weights: Scores, share: float) -> npt.NDArray[np.intp]:
    """The largest weights that together reach `share` of all, the largest first.

    Those above a bound hold them all where they reach the share, and are the only ones to be sorted. The last bound always
    will do: what is below its part of the rest comes together to less than the rest.
    """
    total = float(weights.sum(dtype=np.float64))
    for bound in (0.01, 0.0005, total * (1 - share) / len(weights)):
        worth = np.flatnonzero(weights >= bound)
        if weights[worth].sum(dtype=np.float64) >= share * total:
            break
    order = worth[np.argsort(-weights[worth])]
    largest = weights[order].astype(np.float64)
    return order[: 1 + int(np.searchsorted(largest.cumsum(), share * total))]


def _drawn(weights: Scores, draw: float) -> int:
    """Where `draw`, in [0, 1), falls among the weights side by side. Found among blocks of them first, then in one."""
    starts = np.arange(0, len(weights), _BLOCK)
    ends = np.add.reduceat(weights, starts, dtype=np.float64).cumsum()
    goal = min(draw * ends[-1], np.nextafter(ends[-1], 0.0))
    block = int(np.searchsorted(ends, goal, side="right"))
    inside = weights[starts[block] : starts[block] + _BLOCK].cumsum(dtype=np.float64)
    before = ends[block - 1] if block else 0.0
    place = int(np.searchsorted(inside, goal - before, side="right"))
    last = int(np.searchsorted(inside, inside[-1]))  # that has any weight, should rounding lead beyond it
    return int(starts[block]) + min(place, last)


@dataclass(frozen=True)
class Chosen:
    """A token and, where asked for, its log-probability.

    broken   the scores were not finite
    refusal  why the constraint has no next token
    """

    token: int
    logprob: TokenLogprob | None = None
    broken: bool = False
    refusal: VeneerError | None = None


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


def choose_all(logits: Tensor, choosers: Sequence[Chooser], spell: Callable[[int], bytes]) -> list[Chosen]:
    """One token per row of `logits` `[n, vocab]`."""
    plain, finite = _likeliest(logits)
    rows = [] if all(chooser.greedy for chooser in choosers) else list(logits.float().cpu().numpy())
    tokens = dict(enumerate(plain))
    drawn: dict[int, Scores] = {}
    refusals: dict[int, VeneerError] = {}
    for row, chooser in enumerate(choosers):
        if not finite[row] or chooser.plain:
            continue
        scores = rows[row]
        if chooser.adjusts:
            scores = scores.copy()
            try:
                chooser.adjust(scores)
            except VeneerError as error:
                refusals[row] = error
                continue
        if not np.isfinite(scores.max()):
            refusals[row] = Unsupported(NO_TOKEN, help="ask with a looser one, or without")
        elif chooser.sampling.temperature > 0:
            drawn[row] = scores
        else:
            tokens[row] = int(scores.argmax())
    tokens |= zip(drawn, _draw_all(list(drawn.values()), [choosers[row].draw() for row in drawn]), strict=True)
    chosen: list[Chosen] = []
    for row, chooser in enumerate(choosers):
        if not finite[row] or row in refusals:
            chosen.append(Chosen(-1, broken=not finite[row], refusal=refusals.get(row)))
            continue
        logprob = None if chooser.logprobs is None else _logprob(rows[row], tokens[row], chooser.logprobs, spell)
        try:
            chooser.took(tokens[row])
        except VeneerError as error:
            chosen.append(Chosen(-1, refusal=error))
            continue
        chosen.append(Chosen(tokens[row], logprob))
    return chosen


def _draw_all(rows: Sequence[Scores], draws: Sequence[Draw]) -> list[int]:
    """The place in each row of scores that its draw falls on; all in one call where there is a kernel."""
    found = native.draw(rows, draws) if rows else []
    return [draw_plainly(row.copy(), how) for row, how in zip(rows, draws, strict=True)] if found is None else found


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


def _logprob(scores: Scores, token: int, top: int, spell: Callable[[int], bytes]) -> TokenLogprob:
    most = float(scores.max())  # as a Python float: the subtraction below is not to be rounded to fp32
    total = most + math.log(np.exp(scores - most).sum(dtype=np.float64))
    best: tuple[tuple[int, bytes, float], ...] = ()
    if top:
        places = np.argpartition(scores, -min(top, len(scores)))[-min(top, len(scores)) :]
        places = places[np.argsort(-scores[places], kind="stable")]
        best = tuple((i, spell(i), float(scores[i]) - total) for i in places.tolist())
    return TokenLogprob(token, spell(token), float(scores[token]) - total, best)
