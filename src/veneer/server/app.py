"""The application: routes, the guard in front of them, and errors as OpenAI writes them."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer import __version__
from veneer.errors import Busy, Denied, VeneerError, complaints
from veneer.server import admin, bodies, openai
from veneer.server.answers import ERRORS, Health, Readiness, told, told_text
from veneer.server.keys import require
from veneer.server.service import Service

log = logging.getLogger(__name__)
OPEN = frozenset({"/health", "/ready"})
"""Paths that need no key: what a supervisor asks."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def create_app(service: Service) -> FastAPI:
    """The application around a service. Starting it starts the engine's thread, stopping it drains the streams."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.loop.start()
        yield
        service.loop.stop(service.settings.drain)

    app = FastAPI(
        title="veneer", version=__version__, lifespan=life, docs_url="/docs", redoc_url=None, responses=ERRORS
    )
    app.state.service = service
    app.include_router(openai.router)
    app.include_router(admin.router)
    app.add_api_route("/health", health, tags=["operations"], **told(Health, unready=Health))
    app.add_api_route("/ready", ready, tags=["operations"], **told(Readiness, unready=Readiness))
    app.add_api_route("/metrics", metrics, tags=["operations"], **told_text("text/plain"))
    app.add_exception_handler(VeneerError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _unforeseen)
    app.add_middleware(Guard, service=service)
    return app


async def health(request: Request) -> Response:
    """Whether the server lives: 200 as long as its engine does."""
    alive = openai.service_of(request).loop.alive
    return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)


async def ready(request: Request) -> Response:
    """Whether to send requests here: not while it starts or stops."""
    service = openai.service_of(request)
    accepting = service.loop.accepting
    body = {
        "status": "ready" if accepting else "stopping",
        "base": service.base.name,
        "identity": service.base.identity,
    }
    return JSONResponse(body, 200 if accepting else 503)


async def metrics(request: Request) -> Response:
    """Prometheus's exposition format."""
    service = openai.service_of(request)
    if not service.keyring.open:
        require(openai.key_of(request), "read")
    stock = await asyncio.to_thread(service.shelf.stock)
    now = await service.loop.call(lambda: service.snapshot(stock))
    return Response(service.metrics.text(now), media_type="text/plain; version=0.0.4; charset=utf-8")


class Guard:
    """In front of every route: a request id, the key, and the size of the body, before anything is read."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.monotonic()
        given = headers.get("x-request-id", "")
        id = given if _ID.fullmatch(given) else secrets.token_hex(12)
        scope.setdefault("state", {})["id"] = id

        async def answering(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = MutableHeaders(scope=message)
                named["x-request-id"] = id
                log.debug(
                    "%s %s %s %.3fs", scope["method"], scope["path"], message["status"], time.monotonic() - started
                )
            await send(message)

        try:
            if scope["path"] not in OPEN:
                scope["state"]["key"] = self._service.keyring.recognise(headers.get("authorization"))
            await self._app(scope, _limited(receive, headers, self._service.settings.max_body), answering)
        except Denied as error:
            await _ours_response(error)(scope, receive, answering)


def _limited(receive: Receive, headers: Headers, most: int) -> Receive:
    """`receive` that stops at `most` bytes, whatever the headers say."""
    told = headers.get("content-length", "0")
    read = 0

    async def limited() -> Message:
        nonlocal read
        if told.isdigit() and int(told) > most:
            raise HTTPException(413, f"the request has {int(told):,} bytes; this server reads {most:,}")
        message = await receive()
        read += len(message.get("body", b""))
        if read > most:
            raise HTTPException(413, f"the request has more than the {most:,} bytes that this server reads")
        return message

    return limited


def _ours_response(error: VeneerError) -> JSONResponse:
    headers = {}
    if isinstance(error, Busy):
        headers["retry-after"] = str(max(1, round(error.retry_after + 0.5)))
    if isinstance(error, Denied) and not error.known:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(bodies.body_of(error), bodies.status_of(error)[0], headers)


async def _ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, VeneerError)
    return _ours_response(error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = complaints([item | {"loc": [step for step in item["loc"] if step != "body"]} for item in error.errors()])
    kind = request.headers.get("content-type", "")
    if "json" not in kind and int(request.headers.get("content-length", "0") or 0):
        came = f"as {kind[:60]}" if kind else "without a content-type"
        problems = [f"the body has to be JSON, sent with content-type: application/json; it came {came}"]
    first = error.errors()[0]["loc"]
    param = str(first[1]) if len(first) > 1 else None
    return JSONResponse(bodies.error_body("; ".join(problems), "invalid_request_error", param=param), 400)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    code = "request_too_large" if error.status_code == 413 else None
    return JSONResponse(bodies.error_body(str(error.detail), kind, code=code), error.status_code, error.headers)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _unforeseen(request: Request, error: Exception) -> Response:
    log.error("request %s failed", getattr(request.state, "id", "?"), exc_info=error)
    return JSONResponse(bodies.error_body("an internal error; the log has the details", "server_error"), 500)
