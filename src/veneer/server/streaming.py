"""Answers to a client that may go away at any moment: whole, or as server-sent events.

The client's going is noticed while nothing is being sent, too: somebody always listens to the connection. The first
event is awaited before the status line is sent, so that an adapter that can't be loaded is a proper HTTP error,
streaming or not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from veneer.engine import Event, Failed, Finished
from veneer.server.loop import Stream

T = TypeVar("T")


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, or ClientDisconnect as soon as the client has gone; the work is cancelled then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(streams: Sequence[Stream]) -> list[Finished]:
    """All answers of all streams, by prompt and choice. The first failure is raised."""
    found: list[Finished] = []
    for stream in streams:
        choices: dict[int, Finished] = {}
        while len(choices) < stream.ticket.request.n:
            event = await stream.next()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                choices[event.choice] = event
        found += [choices[choice] for choice in sorted(choices)]
    return found


async def merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Event]]:
    """Events of several streams as they come, each with its stream's place."""
    waiting = {asyncio.ensure_future(stream.next()): place for place, stream in enumerate(streams)}
    left = [stream.ticket.request.n for stream in streams]
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place, event = waiting.pop(task), task.result()
                yield place, event
                left[place] -= isinstance(event, Finished | Failed)
                if left[place]:
                    waiting[asyncio.ensure_future(streams[place].next())] = place
    finally:
        for task in waiting:
            task.cancel()


class EventStream(Response):
    """Server-sent events.

    `lines` gives JSON values; `ended` is called once, with True if the client stayed to the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self, lines: AsyncIterator[Mapping[str, Any]], ended: Callable[[bool], None], headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._lines, self._ended = lines, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stayed = sending.done() and not sending.cancelled() and sending.exception() is None
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            self._ended(stayed)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._lines:
            await self._write(send, json.dumps(line, ensure_ascii=False))
        await self._write(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def _write(send: Send, text: str) -> None:
        await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})
