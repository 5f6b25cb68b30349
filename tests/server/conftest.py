"""One real server on a loopback port, over a small base, a library and an adapter of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from tests.engine.small import lora, small_base, with_tokenizer
from veneer.engine import Engine
from veneer.library import Library
from veneer.models.base import Base
from veneer.server.app import create_app
from veneer.server.keys import Key, Keyring, hashed
from veneer.server.metrics import Metrics
from veneer.server.service import Service
from veneer.server.settings import Settings
from veneer.server.shelf import Shelf

MB = 1 << 20


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    service: Service
    base: Base
    library: Library
    server: uvicorn.Server
    thread: threading.Thread
    clients: list[httpx.Client] = field(default_factory=list)

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=30)
        self.clients.append(client)
        return client

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def start(
    folder: Path, *, keys: tuple[Key, ...] = (), engine: dict[str, Any] | None = None, **settings: Any
) -> Running:
    base = with_tokenizer(small_base())
    library = Library(folder / "library")
    for name, seeds in (("tickets", (1, 2)), ("legal", (3,))):
        for seed in seeds:
            library.add(lora(base, seed), name)
    shelf = Shelf(library)
    running = Engine(base, source=shelf, **{"kv_bytes": 64 * MB, "adapter_bytes": 64 * MB, **(engine or {})})
    running.add("local", lora(base, 9))
    made = Settings(keys=bool(keys), **settings)
    service = Service(base, running, shelf, Keyring(keys), made, Metrics(made.named_adapters))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(create_app(service), host="127.0.0.1", port=port, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(500):
        if server.started:
            break
        time.sleep(0.02)
    assert server.started
    return Running(f"http://127.0.0.1:{port}", service, base, library, server, thread)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    server = start(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


ALICE, ADMIN, TIGHT, EDITOR = "vn-alice", "vn-admin", "vn-tight", "vn-editor"
KEYS = (
    Key(name="alice", sha256=hashed(ALICE), adapters=("tickets", "leg*")),
    Key(name="editor", sha256=hashed(EDITOR), adapters=("tickets",), admin=frozenset({"alias"})),
    Key(name="admin", sha256=hashed(ADMIN), adapters=("*", "base"), admin=frozenset({"read", "load", "alias"})),
    Key(name="tight", sha256=hashed(TIGHT), requests_per_minute=2, concurrent=1),
)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    server = start(tmp_path_factory.mktemp("guarded"), keys=KEYS, max_body=20_000)
    yield server
    server.stop()


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether `condition` becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()
