"""What a row asks and what would be right: its last assistant turn, or its completion. Two ways to find the model's answer.

generate    greedy decoding through the engine, one request for each question and model, all in one batch
likelihood  where the answers are labels (few, and each for several rows): the label with the least loss, its stop token
            included; raw, or normalised by the label's UTF-8 bytes (the harness's `acc` and `acc_norm`)

A question is asked in the very tokens that training saw before its answer. Plain text asks nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from veneer.data import Chat, Raw, Row, Rows, encode, prompt_tokens
from veneer.engine import Engine, Request
from veneer.evaluate.bootstrap import Floats, Measure, ratio
from veneer.evaluate.loss import row_losses
from veneer.models.bank import Bank
from veneer.models.base import Base
from veneer.models.tokenizer import Tokenizer

MAX_LABELS = 20
SPARE_TOKENS = 16
"""How far an answer may run beyond the longest right one before it is cut off."""


@dataclass(frozen=True)
class Question:
    """One row as a question. `accepted[0]` is the row's own answer."""

    row: Row
    accepted: tuple[str, ...]


def questions(rows: Rows) -> list[Question]:
    """The rows as questions, in order; none at all where some row asks nothing or answers with more than text."""
    found = [question for row in rows if (question := _question(row)) is not None]
    return found if len(found) == len(rows) else []


def _question(row: Row) -> Question | None:
    if isinstance(row, Raw):
        return Question(row, (row.completion,)) if row.prompt else None
    last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
    answer = row.messages[last].get("content")
    if last == 0 or not isinstance(answer, str):
        return None
    return Question(row, tuple(dict.fromkeys((answer, *row.accepted))))


def fitting(asked: Sequence[Question], tokenizer: Tokenizer, most: int) -> list[Question]:
    """The questions that leave room for the longest accepted answer of all, and its stop token, in `most` tokens."""
    longest = longest_answer(asked, tokenizer)
    return [q for q in asked if len(prompt_tokens(q.row, tokenizer)) + longest < most]


def longest_answer(asked: Sequence[Question], tokenizer: Tokenizer) -> int:
    """Tokens of the longest answer that some question accepts."""
    return max((len(tokenizer.encode(text)) for question in asked for text in question.accepted), default=0)


def answered(row: Row, answer: str) -> Row:
    """The row up to its last answer, with this answer in its place and nothing else learned."""
    if isinstance(row, Raw):
        return replace(row, completion=answer)
    last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
    messages = (*row.messages[:last], {**row.messages[last], "content": answer})
    return Chat(row.line, messages, (*(None,) * last, 1.0), row.tools)


# -- generation --------------------------------------------------------------------------------------------------------


def generate(
    engine: Engine, tokenizer: Tokenizer, asked: Sequence[Question], adapters: Sequence[str | None]
) -> dict[str | None, list[str]]:
    """Greedy answers to every question under every adapter (None: the bare base), all in one batch."""
    most, room = longest_answer(asked, tokenizer) + SPARE_TOKENS, engine.base.config.max_positions
    prompts = [tuple(prompt_tokens(question.row, tokenizer)) for question in asked]
    requests = [
        Request(prompt, adapter=adapter, max_tokens=min(most, room - len(prompt)))
        for adapter in adapters
        for prompt in prompts
    ]
    texts = [choices[0].text for choices in engine.complete(requests)]
    return {adapter: texts[i * len(asked) : (i + 1) * len(asked)] for i, adapter in enumerate(adapters)}


# -- labels ------------------------------------------------------------------------------------------------------------


def labels_of(asked: Sequence[Question]) -> tuple[str, ...]:
    """The labels, if the answers are labels: between 2 and 20 texts, each the answer to several questions."""
    counts = Counter(question.accepted[0] for question in asked)
    is_few = 2 <= len(counts) <= MAX_LABELS and min(counts.values()) >= 2
    return tuple(sorted(counts)) if is_few else ()


def scores_alone(row: Row) -> bool:
    """Whether a row's loss is the loss of its one answer, so that it need not be computed twice."""
    if isinstance(row, Raw):
        return True
    said = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    return len(said) == 1 and row.weights[said[0]] in (None, 1.0)


def label_scores(
    base: Base, asked: Sequence[Question], labels: Sequence[str], bank: Bank, adapter: int, own: Floats | None = None
) -> Floats:
    """Loss in nats of each label as the answer to each question. fp64 `[questions, labels]`.

    `own` are the losses of the questions' own answers, where they are known already.
    """
    scores = np.empty((len(asked), len(labels)))
    todo: list[tuple[int, int]] = []
    for i, question in enumerate(asked):
        for j, label in enumerate(labels):
            if own is not None and label == question.accepted[0]:
                scores[i, j] = own[i]
            else:
                todo.append((i, j))
    rows = tuple(answered(asked[i].row, labels[j]) for i, j in todo)
    made = Rows("labels", "row", "labels", rows, "")
    dataset = encode(made, base.require_tokenizer(), max_length=base.config.max_positions, train_on="last")
    scores[tuple(np.array(todo).T)] = row_losses(base, dataset, bank, adapter).nll.numpy()
    return scores


def label_measures(scores: Floats, asked: Sequence[Question], labels: Sequence[str]) -> Mapping[str, Measure]:
    """accuracy, accuracy_norm (by bytes) and macro_f1 (of the raw choice). Every accepted answer is right."""
    right = np.array([[label in question.accepted for label in labels] for question in asked])
    first = np.array([labels.index(question.accepted[0]) for question in asked])
    sizes = np.array([max(1, len(label.encode())) for label in labels])
    raw, normed = scores.argmin(axis=1), (scores / sizes).argmin(axis=1)
    every = np.arange(len(asked))
    wanted = np.eye(len(labels))[np.where(right[every, raw], raw, first)]
    chosen = np.eye(len(labels))[raw]
    return {
        "accuracy": ratio(right[every, raw].astype(np.float64)),
        "accuracy_norm": ratio(right[every, normed].astype(np.float64)),
        "macro_f1": Measure(np.concatenate([chosen, wanted, chosen * wanted], axis=1), _macro_f1),
    }


def _macro_f1(totals: Floats) -> Floats:
    """Mean over labels of 2 TP / (chosen + wanted)."""
    chosen, wanted, both = np.split(totals, 3, axis=-1)
    found: Floats = (2 * both / np.maximum(chosen + wanted, 1)).mean(axis=-1)
    return found
