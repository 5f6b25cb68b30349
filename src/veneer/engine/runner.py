"""One step: the tokens of many sequences through the decoder at once, and a next token for each that is ready for one.

Rows are ordered by adapter, so every adapter has one span of rows whatever mix of decoding and prompt reading there
is, and each projection is one product over all rows of the step.

In reproducible mode every sequence has a forward of its own, with chunks of a fixed size: the same shapes whatever
else runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from veneer.engine.arena import Arena
from veneer.engine.batch import Resident, join
from veneer.engine.hot import Merged
from veneer.engine.sampling import Chooser, Chosen, choose_all, take_all
from veneer.engine.scheduler import Seq, Step
from veneer.models.bank import EMPTY, Bank, spans_of
from veneer.models.decoder import Decoder
from veneer.models.project import spans_at
from veneer.ops.native.few import decodes
from veneer.types import Segment


@dataclass(frozen=True)
class Work:
    """The next `count` tokens of one sequence."""

    seq: Seq
    count: int

    @property
    def gives_token(self) -> bool:
        """After this the sequence is read to its end, so its next token can be chosen."""
        return self.count == self.seq.pending


@dataclass(frozen=True, eq=False)
class Scores:
    """What sequences that are ready for a token choose it by.

    logits     `[n, vocab]`, fp32
    likeliest  in their place, where nobody asks for more: the token with the largest of each row, and that score
    """

    seqs: tuple[Seq, ...]
    logits: torch.Tensor | None
    likeliest: tuple[list[int], list[float]] | None = None

    def choose(self, choosers: Sequence[Chooser], spell: Callable[[int], bytes]) -> list[Chosen]:
        """One token for each sequence."""
        if self.likeliest is not None:
            return take_all(self.likeliest, choosers)
        assert self.logits is not None
        return choose_all(self.logits, choosers, spell)


class Runner:
    """Runs steps on a decoder. `residents` are looked up by residency key."""

    def __init__(self, decoder: Decoder, *, alone: bool = False) -> None:
        self.decoder = decoder
        self._alone = alone
        config = decoder.config
        group, width, softcap = config.heads // config.kv_heads, config.head_dim, config.attention_softcap
        in_place = decodes(decoder.dtype, decoder.device, group, width, softcap)
        self.arena = Arena(config.layers, config.kv_heads, width, decoder.dtype, decoder.device, in_place=in_place)
        self._bank: tuple[tuple[Resident, ...], Bank] = ((), EMPTY)

    def run(
        self, step: Step, residents: Mapping[str, Resident], merged: Merged | None = None, *, greedy: bool = False
    ) -> list[Scores]:
        """Read and store the step's tokens; the scores of those that go on.

        merged  the merged set of the one adapter that all rows of this step use
        greedy  nobody asks for more than the likeliest token
        """
        work = [Work(seq, 1) for seq in step.decode]
        work += [Work(seq, count) for seq, count in step.prefill]
        order = {key: place for place, key in enumerate(dict.fromkeys(w.seq.adapter for w in work))}
        work.sort(key=lambda w: order[w.seq.adapter])
        self._prepare(work)
        if merged is not None:
            found = self._forward(work, merged.decoder, merged.rest.bank, dict.fromkeys(residents, 0), greedy=greedy)
            return [] if found is None else [found]
        batches = [[w] for w in work] if self._alone else [work]
        given = [self._on_the_base(batch, residents, greedy=greedy) for batch in batches]
        return [scores for scores in given if scores is not None]

    def _on_the_base(self, batch: Sequence[Work], residents: Mapping[str, Resident], *, greedy: bool) -> Scores | None:
        keys = sorted({w.seq.adapter for w in batch if w.seq.adapter})
        bank = self._bank_of(tuple(residents[key] for key in keys))
        return self._forward(batch, self.decoder, bank, {key: index for index, key in enumerate(keys)}, greedy=greedy)

    def _prepare(self, batch: Sequence[Work]) -> None:
        """Room for what this step stores."""
        for work in batch:
            seq = work.seq
            if seq.decoding and not self._alone:
                self.arena.seat(seq.id, seq.virtual + seq.stored, seq.most_positions)
            self.arena.reserve(seq.id, seq.virtual + seq.stored + work.count)

    def _forward(
        self, batch: Sequence[Work], decoder: Decoder, bank: Bank, places: Mapping[str, int], *, greedy: bool
    ) -> Scores | None:
        """One pass; `places` are the adapters' places in the bank."""
        segments: list[Segment] = []
        tokens: list[int] = []
        rows: list[int] = []
        ready: list[Seq] = []
        for work in batch:
            seq = work.seq
            segments += _segments(seq, work.count, places.get(seq.adapter, -1))
            tokens += seq.tokens[seq.stored : seq.stored + work.count]
            if work.gives_token:
                rows.append(len(tokens) - 1)
                ready.append(seq)
        spans, wanted = spans_of(segments), None
        with torch.inference_mode():
            if len(rows) < len(tokens):  # with no row to give, products would be empty; one more costs nothing
                wanted = torch.tensor(rows or [len(tokens) - 1], dtype=torch.long, device=decoder.device)
                spans = spans_at(spans, wanted)
            ids = torch.tensor(tokens, dtype=torch.long, device=decoder.device)
            hidden = decoder.forward(ids, segments, bank, self.arena, wanted)
            likeliest = decoder.likeliest(hidden, spans, bank) if rows and greedy else None
            logits = decoder.scores(hidden, spans, bank) if rows and likeliest is None else None
        for work in batch:
            work.seq.stored += work.count
        return Scores(tuple(ready), logits, likeliest) if rows else None

    def _bank_of(self, residents: tuple[Resident, ...]) -> Bank:
        """The bank of these adapters; the last one is remembered, since most steps run what the step before ran."""
        if not residents:
            return EMPTY
        held, bank = self._bank
        if len(held) != len(residents) or any(a is not b for a, b in zip(held, residents, strict=True)):
            bank = join(residents, self.decoder.groups)
            self._bank = (residents, bank)
        return bank

    def forget_bank(self) -> None:
        """Let go of adapters that may have been evicted."""
        self._bank = ((), EMPTY)


def _segments(seq: Seq, count: int, adapter: int) -> list[Segment]:
    """The next `count` tokens as segments: two where an invoked adapter starts within them."""
    start, stop = seq.stored, seq.stored + count
    bare = min(max(seq.switch - start, 0), count)
    found = []
    if bare:
        found.append(Segment(bare, seq.id, -1, _position(seq, start), seq.positions))
    if bare < count:
        found.append(Segment(stop - start - bare, seq.id, adapter, _position(seq, start + bare), seq.positions))
    return found


def _position(seq: Seq, token: int) -> int:
    """A sequence begins at 0: the decoder puts the virtual rows before its first token."""
    return seq.virtual + token if token else 0
