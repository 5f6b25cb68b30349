"""Which tokens of a row are learned.

A chat row is rendered by the base's template, and tokenised once as a whole, so training sees the tokens that serving sees.
What the assistant says in turn i is the text of `render(messages[:i+1])` beyond `render(messages[:i]) + generation prompt`:
found by rendering twice, never by searching for marker strings. Everything the generation prompt supplies is masked; the stop
token is learned; what a template writes after it (ChatML's line break) is not, since nobody ever samples it.

Raw rows have no template: specials the tokenizer adds by itself, prompt, completion, end-of-sequence.

The surprise: a template may render a turn differently once another follows (reasoning that is dropped from the history).
Then the turn has no place in the whole text, and the row is refused; `train_on: last` is the way out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from veneer.data.rows import Chat, Raw, Row
from veneer.errors import DataError

TrainOn: TypeAlias = Literal["assistant", "last", "all"]
"""Which turns carry a loss: every one of the assistant's, its last, or every token of the row."""

TRAIN_ON: tuple[TrainOn, ...] = ("assistant", "last", "all")


class TextTokenizer(Protocol):
    """What encoding needs of a tokenizer."""

    @property
    def eos_ids(self) -> Sequence[int]:
        """Tokens that end a turn or a text. The first is the tokenizer's own end-of-sequence token."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def template(self) -> str | None: ...

    @property
    def digest(self) -> str:
        """Changes whenever the same text could become other tokens."""

    def encode(self, text: str, special: bool = False) -> list[int]: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids as `encode(text)`, and for each token the exact characters [start, stop) it stands for, spaces included."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text. What the template refuses is a DataError."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A row as tokens.

    ids      int32 `[n]`
    weights  float32 `[n]`, the weight of predicting each token; 0 is masked. The first token is never predicted.
    sizes    int64 `[n]`, UTF-8 bytes of text that each token stands for. Stop tokens have none, and of several tokens that share
             a character the last has all
    notes    what a user should know, by name (see NOTES)
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    sizes: NDArray[np.int64]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> float:
        """UTF-8 bytes of the learned text, each with its token's weight."""
        return float(self.weights[1:] @ self.sizes[1:])

    def cut(self, length: int) -> Encoded:
        """Its first tokens."""
        return Encoded(self.ids[:length], self.weights[:length], self.sizes[:length], self.notes)


NOTES = {
    "straddling": "rows where a token spans the generation prompt and the answer; that token is not learned",
    "without_stop": "rows whose learned turns end without a stop token: the model won't learn to stop",
    "empty_answers": "rows with an empty answer: the model learns to stop at once",
}


@dataclass(frozen=True)
class _Span:
    """Characters [start, stop) of the rendered text, what the assistant said there, and the weight of learning it."""

    start: int
    stop: int
    weight: float


def encode_row(row: Row, tokenizer: TextTokenizer, train_on: TrainOn) -> Encoded:
    """One row as tokens and weights, cut after the last learned token (nothing behind it can change the loss)."""
    encoded = _encode_chat(row, tokenizer, train_on) if isinstance(row, Chat) else _encode_raw(row, tokenizer, train_on)
    learned = np.flatnonzero(encoded.weights)
    return encoded.cut(int(learned[-1]) + 1) if learned.size else encoded


def _encode_chat(row: Chat, tokenizer: TextTokenizer, train_on: TrainOn) -> Encoded:
    text, spans = _spans(row, tokenizer, train_on)
    ids, pairs = tokenizer.encode_with_offsets(text)
    offsets = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    tokens = np.asarray(ids, dtype=np.int32)
    is_stop = np.isin(tokens, np.asarray(tokenizer.eos_ids, dtype=np.int32))
    weights = np.full(len(ids), 1.0 if train_on == "all" else 0.0, dtype=np.float32)
    notes: dict[str, None] = {}
    for span in spans:
        inside = (offsets[:, 0] >= span.start) & (offsets[:, 1] <= span.stop)
        stops = np.flatnonzero(inside & is_stop)
        if stops.size:
            inside[stops[-1] + 1 :] = False
        elif span.weight > 0:
            notes["without_stop"] = None
        if np.any((offsets[:, 0] < span.start) & (offsets[:, 1] > span.start)):
            notes["straddling"] = None
        weights[inside] = span.weight
        learned = _text_between(text, offsets[inside & ~is_stop])
        if span.weight > 0 and not learned.strip():
            notes["empty_answers"] = None
    return Encoded(tokens, weights, np.where(is_stop, 0, _sizes(text, offsets)), tuple(notes))


def _sizes(text: str, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """UTF-8 bytes from where each token starts to where the next one does."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    at = np.concatenate([[0], np.cumsum(1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000))]).astype(np.int64)
    ends: NDArray[np.int64] = np.append(at[offsets[:, 0]], at[offsets[-1:, 1]])
    return np.diff(ends)


def _text_between(text: str, offsets: NDArray[np.int64]) -> str:
    return text[int(offsets[:, 0].min()) : int(offsets[:, 1].max())] if len(offsets) else ""


def _spans(row: Chat, tokenizer: TextTokenizer, train_on: TrainOn) -> tuple[str, list[_Span]]:
    """The rendered text up to the last learned turn, and where the learned turns are in it."""
    said = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    turns = [said[-1]] if train_on == "last" else said
    given = {i: row.weights[i] for i in turns}
    weights = {i: 1.0 if weight is None else weight for i, weight in given.items()}
    if train_on == "all":
        turns, end = [i for i in turns if given[i] is not None], len(row.messages)
    else:
        turns = [i for i in turns if weights[i] > 0]
        end = turns[-1] + 1 if turns else len(row.messages)
    text = tokenizer.render(row.messages[:end], tools=row.tools)
    spans = []
    for i in turns:
        if i == 0:
            raise DataError(
                "messages[0] is from the assistant: there is nothing it answers",
                help="start the conversation with a user message, or give this one weight 0",
            )
        before = tokenizer.render(row.messages[:i], tools=row.tools, add_generation_prompt=True)
        after = text if i + 1 == end else tokenizer.render(row.messages[: i + 1], tools=row.tools)
        _check_prefix(i, before, after, text)
        spans.append(_Span(len(before), len(after), weights[i]))
    return text, spans


def _check_prefix(i: int, before: str, after: str, text: str) -> None:
    """The prompt must open the conversation with the answer, and that must open the whole text."""
    if not after.startswith(before):
        same = (a == b for a, b in zip(before, after, strict=False))
        common = next((k for k, equal in enumerate(same) if not equal), min(len(before), len(after)))
        raise DataError(
            f"messages[{i}]: the template's prompt for this turn is not what it writes before the answer "
            f"({before[common : common + 30]!r} against {after[common : common + 30]!r})",
            help="give the base a template whose generation prompt is what it writes before an answer",
        )
    if not text.startswith(after):
        raise DataError(
            f"messages[{i}]: the template renders this turn differently once others follow, so what would be learned is not "
            "what the model is asked to write",
            help="train_on: last learns the last turn only; to learn every turn, write one row for each",
        )


def prompt_tokens(row: Row, tokenizer: TextTokenizer) -> list[int]:
    """The tokens before a row's last answer: what serving would be given to write it."""
    if isinstance(row, Raw):
        return _with_specials(row.prompt, tokenizer)
    last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
    return tokenizer.encode(tokenizer.render(row.messages[:last], tools=row.tools, add_generation_prompt=True))


def _encode_raw(row: Raw, tokenizer: TextTokenizer, train_on: TrainOn) -> Encoded:
    prompt, learned = _with_specials(row.prompt, tokenizer), _piece(row.completion, tokenizer)
    given = _piece(row.prompt, tokenizer) if train_on == "all" else _Piece([], np.zeros(0, dtype=np.int64))
    before = np.zeros(len(prompt), dtype=np.int64)
    before[len(prompt) - len(given.ids) :] = given.sizes
    stop = list(tokenizer.eos_ids[:1])
    ids = np.asarray([*prompt, *learned.ids, *stop], dtype=np.int32)
    sizes = np.concatenate([before, learned.sizes, np.zeros(len(stop), dtype=np.int64)])
    weights = np.ones(len(ids), dtype=np.float32)
    if train_on != "all":
        weights[: len(prompt)] = 0.0
    notes = [] if stop else ["without_stop"]
    notes += [] if row.completion.strip() else ["empty_answers"]
    return Encoded(ids, weights, sizes, tuple(notes))


class _Piece(NamedTuple):
    """A part of a text: its tokens, and the bytes of each."""

    ids: list[int]
    sizes: NDArray[np.int64]


def _piece(text: str, tokenizer: TextTokenizer) -> _Piece:
    ids, pairs = tokenizer.encode_with_offsets(text)
    return _Piece(ids, _sizes(text, np.asarray(pairs, dtype=np.int64).reshape(-1, 2)))


def _with_specials(text: str, tokenizer: TextTokenizer) -> list[int]:
    """Tokens of a text that opens a sequence: with the tokenizer's own BOS once, without the EOS some add."""
    ids = tokenizer.encode(text, special=True)
    added = tokenizer.encode("", special=True)
    if added and added[-1] in tokenizer.eos_ids and ids[-1:] == added[-1:] and added[-1] != tokenizer.bos_id:
        ids = ids[:-1]
    doubled = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id
    return ids[1:] if doubled else ids
