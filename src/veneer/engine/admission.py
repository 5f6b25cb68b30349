"""The gate between waiting and running: a sequence enters when its adapter is resident and its keys and values have room.

What depends on the adapter is settled here, because only now is it known: the rows it puts before the prompt, where in the prompt
an invoked one starts to apply, how long the answer can become. The longest stored prefix is copied, so that much of the
prompt need not be read.
"""

from __future__ import annotations

from collections.abc import Sequence

from veneer.engine.answer import Answer
from veneer.engine.arena import Arena, capacity, whole_capacity
from veneer.engine.kvcache import BLOCK, Chain, KVBook
from veneer.engine.residency import Residency
from veneer.engine.scheduler import Seq, Verdict
from veneer.errors import FormatError, ResourceError, VeneerError
from veneer.types import switch_at


class Admission:
    """Lets sequences in.

    identity  of the base and its dtype: where prefix keys start; None for no reuse of prefixes
    context   positions that the base reads
    turn      positions from which on the base turns a whole sequence otherwise (LongRoPE)
    answers   by sequence id, kept by the engine
    refused   answers that can't run, and why; the engine takes them after each plan
    """

    def __init__(
        self,
        identity: str | None,
        context: int,
        turn: float,
        book: KVBook,
        arena: Arena,
        residency: Residency,
        answers: dict[int, Answer],
    ) -> None:
        self._identity, self._context, self._turn = identity, context, turn
        self._book, self._arena, self._residency, self._answers = book, arena, residency, answers
        self.refused: list[tuple[Answer, VeneerError]] = []

    def enter(self, seq: Seq, now: float) -> Verdict:
        """Let `seq` in if that is possible now."""
        answer = self._answers[seq.id]
        if seq.adapter:
            verdict = self._adapter_ready(answer, now)
            if verdict != "enter":
                return verdict
        try:
            self._fit(answer)
        except VeneerError as error:
            self.refused.append((answer, error))
            return "later"
        self._stored_prefix(answer)  # using it now keeps it from being dropped for its own sake
        dropped = self._book.promise(seq.id, capacity(seq.most_positions), seq.adapter)
        if dropped is None:
            return "full"
        self._arena.close_all(dropped)
        if seq.adapter:
            self._residency.slots.acquire(seq.adapter, now)
        answer.holds = True
        self._arena.open(seq.id, seq.virtual + seq.prompt, seq.most_positions)
        stored = self._stored_prefix(answer)
        if stored is not None:
            donor, tokens = stored
            self._arena.copy(donor, seq.id, seq.virtual + tokens)
            seq.stored = seq.cached = tokens
        return "enter"

    def foresee(self, sequences: Sequence[Seq], now: float) -> None:
        """Start to read the adapters of those who wait next, in room that nobody before them needs."""
        needed: set[str] = set()
        for seq in sequences:
            if seq.adapter and seq.adapter not in needed:
                if self._residency.want(self._answers[seq.id].ticket.recipe, now, needed) == "available":
                    return
                needed.add(seq.adapter)

    def leave(self, answer: Answer, now: float, *, keep: bool) -> None:
        """Give back what `enter` took. With `keep` the contents stay for reuse, if there is room."""
        if not answer.holds:
            return
        answer.holds = False
        seq = answer.seq
        positions = seq.virtual + seq.stored
        room = self._arena.remains(seq.id, positions)
        if self._book.end(seq.id, room, keep=keep and self._identity is not None):
            self._arena.keep(seq.id, positions)
        else:
            self._arena.close(seq.id)
        if seq.adapter:
            self._residency.slots.release(seq.adapter, now)

    def note(self, answer: Answer) -> None:
        """More of the sequence has been stored: others may start from it."""
        if answer.chain is not None:
            self._book.wrote(answer.seq.id, answer.chain.extend(answer.seq.tokens, answer.seq.stored))

    def grown(self, answer: Answer) -> None:
        """The sequence has a token more. Where it has just become a long one, nothing that is stored fits: it is read anew."""
        seq = answer.seq
        if seq.positions - 1 <= self._turn < seq.positions:
            seq.stored, answer.chain = 0, self._chain(seq)
            self._book.rewrite(seq.id)
            self._arena.close(seq.id)
            self._arena.open(seq.id, seq.positions, seq.most_positions)

    def forget(self, adapter: str) -> None:
        """Let nobody start from what sequences of this adapter have stored up to now."""
        if adapter:
            self._arena.close_all(self._book.forget(adapter))

    def _adapter_ready(self, answer: Answer, now: float) -> Verdict:
        recipe, slots = answer.ticket.recipe, self._residency.slots
        state = self._residency.want(recipe, now)
        if not answer.asked:
            answer.asked = True
            slots.counters.hits += state == "resident"
            slots.counters.misses += state != "resident"
        if state == "resident":
            return "enter"
        if state == "failed":
            names = ", ".join(found.name for found, _ in recipe.parts)
            reason = slots.slot(recipe.key).reason
            self.refused.append((answer, FormatError(f"adapter {names} can't be used: {reason}")))
        if state != "available":
            return "later"
        hopeless = slots.hopeless(recipe.key)
        if hopeless is None:
            return "full"
        self.refused.append((answer, hopeless))
        return "later"

    def _fit(self, answer: Answer) -> None:
        seq = answer.seq
        if seq.adapter:
            resident = self._residency.payload(seq.adapter)
            seq.virtual = resident.virtual
            seq.switch = switch_at(seq.tokens, resident.invocation)
            answer.digest = resident.digest
        open_ended = answer.ticket.limit is None
        if open_ended:
            room = whole_capacity(self._book.budget // self._book.position)
            seq.limit = min(seq.limit, max(1, room - seq.virtual - seq.prompt + 1))
        over = seq.virtual + seq.prompt + seq.limit - self._context
        if over > 0 and open_ended and over < seq.limit:
            seq.limit -= over
        elif over > 0:
            raise ResourceError(
                f"prompt, answer and the adapter's {seq.virtual} rows need {self._context + over:,} positions; "
                f"this base has {self._context:,}",
                help="ask for a shorter answer (max_tokens)",
            )
        self._book.check(capacity(seq.most_positions))

    def _stored_prefix(self, answer: Answer) -> tuple[int, int] | None:
        """Who holds the longest prefix of this prompt, and how many tokens of it. At least one token is left to read."""
        seq = answer.seq
        answer.chain = answer.chain or self._chain(seq)
        if answer.chain is None:
            return None
        hit = self._book.find(answer.chain.extend(seq.tokens, seq.prompt - 1))
        return None if hit is None else (hit[0], hit[1] * BLOCK)

    def _chain(self, seq: Seq) -> Chain | None:
        if self._identity is None:
            return None
        long = "|long" if seq.positions > self._turn else ""
        return Chain(self._identity + long, seq.adapter, seq.switch)
