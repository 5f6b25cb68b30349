"""Admin routes under /admin, and vLLM's two routes for clients that know those. Names only, never a path.

An adapter's states: available (in the library), loading, resident, draining (unloaded, but streams still use it), failed(reason).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse

from veneer.engine import Use
from veneer.engine.hot import MERGED
from veneer.engine.slots import Slot
from veneer.errors import ConfigError, NotFound
from veneer.library import Library
from veneer.server import answers
from veneer.server.answers import told
from veneer.server.keys import LOCAL, Action, require, summary
from veneer.server.openai import key_of, service_of
from veneer.server.service import Service
from veneer.server.wire import Wire

router = APIRouter(tags=["admin"])


class Pin(Wire):
    pinned: bool = True


class Unload(Wire):
    deadline: float | None = Field(None, ge=0, description="Seconds after which answers that still use it fail")


class Move(Wire):
    """Point `alias` at `ref` (`name@version`)."""

    ref: str
    alias: str
    weight: float | None = Field(None, ge=0, le=1)
    reason: str = ""


class Back(Wire):
    name: str
    alias: str = "production"
    reason: str = ""


class VllmLoad(Wire):
    """vLLM's body. `lora_path` takes a library name where vLLM takes a path."""

    lora_name: str = Field(min_length=1)
    lora_path: str | None = None
    load_inplace: bool = False
    base_model_name: str | None = None


class VllmUnload(Wire):
    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None


@router.get("/admin/adapters", **told(answers.AdapterList))
async def adapters(request: Request) -> dict[str, Any]:
    """Every adapter the engine knows, with its state, uses and bytes, and the library's versions."""
    service = _allowed(request, "read")
    slots = await service.loop.call(lambda: {k: _facts(service, s) for k, s in _slots(service).items()})
    versions = await asyncio.to_thread(lambda: _library(service).list() if service.shelf.library else ())
    listed = [
        {
            **slots.get(v.digest, {"state": "available"}),
            "ref": v.ref,
            "digest": v.digest,
            "method": v.method,
            "rank": v.rank,
        }
        for v in versions
    ]
    shown = {v.digest for v in versions}
    return {"adapters": listed, "others": [facts for digest, facts in slots.items() if digest not in shown]}


@router.get("/admin/adapters/{ref}", **told(answers.AdapterFacts, unready=answers.AdapterFacts))
async def adapter(ref: str, request: Request) -> JSONResponse:
    """Readiness of one adapter: 200 while it is resident, 503 with its state otherwise."""
    service = _allowed(request, "read")
    facts = await _facts_of(service, ref)
    return JSONResponse(facts, 200 if facts["state"] == "resident" else 503)


@router.post("/admin/adapters/{ref}/load", **told(answers.Loading))
async def load(ref: str, request: Request, body: Pin | None = None) -> dict[str, Any]:
    """Begin to load an adapter before somebody asks for it. Poll its readiness for the end."""
    service = _allowed(request, "load")
    found = await asyncio.to_thread(service.asked, ref, [], None, key_of(request))
    pin = body is not None and body.pinned
    _one_adapter(ref, found.uses)
    state = await service.loop.call(lambda: service.engine.load(found.uses[0].name, pin=pin))
    return {"ref": found.uses[0].name, "digest": found.digests[0], "state": state}


@router.post("/admin/adapters/{ref}/unload", **told(answers.Unloaded))
async def unload(ref: str, request: Request, body: Unload | None = None) -> dict[str, Any]:
    """Free an adapter's memory as soon as no stream uses it. It stays in the library, and a request loads it again."""
    service = _allowed(request, "load")
    found = await asyncio.to_thread(service.asked, ref, [], None, key_of(request))
    _one_adapter(ref, found.uses)
    digest = found.digests[0]
    deadline = None if body is None else body.deadline
    freed = await service.loop.call(lambda: service.engine.unload(digest, deadline=deadline))
    states = await service.loop.call(service.engine.residency.slots.states)
    return {"ref": found.uses[0].name, "digest": digest, "state": states.get(digest, "available"), "freed_bytes": freed}


@router.post("/admin/adapters/{ref}/pin", **told(answers.AdapterFacts))
async def pin(ref: str, request: Request, body: Pin) -> dict[str, Any]:
    """Keep a known adapter in memory, or let it go again."""
    service = _allowed(request, "load")
    found = await asyncio.to_thread(service.asked, ref, [], None, key_of(request))
    _one_adapter(ref, found.uses)
    await service.loop.call(lambda: service.engine.residency.slots.pin(found.digests[0], body.pinned))
    return await _facts_of(service, ref)


@router.get("/admin/hot", **told(answers.HotFacts))
async def hot(request: Request) -> dict[str, Any]:
    """The adapter that is merged beside the base: state (cold, merging, hot, checking, failed), bytes, checksum of the base."""
    service = _allowed(request, "read")
    return asdict(await service.loop.call(lambda: service.engine.hot))


@router.post("/admin/adapters/{ref}/heat", **told(answers.HotFacts))
async def heat(ref: str, request: Request) -> dict[str, Any]:
    """Begin to merge an adapter beside the base, so that steps with nobody else in them cost what the base costs.

    Poll /admin/hot for the end. All other adapters are served as before. One at a time: 409 while another one is hot.
    """
    service = _allowed(request, "load")
    found = await asyncio.to_thread(service.asked, ref, [], None, key_of(request))
    _one_adapter(ref, found.uses)
    return asdict(await service.loop.call(lambda: service.engine.heat(found.uses[0].name)))


@router.post("/admin/cool", **told(answers.Cooled))
async def cool(request: Request) -> dict[str, Any]:
    """Drop the merged set. The next step runs on the base; that nobody wrote to it is verified and shown by /admin/hot."""
    service = _allowed(request, "load")
    freed = await service.loop.call(service.engine.cool)
    return {**asdict(await service.loop.call(lambda: service.engine.hot)), "freed_bytes": freed}


@router.post("/admin/alias", **told(answers.Moved))
async def alias(body: Move, request: Request) -> dict[str, Any]:
    """Move an alias at once, or not at all. Requests that run keep their version."""
    service = _allowed(request, "alias")
    key_of(request).check_use(body.ref.partition("@")[0])
    moved = await asyncio.to_thread(
        lambda: _library(service).alias(body.ref, body.alias, weight=body.weight, reason=body.reason)
    )
    return {"name": moved.name, "alias": moved.alias, "version": moved.version, "weight": moved.weight}


@router.post("/admin/rollback", **told(answers.Moved))
async def rollback(body: Back, request: Request) -> dict[str, Any]:
    """Point an alias at what it pointed to before."""
    service = _allowed(request, "alias")
    key_of(request).check_use(body.name)
    moved = await asyncio.to_thread(lambda: _library(service).rollback(body.name, body.alias, reason=body.reason))
    return {"name": moved.name, "alias": moved.alias, "version": moved.version, "weight": moved.weight}


@router.get("/admin/keys", **told(answers.KeyList))
async def keys(request: Request) -> dict[str, Any]:
    """Who may do what; never the keys."""
    service = _allowed(request, "read")
    return {"keys": [summary(key) for key in service.keyring.known]}


@router.get("/admin/usage", **told(answers.Usage))
async def usage(request: Request) -> dict[str, Any]:
    """Exact totals since the start, of every adapter version and every key."""
    service = _allowed(request, "read")
    return {"usage": {who: dict(total) for who, total in sorted(service.usage.items())}}


@router.post("/v1/load_lora_adapter", **told(answers.Loading))
async def vllm_load(body: VllmLoad, request: Request) -> dict[str, Any]:
    """vLLM's route. The name must be in the library; there is nothing to register."""
    path = body.lora_path
    if path is not None and path.partition("@")[0] != body.lora_name.partition("@")[0]:
        raise ConfigError(
            f"lora_path {path[:100]!r} is not the library name '{body.lora_name}'",
            help="this server takes names from its library, never paths: `veneer library add PATH --name NAME`",
        )
    return await load(path or body.lora_name, request)


@router.post("/v1/unload_lora_adapter", **told(answers.Unloaded))
async def vllm_unload(body: VllmUnload, request: Request) -> dict[str, Any]:
    """vLLM's route: free the memory. The adapter stays in the library."""
    return await unload(body.lora_name, request)


def _allowed(request: Request, action: Action) -> Service:
    require(key_of(request), action)
    return service_of(request)


def _library(service: Service) -> Library:
    if service.shelf.library is None:
        raise NotFound("this server has no library", help="start it with --library DIR")
    return service.shelf.library


def _one_adapter(ref: str, uses: Sequence[Use]) -> None:
    if not uses:
        raise ConfigError(f"'{ref}' is the base, which is always loaded")


async def _facts_of(service: Service, ref: str) -> dict[str, Any]:
    found = await asyncio.to_thread(service.asked, ref, [], None, LOCAL)
    _one_adapter(ref, found.uses)
    digest = found.digests[0]

    def read() -> dict[str, Any]:
        slot = _slots(service).get(digest)
        return {} if slot is None else _facts(service, slot)

    facts = await service.loop.call(read)
    return {"state": "available", **facts, "ref": found.uses[0].name, "digest": digest}


def _slots(service: Service) -> dict[str, Slot[Any]]:
    slots = service.engine.residency.slots
    return {key: slots.slot(key) for key in slots.states() if not key.startswith(MERGED)}


def _facts(service: Service, slot: Slot[Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"digest": slot.key, "state": slot.state, "uses": slot.uses, "bytes": slot.bytes}
    facts |= {"pinned": slot.pinned, "name": service.names.get(slot.key)}
    return facts if slot.state != "failed" else {**facts, "reason": slot.reason}
