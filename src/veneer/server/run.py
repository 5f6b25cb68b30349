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
    # What exists now stays. Without this the collector walks all of torch's objects now and then: 90 ms between two tokens.
    gc.freeze()
    _Server(config, service).run()
