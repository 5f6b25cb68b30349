"""The engine: requests with any adapters go in, events come out, one step at a time.

    engine = Engine(base)
    engine.add("tickets", adapter)
    for event in engine.generate([Request("Hello", adapter="tickets"), Request("Hello")]): ...

A step lets waiting sequences in, runs the tokens of all that run through the decoder at once, and chooses their next
tokens. Adapters are loaded on a worker thread and become visible between steps, as one reference; nothing that runs is
ever written to.

The surprise: there are no locks. `read` and `resolve` may be called from any thread; everything else belongs to the
one thread that steps.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import psutil

from veneer.adapter import Adapter
from veneer.engine.admission import Admission
from veneer.engine.answer import Answer
from veneer.engine.arena import capacity
from veneer.engine.dense import servable
from veneer.engine.hot import Heat, Hot
from veneer.engine.intake import Intake, Ticket, speller_of
from veneer.engine.kvcache import KVBook
from veneer.engine.request import Event, Failed, Finished, FinishReason, Request
from veneer.engine.residency import Residency
from veneer.engine.runner import Runner, Scores
from veneer.engine.sampling import Chooser
from veneer.engine.scheduler import Limits, Scheduler, Seq, StepReport
from veneer.engine.slots import State
from veneer.engine.source import AdapterSource, Recipe
from veneer.engine.text import TextStream
from veneer.errors import Busy, Conflict, FormatError, Unsupported, VeneerError
from veneer.models.base import Base


class Engine:
    """Continuous batching over one base. A 4-bit base is dequantised once: `dequantised_bytes` says what that takes.

    source         where adapter names are looked up that were not added here (the library, in the server)
    limits         streams, adapters and tokens per step
    kv_bytes       budget for keys and values; a quarter of the free memory where None
    adapter_bytes  budget for adapters in memory; the same
    reproducible   every sequence computed alone: an answer does not depend on what else runs. Slower, no prefix reuse
    clock          seconds, only ever compared
    """

    def __init__(
        self,
        base: Base,
        *,
        source: AdapterSource | None = None,
        limits: Limits | None = None,
        kv_bytes: int | None = None,
        adapter_bytes: int | None = None,
        reproducible: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base = base
        self.limits = Limits() if limits is None else limits
        self._clock = clock
        free = psutil.virtual_memory().available // 4
        if reproducible:
            self.limits = replace(self.limits, fixed=self.limits.fixed or 256)
        self._reproducible = reproducible
        decoder, self.dequantised_bytes = servable(base)
        self._runner = Runner(decoder, alone=reproducible)
        self.book = KVBook(free if kv_bytes is None else kv_bytes, self._runner.arena.position_bytes)
        self.residency = Residency(base, source, free if adapter_bytes is None else adapter_bytes)
        self._hot = Hot(base, decoder, self.residency.slots)
        config = base.config
        self._answers: dict[int, Answer] = {}
        self._admission = Admission(
            None if reproducible else f"{base.identity}|{base.decoder.dtype}",
            config.max_positions,
            decoder.turn,
            self.book,
            self._runner.arena,
            self.residency,
            self._answers,
        )
        self.scheduler = Scheduler(self.limits, self._admission)
        self._intake = Intake(base.tokenizer, config.vocab, config.max_positions, self.residency.resolve)
        self._spell = speller_of(base.tokenizer)
        self._decode: Callable[[Sequence[int]], str] = _no_text if base.tokenizer is None else base.tokenizer.decode
        self._requests: dict[str, list[Answer]] = {}
        self._deadlines: dict[str, float] = {}
        self._numbers = itertools.count()
        self.last_step: StepReport | None = None

    @property
    def sketch_bytes(self) -> int:
        """What finding the likeliest token takes beside the base: half of a bf16 head, once somebody decodes greedily."""
        return self._runner.decoder.sketch_bytes

    # -- adapters ------------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        adapter: Adapter,
        *,
        replace: bool = False,
        pin: bool = False,
        allow_base_mismatch: str | None = None,
    ) -> str:
        """Make `adapter` available under `name`; its digest. It is checked and packed at once, so what can't run is refused.

        With `replace` the name moves to the new adapter; sequences that run keep the one they started with.
        """
        now, allow = self._clock(), allow_base_mismatch
        return self.residency.add(name, adapter, now, replace=replace, pin=pin, allow=allow)

    def remove(self, name: str) -> int:
        """Forget an adapter that was added, and free its memory as soon as nobody uses it. Bytes freed at once."""
        return self.unload(self.residency.local.remove(name).digest)

    def load(self, name: str, *, pin: bool = False) -> State:
        """Begin to load an adapter before somebody asks for it; its state now. `residency.slots` tells the end.

        "available" means that those in use leave no room now; ResourceError, that those pinned never will.
        """
        recipe = Recipe.of([(self.residency.resolve(name), 1.0)])
        state = self.residency.want(recipe, self._clock())
        hopeless = self.residency.slots.hopeless(recipe.key) if state == "available" else None
        if hopeless is not None:
            raise hopeless
        if pin:
            self.residency.slots.pin(recipe.key)
        return state

    def unload(self, digest: str, *, deadline: float | None = None) -> int:
        """Free an adapter, and sums that hold it, once nobody uses them; bytes freed at once. Its name stays known.

        Answers that still use it after `deadline` seconds fail; without one they have all the time they need.
        """
        freed = self.cool() if self._hot.adapter == digest else 0
        freed += self.residency.unload(digest)
        if deadline is not None:
            self._deadlines[digest] = self._clock() + deadline
        self._runner.forget_bank()
        return freed

    # -- one adapter merged beside the base ----------------------------------------------------------------------------

    @property
    def hot(self) -> Heat:
        """The adapter that is merged beside the base, what it costs, and how far that is."""
        return self._hot.heat

    def heat(self, name: str) -> Heat:
        """Begin to merge an adapter into a second set of tensors beside the base; `hot` tells the end.

        From then on, steps with nobody else in them run at the speed of the bare base; all others are served as before. One
        adapter at a time (Conflict). What can't be merged fails with its reason.
        """
        if self._reproducible:
            raise Unsupported("in the reproducible mode nothing is merged: answers would depend on when it was done")
        return self._hot.start(self.residency.resolve(name), self._clock())

    def cool(self) -> int:
        """Drop the merged set; its bytes. The next step runs on the base, whose checksum is verified in the background."""
        digest = self._hot.adapter
        freed = self._hot.drop()
        self._admission.forget(digest)
        return freed

    # -- requests ------------------------------------------------------------------------------------------------------

    def read(self, request: Request) -> Ticket:
        """Check a request, tokenise its prompt, look up its adapters. May be called from any thread."""
        return self._intake.read(request)

    def submit(self, request: Request | Ticket) -> str:
        """Queue a request; its id. Busy when too many wait."""
        ticket = request if isinstance(request, Ticket) else self.read(request)
        asked = ticket.request
        waiting = len(self.scheduler.waiting)
        if waiting + asked.n > self.limits.waiting:
            raise Busy(f"{waiting} sequences are waiting already")
        id = asked.id if asked.id is not None else f"request-{next(self._numbers)}"
        if id in self._requests:
            raise Conflict(f"a request called '{id}' is in flight")
        limit = ticket.most(self.limits.answer, self.base.config.max_positions)
        self.book.check(capacity(len(ticket.tokens) + (ticket.limit or 1) - 1))
        now = self._clock()
        leader: Seq | None = None
        self._requests[id] = []
        for choice in range(asked.n):
            answer = self._answer(id, ticket, choice, limit, leader, now)
            leader = leader or answer.seq
            self._requests[id].append(answer)
            self._answers[answer.seq.id] = answer
            self.scheduler.add(answer.seq)
        return id

    def cancel(self, id: str, reason: FinishReason = "cancelled") -> list[Event]:
        """End a request now; the events of what it had. Unknown ids have ended already."""
        now = self._clock()
        events: list[Event] = []
        for answer in list(self._requests.get(id, ())):
            self._release(answer, now)
            events += answer.cut(reason, now)
        return events

    @property
    def busy(self) -> bool:
        """Something is running or waiting."""
        return bool(self._answers)

    @property
    def loading(self) -> int:
        """Adapters that are being loaded now."""
        return self.residency.loading

    @property
    def on_loaded(self) -> Callable[[], None] | None:
        """Called on a worker thread when something waits to be published, so that a sleeper can wake up."""
        return self.residency.on_loaded

    @on_loaded.setter
    def on_loaded(self, wake: Callable[[], None] | None) -> None:
        self.residency.on_loaded = self._hot.on_change = wake

    def publish(self) -> None:
        """Make adapters visible whose loading or merging has ended. `step` does this too; an idle engine has to be told."""
        now = self._clock()
        self.residency.publish(now)
        self._hot.publish(now)

    def wait(self, timeout: float | None = None) -> None:
        """Until an adapter has been loaded: the thing to do when `step` gave nothing."""
        self.residency.wait(timeout)

    def settle(self) -> Heat:
        """Wait until nothing is being merged or checked, and publish it."""
        while self._hot.working:
            self._hot.wait()
            self._hot.publish(self._clock())
        return self.hot

    def generate(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Run requests to their end.

        Events name their request by `id`: the request's own, or "0", "1", ... by position.
        """
        todo = (
            _named(self.read(request), request.id if request.id is not None else str(position))
            for position, request in enumerate(requests)
        )
        mine: set[str] = set()
        held: deque[Ticket] = deque()
        try:
            while self._feed(todo, held, mine):
                events = self.step()
                if not events and self.last_step is None and self.loading:
                    self.wait(1.0)
                yield from events
        finally:
            for id in mine:
                self.cancel(id)

    def complete(self, requests: Iterable[Request]) -> list[list[Finished]]:
        """The finished answers of each request, by choice. A request that fails raises its error."""
        if self._requests:
            raise Conflict(
                "others are in flight, and their events would be lost", help="use generate, or submit and step"
            )
        requests = list(requests)
        names = [r.id if r.id is not None else str(i) for i, r in enumerate(requests)]
        found: dict[str, dict[int, Finished]] = {name: {} for name in names}
        for event in self.generate(requests):
            if isinstance(event, Failed):
                for name in names:
                    self.cancel(name)
                raise event.error
            if isinstance(event, Finished):
                found[event.id][event.choice] = event
        return [[choices[c] for c in sorted(choices)] for choices in found.values()]

    def close(self) -> None:
        """Stop the loading threads."""
        self.residency.close()
        self._hot.close()

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One turn: publish loaded adapters, let sequences in, run them, choose tokens.

        `last_step` is None if nothing ran.
        """
        self.publish()
        events = self._expire()
        step = self.scheduler.plan(self._clock())
        events += self._fail_refused()
        self.last_step = None
        if not step:
            return events
        start = time.perf_counter()
        residents = {key: self.residency.payload(key) for key in {seq.adapter for seq in step.seqs if seq.adapter}}
        merged = bool(self._hot.adapter) and residents.keys() == {self._hot.adapter}
        merged = merged and all(seq.adapter for seq in step.seqs)
        if not step.prefill:
            self.scheduler.foresee(self._clock())
        greedy = not step.prefill and all(self._answers[seq.id].chooser.greedy for seq in step.decode)
        scores = self._runner.run(step, residents, self._hot.merged if merged else None, greedy=greedy)
        if step.prefill:  # a pass with prompts is not one call, and a load that runs beside it takes its turns from it
            self.scheduler.foresee(self._clock())
        for seq in step.seqs:
            self._admission.note(self._answers[seq.id])
        for batch in scores:
            events += self._advance(batch)
        seconds = time.perf_counter() - start
        prefilled = step.tokens - len(step.decode)
        self.scheduler.pace.observe(prefilled, seconds)
        self.last_step = StepReport(len(step.decode), prefilled, len(residents), seconds, merged)
        return events

    # -- its parts -----------------------------------------------------------------------------------------------------

    def _feed(self, todo: Iterator[Ticket], held: deque[Ticket], mine: set[str]) -> bool:
        """Submit as many of `todo` as may wait. False when none is left, here or in flight."""
        while True:
            if not held:
                held.extend(itertools.islice(todo, 1))
            waiting = len(self.scheduler.waiting)
            if not held or (waiting and waiting + held[0].request.n > self.limits.waiting):
                break
            mine.add(self.submit(held.popleft()))
        mine &= self._requests.keys()
        return bool(mine or held)

    def _answer(self, id: str, ticket: Ticket, choice: int, limit: int, leader: Seq | None, now: float) -> Answer:
        asked = ticket.request
        seq = Seq(
            id=next(self._numbers),
            request=id,
            choice=choice,
            tokens=list(ticket.tokens),
            prompt=len(ticket.tokens),
            limit=limit,
            adapter=ticket.recipe.key,
            arrived=now,
            after=leader,
        )
        chooser = Chooser(
            asked.sampling,
            ticket.tokens,
            choice,
            asked.min_tokens,
            tuple(sorted(ticket.ending)),
            None if ticket.matcher is None else ticket.matcher.copy(),
            asked.logprobs,
        )
        return Answer(id, seq, ticket, chooser, TextStream(self._decode, asked.stop, include_stop=asked.include_stop))

    def _advance(self, scores: Scores) -> Iterator[Event]:
        answers = [self._answers[seq.id] for seq in scores.seqs]
        chosen = scores.choose([a.chooser for a in answers], self._spell)
        now = self._clock()
        for answer, choice in zip(answers, chosen, strict=True):
            if choice.broken:
                who = answer.digest[:12] or "the base"
                yield self._fail(answer, FormatError(f"adapter {who} gave scores that are not finite"), now)
                continue
            if choice.refusal is not None:
                yield self._fail(answer, choice.refusal, now)
                continue
            events, reason = answer.take(choice, now)
            yield from events
            if reason is None:
                self._admission.grown(answer)
            else:
                self._release(answer, now)
                yield answer.finished(reason, now)

    def _expire(self) -> list[Event]:
        now = self._clock()
        late = [
            id
            for id, answers in self._requests.items()
            if answers and _overdue(answers[0].ticket.request.timeout, answers[0].seq.arrived, now)
        ]
        return [event for id in late for event in self.cancel(id, "timeout")] + self._fail_unloaded(now)

    def _fail_unloaded(self, now: float) -> list[Event]:
        """Answers of adapters that had to go by now."""
        gone = {digest for digest, when in self._deadlines.items() if now >= when}
        if not gone:
            return []
        for digest in gone:
            del self._deadlines[digest]
        held = (slot for digest in gone for slot in self.residency.slots.holding(digest))
        gone = {slot.key for slot in held if slot.state == "draining"}  # not one that came back meanwhile
        left = [a for a in self._answers.values() if a.holds and a.seq.adapter in gone]
        error = Conflict(
            "the adapter was unloaded before this answer was finished", help="ask again: it is loaded anew"
        )
        return [self._fail(answer, error, now) for answer in left]

    def _fail_refused(self) -> Iterator[Event]:
        refused, self._admission.refused = self._admission.refused, []
        now = self._clock()
        for answer, error in refused:
            yield self._fail(answer, error, now)

    def _fail(self, answer: Answer, error: VeneerError, now: float) -> Failed:
        self._release(answer, now, keep=False)
        return answer.failed(error)

    def _release(self, answer: Answer, now: float, *, keep: bool = True) -> None:
        """The answer is over: give back its place, its bytes and its use of the adapter. Exactly once."""
        seq = answer.seq
        del self._answers[seq.id]
        others = self._requests[answer.id]
        others.remove(answer)
        if not others:
            del self._requests[answer.id]
        self.scheduler.remove(seq)
        self._admission.leave(answer, now, keep=keep)


def _overdue(timeout: float | None, since: float, now: float) -> bool:
    return timeout is not None and now - since >= timeout


def _named(ticket: Ticket, id: str) -> Ticket:
    return replace(ticket, request=replace(ticket.request, id=id))


def _no_text(ids: Sequence[int]) -> str:
    return ""
