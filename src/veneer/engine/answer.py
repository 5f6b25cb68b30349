"""One answer in flight: its tokens become text, and it knows when it is over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from veneer.engine.intake import Ticket
from veneer.engine.kvcache import Chain
from veneer.engine.request import Delta, Event, Failed, Finished, FinishReason, Timing, TokenLogprob, Usage
from veneer.engine.sampling import Chooser, Chosen
from veneer.engine.scheduler import Seq
from veneer.engine.text import TextStream
from veneer.errors import VeneerError


@dataclass(eq=False)
class Answer:
    """What belongs to one sequence beside its place in the schedule.

    asked      its adapter has been asked for, so the hit or miss is counted
    holds      it holds a use of its adapter and room in the cache
    """

    id: str
    seq: Seq
    ticket: Ticket
    chooser: Chooser
    stream: TextStream
    chain: Chain | None = None
    digest: str = ""
    asked: bool = False
    holds: bool = False
    first_token: float | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    _unsent: list[int] = field(default_factory=list)
    _unsent_logprobs: list[TokenLogprob] = field(default_factory=list)
    stopped_by: str | int | None = None

    @property
    def choice(self) -> int:
        return self.seq.choice

    def take(self, chosen: Chosen, now: float) -> tuple[list[Event], FinishReason | None]:
        """One more token: what to tell, and the reason if this was the last."""
        if self.first_token is None:
            self.first_token = now
        self.seq.tokens.append(chosen.token)
        if chosen.token in self.ticket.ending:
            self.stopped_by = chosen.token
            return list(self._flush(self.stream.finish())), "stop"
        self._unsent.append(chosen.token)
        if chosen.logprob is not None:
            placed = replace(chosen.logprob, at=self.stream.length)
            self.logprobs.append(placed)
            self._unsent_logprobs.append(placed)
        text = self.stream.push(chosen.token, may_stop=self.seq.generated > self.ticket.request.min_tokens)
        reason = self._reason()
        if reason is not None:
            text += self.stream.finish()
            reason = self._reason()
        elif not text and not self._unsent_logprobs:
            return [], None
        return list(self._flush(text)), reason

    def finished(self, reason: FinishReason, now: float) -> Finished:
        """The last event of an answer that came to an end."""
        seq = self.seq
        entered = now if seq.entered is None else seq.entered
        first = now if self.first_token is None else self.first_token
        return Finished(
            id=self.id,
            choice=seq.choice,
            reason=reason,
            stop=self.stopped_by,
            text=self.stream.text,
            tokens=tuple(seq.tokens[seq.prompt :]),
            logprobs=tuple(self.logprobs),
            usage=Usage(seq.prompt, seq.cached, seq.generated),
            timing=Timing(entered - seq.arrived, first - seq.arrived, now - seq.arrived),
            adapter=self.digest,
        )

    def cut(self, reason: FinishReason, now: float) -> list[Event]:
        """The events of an answer that is cut off."""
        return [*self._flush(self.stream.finish()), self.finished(reason, now)]

    def failed(self, error: VeneerError) -> Failed:
        return Failed(self.id, self.seq.choice, error)

    def _reason(self) -> FinishReason | None:
        if self.stream.stopped is not None:
            self.stopped_by = self.stream.stopped
            return "stop"
        if self.chooser.matcher is not None and self.chooser.matcher.complete:
            return "stop"
        return "length" if self.seq.generated >= self.seq.limit else None

    def _flush(self, text: str) -> Iterator[Event]:
        if text or self._unsent_logprobs or self._unsent:
            yield Delta(self.id, self.seq.choice, text, tuple(self._unsent), tuple(self._unsent_logprobs))
        self._unsent.clear()
        self._unsent_logprobs.clear()
