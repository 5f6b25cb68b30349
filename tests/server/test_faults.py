"""Hostile adapters, clients that vanish, a server that is killed: what else runs is not harmed, and nothing is lost.

The poisoned versions are in the library with matching hashes and sealed manifests, as somebody with write access to its
storage could put them there, or their blobs were changed after they were added. Streams of good adapters run all the
while, and their answers are compared with plain generation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load, save

from tests.engine.small import lora, lowered_of, plain_greedy, small_base
from tests.server.conftest import Running, eventually, start
from tests.server.outside import PROMPTS, Outside, Shop, body, heard
from veneer.engine import Limits
from veneer.errors import VeneerError
from veneer.library import Library
from veneer.library.manifest import FileRecord, Manifest, seal
from veneer.server.keys import Key, hashed

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROMPT, COUNT = "hello there", 24
Files = dict[str, bytes]


# -- poison ------------------------------------------------------------------------------------------------------------


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Files], None]:
    def poison(files: Files) -> None:
        tensors = load(files[TENSORS])
        change(tensors)
        files[TENSORS] = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        files.pop("veneer.json", None)

    return poison


def _uneven_rank(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if "lora_A" in n)
    tensors[name] = tensors[name][:-1]


def _other_rank(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = torch.cat([tensor, tensor], dim=0 if "lora_A" in name else 1)


def _other_shape(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if "lora_A" in n]:
        tensors[name] = torch.zeros(4, 77)


def _not_finite(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = value

    return change


def _stray_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.99.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)


def _whole_file(content: bytes) -> Callable[[Files], None]:
    def poison(files: Files) -> None:
        files[TENSORS] = content

    return poison


def _truncated(files: Files) -> None:
    files[TENSORS] = files[TENSORS][:-100]


def _lying_offsets(files: Files) -> None:
    header = {"base_model.model.x.lora_A.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    files[TENSORS] = struct.pack("<Q", len(text)) + text


def _deep_config(files: Files) -> None:
    files[CONFIG] = b"[" * 100_000


def _pickle_beside(files: Files) -> None:
    files["adapter_model.bin"] = pickle.dumps({"x": torch.zeros(2)})
    del files[TENSORS]


POISON: Mapping[str, Callable[[Files], None]] = {
    "uneven-rank": _tensors(_uneven_rank),
    "other-rank": _tensors(_other_rank),
    "other-shape": _tensors(_other_shape),
    "nan": _tensors(_not_finite(float("nan"))),
    "infinite": _tensors(_not_finite(float("inf"))),
    "stray-tensor": _tensors(_stray_tensor),
    "huge-header": _whole_file(struct.pack("<Q", 1 << 60) + b"{}"),
    "large-header": _whole_file(struct.pack("<Q", 90 << 20) + b"{}"),
    "pickle": _whole_file(pickle.dumps({"x": 1})),
    "empty": _whole_file(b""),
    "truncated": _truncated,
    "lying-offsets": _lying_offsets,
    "deep-config": _deep_config,
    "pickle-beside": _pickle_beside,
}


def _flip(blob: Path) -> None:
    content = bytearray(blob.read_bytes())
    content[-1] ^= 0x40
    blob.chmod(0o644)
    blob.write_bytes(content)


def _link(blob: Path) -> None:
    blob.unlink()
    blob.symlink_to("/etc/hostname")


def _link_away(blob: Path) -> None:
    blob.unlink()
    blob.symlink_to("../../../../nowhere")


def _pipe(blob: Path) -> None:
    blob.unlink()
    os.mkfifo(blob)


def _folder(blob: Path) -> None:
    blob.unlink()
    blob.mkdir()


def _gone(blob: Path) -> None:
    blob.unlink()


CHANGED: Mapping[str, Callable[[Path], None]] = {
    "flipped": _flip,
    "link": _link,
    "link-away": _link_away,
    "pipe": _pipe,
    "folder": _folder,
    "gone": _gone,
}


def stock(root: Path) -> None:
    """A library with all of that in it."""
    base, library = small_base(), Library(root)
    for place, (name, change) in enumerate(CHANGED.items()):
        version = library.add(lora(base, 100 + place), name).version
        weights = max(library.show(version.ref).files, key=lambda file: file.bytes)
        change(root / "blobs" / weights.blob[:2] / weights.blob)
    good = library.add(lora(base, 50), "good").version
    record = library.show(good.ref)
    originals = {f.path: (root / "blobs" / f.blob[:2] / f.blob).read_bytes() for f in record.files}
    library.close()
    facts = {key: getattr(good, key) for key in good._fields if key != "manifest"}
    facts |= {"belonging": None, "note": "", "parents": (), "spec": dict(record.spec), "provenance": {}, "run": {}}
    for name, poison in POISON.items():
        files = dict(originals)
        poison(files)
        records = []
        for path, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            blob = root / "blobs" / digest[:2] / digest
            blob.parent.mkdir(parents=True, exist_ok=True)
            if not blob.exists():
                blob.write_bytes(content)
            records.append(FileRecord(path=path, blob=digest, bytes=len(content)))
        digest = hashlib.sha256(name.encode()).hexdigest()
        manifest = Manifest(**{**facts, "name": name, "digest": digest, "files": tuple(records), "metrics": {}})
        target = root / "manifests" / name / "1.json"
        target.parent.mkdir()
        target.write_bytes(seal(manifest))
    for file in root.glob("catalogue.sqlite*"):
        file.unlink()
    rebuilt = Library(root)
    rebuilt.rebuild()
    rebuilt.close()


class Traffic:
    """Streams of good adapters, one after the other, until told to stop; every answer is compared."""

    def __init__(self, running: Running) -> None:
        base, tokenizer = running.base, running.base.require_tokenizer()
        prompt = tokenizer.encode(PROMPT)
        seeds = {"tickets@1": 1, "tickets@2": 2, "legal": 3, "local": 9, "small": None}
        self._expected = {
            model: tokenizer.decode(
                plain_greedy(base, prompt, lowered_of(base, None if seed is None else lora(base, seed)), COUNT)
            )
            for model, seed in seeds.items()
        }
        self.done = 0
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(running.client(), model)) for model in seeds]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, client: httpx.Client, model: str) -> None:
        while not self._stop.is_set() and not self.wrong:
            try:
                asked = {**body(model, PROMPT, COUNT), "stream": True}
                with client.stream("POST", "/v1/completions", json=asked) as answer:
                    text, _ = heard([line for line in answer.iter_lines() if line])
                if text != self._expected[model]:
                    self.wrong.append(f"{model} said {text!r}")
            except Exception as error:  # told by the test
                self.wrong.append(f"{model}: {error!r}")
            self.done += 1


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("poisoned")
    stock(folder / "library")
    server = start(folder)
    yield server
    server.stop()


def test_poison_fails_alone_by_every_way_in(poisoned: Running) -> None:
    client = poisoned.client()
    slots = poisoned.service.engine.residency.slots
    with Traffic(poisoned) as traffic:
        for name in (*POISON, *CHANGED):
            before = traffic.done
            asked = body(name, PROMPT, 4)
            for more in ({}, {"stream": True}, {"model": "small", "adapter": ["legal", {"name": name, "scale": 0.5}]}):
                answer = client.post("/v1/completions", json={**asked, **more})
                assert answer.status_code in (404, 422), (name, more, answer.status_code, answer.text)
                error = answer.json()["error"]
                assert error["message"] and "Traceback" not in error["message"], (name, error)
            loaded = client.post(f"/admin/adapters/{name}/load")
            assert loaded.status_code in (200, 404, 422), (name, loaded.text)
            if loaded.status_code == 200:
                assert eventually(lambda n=name: client.get(f"/admin/adapters/{n}").json()["state"] == "failed"), name
                assert client.get(f"/admin/adapters/{name}").json()["reason"], name
            assert eventually(lambda b=before: traffic.done > b), f"nothing moves after {name}: {traffic.wrong}"
        good = client.post("/v1/completions", json=body("good", PROMPT, 4))
        assert good.status_code == 200, good.text
    assert not traffic.wrong, traffic.wrong[:3]
    assert traffic.done > 10
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    assert set(slots.states().values()) <= {"resident", "available", "failed"}
    assert all(not slots.slot(key).uses for key in slots.states())
    assert poisoned.service.engine.book.promised == 0


def test_poison_is_not_let_into_a_library_meanwhile(poisoned: Running, tmp_path: Path) -> None:
    listed = poisoned.library.list()
    with Traffic(poisoned) as traffic:
        for name, poison in POISON.items():
            lora(poisoned.base, 60).save(tmp_path / name)
            files = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
            poison(files)
            for file in (tmp_path / name).iterdir():
                file.unlink()
            for path, content in files.items():
                (tmp_path / name / path).write_bytes(content)
            with pytest.raises(VeneerError) as refused:
                # The library knows no base here but the server's: what merely does not fit is refused against it.
                poisoned.library.add(tmp_path / name, "bad", base=poisoned.base)
            assert refused.value.message, name
        assert eventually(lambda: traffic.done > 5)
    assert not traffic.wrong, traffic.wrong[:3]
    assert poisoned.library.list() == listed


@pytest.mark.parametrize(
    "name",
    ["..", "../secret", "../../etc/passwd", "/etc/passwd", "legal/../../x", "legal\0", "%2e%2e", "~root", "file:///x"],
)
def test_names_are_never_paths(poisoned: Running, name: str, tmp_path: Path) -> None:
    client = poisoned.client()
    for change in ({"model": name}, {"model": f"small:{name}"}, {"adapter": name}, {"adapter": [{"name": name}]}):
        answer = client.post("/v1/completions", json={**body("small", PROMPT, 2), **change})
        assert answer.status_code == 404, (change, answer.text)
    for route, asked in (
        ("/v1/load_lora_adapter", {"lora_name": name}),
        ("/v1/load_lora_adapter", {"lora_name": "legal", "lora_path": name}),
        ("/v1/unload_lora_adapter", {"lora_name": name}),
        ("/admin/alias", {"ref": f"{name}@1", "alias": "production"}),
        ("/admin/alias", {"ref": "legal@1", "alias": name}),
        ("/admin/rollback", {"name": name}),
    ):
        answer = client.post(route, json=asked)
        assert answer.status_code in (400, 404), (route, asked, answer.status_code, answer.text)
        assert "root:" not in answer.text


# -- clients that vanish -----------------------------------------------------------------------------------------------


def test_clients_that_vanish_free_all_they_held(tmp_path: Path) -> None:
    """Reset connections: while they wait, while they stream, before their body has come, with several choices."""
    secret = "vn-many"
    key = Key(name="many", sha256=hashed(secret), concurrent=30)
    server = start(tmp_path, keys=(key,), engine={"limits": Limits(streams=6, adapters=2)})
    try:
        engine, port = server.service.engine, int(server.url.rsplit(":", 1)[1])
        draw = random.Random(0)
        open_sockets = []
        for number in range(30):
            asked = body(draw.choice(["small", "tickets@1", "tickets@2", "legal", "local"]), PROMPT, 400)
            asked |= {"stream": number % 3 > 0, "n": 1 + number % 2}
            content = json.dumps(asked).encode()
            sent = content[: len(content) // 2] if number % 10 == 9 else content
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {secret}\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
            wire = socket.create_connection(("127.0.0.1", port))
            wire.sendall(head.encode() + sent)
            open_sockets.append(wire)
        assert eventually(lambda: len(engine.scheduler.running) == 6 and len(engine.scheduler.waiting) > 10)
        for wire in draw.sample(open_sockets, len(open_sockets)):
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wire.close()
            time.sleep(draw.random() * 0.02)
        assert eventually(lambda: not engine.scheduler.running and not engine.scheduler.waiting)
        slots = engine.residency.slots
        assert eventually(lambda: all(not slots.slot(name).uses for name in slots.states()))
        assert engine.book.promised == 0
        client = server.client(secret)
        for _ in range(31):  # no place of the key was lost either
            answer = client.post("/v1/completions", json=body("legal", PROMPT, 2))
            assert answer.status_code == 200, answer.text
    finally:
        server.stop()


# -- kill -9 -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_server_loses_nothing(tmp_path: Path) -> None:
    """Killed under traffic while aliases move. After a restart the library is sound, what was acknowledged is there,
    and every answer is what it was."""
    shop = Shop(tmp_path, 6)
    count = 16
    for seed in (300, 301):
        shop.library.add(shop.adapter(seed), "moving")
    expected = {
        (f"a{i}", prompt): found
        for i in range(6)
        for prompt in PROMPTS
        if (found := shop.expected(i, prompt, count)) is not None
    }
    server = Outside(shop, "--adapter-memory", "0.01")
    draw = random.Random(1)
    asked_for = acknowledged = 1

    def alias() -> int:
        return next(a.version for a in shop.library.aliases("moving") if a.alias == "production")

    for _ in range(3):
        server.start()
        wrong = ask_all(server, expected, count)
        assert not wrong, wrong[:3]
        stop, heard_whole = threading.Event(), []
        threads = [
            threading.Thread(target=_traffic, args=(server, expected, count, stop, heard_whole, i)) for i in range(6)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 1 + draw.random()
        with httpx.Client(base_url=server.url, timeout=20) as admin:
            while time.monotonic() < end:
                asked_for = 3 - acknowledged
                moved = admin.post("/admin/alias", json={"ref": f"moving@{asked_for}", "alias": "production"})
                assert moved.status_code == 200, moved.text
                acknowledged = asked_for
            killer = threading.Timer(0.003 * draw.random(), server.kill)
            killer.start()
            with contextlib.suppress(httpx.TransportError):
                asked_for = 3 - acknowledged
                admin.post("/admin/alias", json={"ref": f"moving@{asked_for}", "alias": "production"})
                acknowledged = asked_for
            killer.join()
        stop.set()
        for thread in threads:
            thread.join(30)
        assert heard_whole and all(heard_whole), heard_whole
        assert shop.library.verify().is_clean
        assert alias() in (acknowledged, asked_for)
        acknowledged = alias()
    server.start()
    try:
        assert not ask_all(server, expected, count)
        listed = {m["id"] for m in httpx.get(f"{server.url}/v1/models").json()["data"]}
        assert listed == {"base", "moving", *(f"a{i}" for i in range(6))}
        moved = httpx.post(f"{server.url}/v1/completions", json=body("moving", PROMPTS[0], 2))
        assert moved.headers["x-veneer-adapter"] == f"moving@{acknowledged}"
    finally:
        server.stop()


def ask_all(server: Outside, expected: Mapping[tuple[str, str], Any], count: int) -> list[str]:
    """What was answered wrongly."""
    wrong = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for (model, prompt), answer in expected.items():
            choice = client.post("/v1/completions", json=body(model, prompt, count)).json()["choices"][0]
            try:
                answer.check(choice["text"], choice["logprobs"]["token_logprobs"])
            except AssertionError as error:
                wrong.append(f"{model}, {prompt!r}: {error}")
    return wrong


def _traffic(
    server: Outside,
    expected: Mapping[tuple[str, str], Any],
    count: int,
    stop: threading.Event,
    heard_whole: list[bool],
    seed: int,
) -> None:
    """Streams until the server dies; notes whether those that came to their end were right."""
    draw = random.Random(seed)
    with httpx.Client(base_url=server.url, timeout=20) as client:
        while not stop.is_set():
            (model, prompt), answer = draw.choice(list(expected.items()))
            try:
                asked = {**body(model, prompt, count), "stream": True}
                with client.stream("POST", "/v1/completions", json=asked) as reply:
                    lines = [line for line in reply.iter_lines() if line]
            except httpx.TransportError:
                return
            try:
                answer.check(*heard(lines))
                heard_whole.append(True)
            except AssertionError:
                heard_whole.append(False)
