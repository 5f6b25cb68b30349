"""Run a server until it is told to stop; then finish the streams, for a while, and leave."""

from __future__ import annotations

import gc

import uvicorn

from veneer.server.app import create_app
from veneer.server.service import Service


class _Server(uvicorn.Server):
    """Turns new requests away as soon as a signal comes, so that a busy server can come to its end."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: object) -> None:
        self._service.loop.refuse_new()
        super().handle_exit(sig, frame)  # type: ignore[arg-type]


def settle_collector() -> None:
    """Keep the garbage collector from standing between two tokens: 80 ms whenever it looks through all there is.

    What exists now stays, so it is not looked at again. Adapters come and go by thousands of objects, none of them in a cycle: at
    the usual pace all of those in memory would be looked through every dozen loads.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def serve(service: Service) -> None:
    """Listen until SIGINT or SIGTERM."""
    settings = service.settings
    config = uvicorn.Config(
        create_app(service),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain) + 5,
        timeout_keep_alive=30,
    )
    settle_collector()
    _Server(config, service).run()
