"""Answer OpenAI clients over HTTP, any adapter per request.

The model field of a request names the base, an adapter of the library (name, name@version, name@alias), or an adapter given here.

    veneer serve --base smollm2-135m --library adapters
    veneer serve --base smollm2-135m --adapter tickets=runs/tickets --port 9000
    veneer serve --base smollm2-135m --library adapters --hot tickets   # merged beside the base
    veneer serve --new-key support-team        # prints a key, once, and its entry for --keys

Elsewhere than on this machine it listens only with --keys.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli._options import AdapterPaths, Json, load_adapters
from veneer.cli._output import note, say, say_json
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.server.service import Service


def command(
    base: Annotated[
        str, typer.Option("--base", metavar="BASE", help="A catalogue name, a folder, a .gguf file or a hub id.")
    ] = "",
    library: Annotated[
        str | None, typer.Option("--library", metavar="DIR-or-URL", help="Where adapters come from.")
    ] = None,
    adapter: AdapterPaths = [],  # noqa: B006
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    keys: Annotated[Path | None, typer.Option("--keys", help="A file with API keys.")] = None,
    new_key: Annotated[str | None, typer.Option("--new-key", metavar="NAME", help="Print a new key and stop.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bfloat16 or float32.")] = "auto",
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", help="bf12 (exact), int8: read as they lie. 4-bit formats: dequantised once."),
    ] = None,
    hot: Annotated[
        str | None, typer.Option("--hot", metavar="NAME", help="An adapter to merge beside the base.")
    ] = None,
    streams: Annotated[int, typer.Option("--streams", min=1, help="Answers computed at once.")] = 64,
    distinct: Annotated[int, typer.Option("--adapters", min=1, help="Distinct adapters computed at once.")] = 32,
    kv_memory: Annotated[float | None, typer.Option("--kv-memory", min=0.01, help="GB for keys and values.")] = None,
    adapter_memory: Annotated[float | None, typer.Option("--adapter-memory", min=0.01, help="GB for adapters.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of one answer.")] = 4096,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds for one answer.")] = 600.0,
    reproducible: Annotated[
        bool, typer.Option("--reproducible", help="Answers do not depend on what else runs; slower.")
    ] = False,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
    as_json: Json = False,
) -> None:
    from veneer.server.keys import Keyring, read_keys
    from veneer.server.keys import new_key as make_key
    from veneer.server.settings import Settings

    if new_key is not None:
        secret, entry = make_key(new_key)
        if as_json:
            say_json({"key": secret, "entry": entry.rstrip()})
            return
        note(f"the key, shown only now: {secret}")
        say(entry.rstrip())
        return
    if not base:
        raise ConfigError(
            "which base should be served?", help="--base smollm2-135m; `veneer bases` lists what there is"
        )
    settings = Settings(host=host, port=port, keys=keys is not None, max_tokens=max_tokens, timeout=timeout)
    keyring = Keyring(read_keys(keys)) if keys is not None else Keyring()

    from veneer.engine import Engine, Limits
    from veneer.library import Library
    from veneer.models.load import load_base
    from veneer.server import logs
    from veneer.server.metrics import Metrics
    from veneer.server.run import serve
    from veneer.server.service import Service
    from veneer.server.shelf import Shelf

    logs.set_up(log_level)
    given = load_adapters(adapter)
    shelf = Shelf(Library(library) if library is not None else None)
    if shelf.library is not None:
        shelf.library.list(limit=1)

    def ready() -> Engine:
        made = Engine(
            load_base(base, dtype=dtype, quantize=quantize),
            source=shelf,
            limits=Limits(streams=streams, adapters=distinct),
            kv_bytes=_bytes(kv_memory),
            adapter_bytes=_bytes(adapter_memory),
            reproducible=reproducible,
        )
        for name, value in given.items():
            made.add(name, value, pin=True)
        if hot is not None:
            made.heat(hot)
        return made

    # On a thread that ends, with the OpenMP threads it has started: two teams on two cores would slow each other's barriers down,
    # and the engine's thread needs one of its own.
    with ThreadPoolExecutor(1) as pool:
        engine = pool.submit(ready).result()
    loaded = engine.base
    service = Service(loaded, engine, shelf, keyring, settings, Metrics(settings.named_adapters))
    if as_json:
        say_json({"url": f"http://{host}:{port}/v1", "base": loaded.name, "identity": loaded.identity})
    note(_banner(service))
    serve(service)


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


def _banner(service: Service) -> str:
    settings, engine = service.settings, service.engine
    where = f"http://{settings.host}:{settings.port}"
    memory = f"{engine.book.budget / 1e9:.1f} GB for keys and values, {engine.residency.slots.budget / 1e9:.1f} GB for adapters"
    if engine.dequantised_bytes:
        memory += f"; {engine.dequantised_bytes / 1e9:.2f} GB for the dequantised {service.base.quantize} base"
    return f"{service.base.name} at {where}/v1 ({memory}); Ctrl+C finishes the streams and stops"
