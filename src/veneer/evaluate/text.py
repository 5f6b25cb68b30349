"""How close a text is to the answers that count as right.

exact   1 where the text is one of them, spaces around it aside
f1      overlap of words as in SQuAD (arXiv 1606.05250): lower case, without punctuation and articles
chrf    overlap of character n-grams, n = 1..6, beta = 2 (Popović 2015), 0 to 100, pooled over rows as sacreBLEU does

With several right answers a row gets its best. The surprise: chrF ignores spaces between words.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from veneer.evaluate.bootstrap import Floats, Measure, ratio

ORDER = 6
BETA = 2.0
DROPPED = str.maketrans("", "", string.punctuation)


def measures(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> dict[str, Measure]:
    """exact, f1 and chrf over rows: what was said, and what would have been right."""
    pairs = list(zip(answers, accepted, strict=True))
    return {
        "exact": ratio(
            np.array([float(answer.strip() in {text.strip() for text in right}) for answer, right in pairs])
        ),
        "f1": ratio(np.array([max(word_f1(answer, text) for text in right) for answer, right in pairs])),
        "chrf": Measure(np.stack([_best(answer, right) for answer, right in pairs]), chrf),
    }


def word_f1(answer: str, right: str) -> float:
    """2PR / (P + R) over words.

    >>> word_f1("The cat sat.", "a cat ran")
    0.5
    """
    said, wanted = Counter(_words(answer)), Counter(_words(right))
    if not said or not wanted:
        return float(said == wanted)
    common = sum((said & wanted).values())
    return 2 * common / (sum(said.values()) + sum(wanted.values()))


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(DROPPED)).split()


def ngram_sums(answer: str, right: str) -> Floats:
    """For each n: n-grams of the answer, of the right text, and common to both. fp64 `[3 * ORDER]`."""
    said, wanted = "".join(answer.split()), "".join(right.split())
    sums: list[int] = []
    for n in range(1, ORDER + 1):
        a, b = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (said, wanted))
        sums += [sum(a.values()), sum(b.values()), sum((a & b).values())]
    return np.array(sums, dtype=np.float64)


def chrf(totals: Floats) -> Floats:
    """chrF of pooled sums `[..., 3 * ORDER]`: orders that occur on both sides count, precision and recall are their means."""
    said, wanted, common = (totals[..., part::3] for part in range(3))
    counts = (said > 0) & (wanted > 0)
    orders = np.maximum(counts.sum(axis=-1), 1)
    precision = np.where(counts, common / np.maximum(said, 1), 0.0).sum(axis=-1) / orders
    recall = np.where(counts, common / np.maximum(wanted, 1), 0.0).sum(axis=-1) / orders
    below = BETA**2 * precision + recall
    found: Floats = 100 * (1 + BETA**2) * precision * recall / np.where(below > 0, below, 1.0)
    return found


def _best(answer: str, right: Sequence[str]) -> Floats:
    return max((ngram_sums(answer, text) for text in right), key=lambda sums: float(chrf(sums)))
