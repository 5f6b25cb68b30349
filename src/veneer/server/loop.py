"""The thread that steps the engine, and the way to it from an event loop.

Everything that touches the engine runs on this thread, between two steps. Events go back in one call per step, so sixty-four
streams cost one wake-up of the event loop and not sixty-four.

The surprise: an error that nobody foresaw ends the requests in flight and not the thread. Each of them is told, the log has
the traceback, and the next request finds a working engine.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

import torch

from veneer.engine import Delta, Engine, Event, Failed, Finished
from veneer.engine.intake import Ticket
from veneer.engine.scheduler import StepReport
from veneer.errors import Stopping, VeneerError

T = TypeVar("T")
log = logging.getLogger(__name__)


class Watch(Protocol):
    """Whoever measures. Called on the engine's thread."""

    def stepped(self, report: StepReport) -> None: ...

    def gap(self, seconds: float) -> None: ...


class EngineLoop:
    """Owns an engine from `start` to `stop`."""

    def __init__(self, engine: Engine, watch: Watch) -> None:
        self._engine = engine
        self._watch = watch
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._stopping, self._ending = threading.Event(), threading.Event()
        self._gate, self._over = threading.Lock(), False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="veneer-engine", daemon=True)
        engine.on_loaded = self._wake

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def accepting(self) -> bool:
        """New requests are taken."""
        return self.alive and not self._stopping.is_set()

    def start(self) -> None:
        self._thread.start()

    def refuse_new(self) -> None:
        """From now on new requests are turned away; those in flight go on, and `call` is answered until `stop`."""
        self._stopping.set()
        self._wake()

    def stop(self, drain: float) -> None:
        """Finish what runs, for at most `drain` seconds, cancel the rest, and end the thread."""
        self._stopping.set()
        self._ending.set()
        self._wake()
        self._thread.join(drain)
        self._commands.put(self._cancel_all)
        self._thread.join()
        self._engine.close()

    async def submit(self, ticket: Ticket) -> Stream:
        """Queue a request; the stream of its events. Busy while the server stops or too many wait."""
        if not self.accepting:
            raise Stopping("the server is shutting down", retry_after=5.0)
        stream = Stream(ticket, asyncio.get_running_loop(), self)
        try:
            await self.call(lambda: self._begin(stream))
        except asyncio.CancelledError:
            self.cancel(stream)
            raise
        return stream

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread, between two steps. Stopping where that has ended."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # handed to whoever awaits it
                    future.set_exception(error)

        with self._gate:
            if self._over:
                raise Stopping("the engine has stopped")
            self._commands.put(run)
        return await asyncio.wrap_future(future)

    def cancel(self, stream: Stream) -> None:
        """The client has gone: free what it held. From any thread; a stream that has ended is left alone."""
        self._commands.put(lambda: self._drop(stream))

    # -- on the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while not self._at_its_end():
            self._obey(wait=not self._engine.busy or self._waits_for_a_load())
            if self._engine.busy:
                self._step()
            else:
                self._guarded(self._engine.publish)

    def _at_its_end(self) -> bool:
        """Told to end and nothing left to do. From then on no command is taken."""
        with self._gate:
            self._over = self._ending.is_set() and self._commands.empty() and not self._engine.busy
            return self._over

    def _obey(self, *, wait: bool) -> None:
        """Run the commands that are there; where there is nothing else to do, sleep until one comes."""
        try:
            command = self._commands.get(timeout=1.0) if wait else self._commands.get_nowait()
            while True:
                self._guarded(command)
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    @staticmethod
    def _guarded(command: Callable[[], None]) -> None:
        """A defect in a command must not end the thread."""
        try:
            command()
        except Exception:  # the log has it, and the next command finds a working thread
            log.exception("a command to the engine failed")

    def _waits_for_a_load(self) -> bool:
        return bool(self._engine.loading) and not self._engine.scheduler.running

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:  # a defect must end requests, not the server
            log.exception("a step failed")
            events = self._fail_all(error)
        if self._engine.last_step is not None:
            self._watch.stepped(self._engine.last_step)
        self._deliver(events)

    def _begin(self, stream: Stream) -> None:
        stream.id = self._engine.submit(stream.ticket)
        self._streams[stream.id] = stream

    def _drop(self, stream: Stream) -> None:
        if stream.id in self._streams:
            self._deliver(self._engine.cancel(stream.id))

    def _cancel_all(self) -> None:
        for stream in list(self._streams.values()):
            self._drop(stream)

    def _fail_all(self, error: Exception) -> list[Event]:
        events: list[Event] = []
        for id, stream in list(self._streams.items()):
            self._engine.cancel(id)
            reason = VeneerError(f"the step that computed this request failed: {type(error).__name__}")
            events += [Failed(id, choice, reason) for choice in range(stream.ticket.request.n)]
        return events

    def _deliver(self, events: Sequence[Event]) -> None:
        now = time.monotonic()
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event]]] = {}
        for event in events:
            stream = self._streams.get(event.id)
            if stream is None:
                continue
            by_loop.setdefault(stream.loop, []).append((stream, event))
            if isinstance(event, Delta):
                before = stream.heard.get(event.choice)
                stream.heard[event.choice] = now
                if before is not None:
                    self._watch.gap(now - before)
            if isinstance(event, Finished | Failed):
                stream.left -= 1
                if stream.left == 0:
                    del self._streams[event.id]
        for loop, batch in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, batch)

    def _wake(self) -> None:
        self._commands.put(lambda: None)


class Stream:
    """The events of one request, for one event loop. Leaving it before the end cancels the request.

    finished   answers that have ended, in whatever way but failure; those of a request that was left have what it took
    unended    answers that have not
    on_end     called on the event loop when the last one has ended
    """

    def __init__(self, ticket: Ticket, loop: asyncio.AbstractEventLoop, owner: EngineLoop) -> None:
        self.ticket = ticket
        self.loop = loop
        self.id = ""
        self.left = self.unended = ticket.request.n
        self.heard: dict[int, float] = {}
        self.finished: list[Finished] = []
        self.on_end: Callable[[], None] | None = None
        self._owner = owner
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        self._events.put_nowait(event)
        if isinstance(event, Finished):
            self.finished.append(event)
        if isinstance(event, Finished | Failed):
            self.unended -= 1
            if self.unended == 0 and self.on_end is not None:
                self.on_end()

    async def next(self) -> Event:
        """The next event."""
        return await self._events.get()

    def cancel(self) -> None:
        """Nobody listens any more."""
        self._owner.cancel(self)


def _put(batch: list[tuple[Stream, Event]]) -> None:
    for stream, event in batch:
        stream.put(event)
