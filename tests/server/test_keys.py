"""Who may do what: keys are hashed, limits hold, and a server open to others without keys does not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.conftest import ADMIN, ALICE, EDITOR, TIGHT, Running
from veneer.cli.main import run
from veneer.errors import Busy, ConfigError, Denied
from veneer.server.keys import LOCAL, Key, Keyring, hashed, new_key, read_keys, require
from veneer.server.settings import Settings

BODY = {"prompt": "hi", "max_tokens": 2}


def test_a_key_is_recognised_by_its_hash_only() -> None:
    ring = Keyring([Key(name="a", sha256=hashed("secret"))])
    assert ring.recognise("Bearer secret").name == "a"
    assert ring.recognise("bearer secret ").name == "a"
    for header in (None, "", "secret", "Basic secret", "Bearer", "Bearer wrong", f"Bearer {hashed('secret')}"):
        with pytest.raises(Denied) as error:
            ring.recognise(header)
        assert not error.value.known
    assert Keyring().recognise(None) is LOCAL


def test_a_fresh_key_works_and_is_not_in_its_file(tmp_path: Path) -> None:
    secret, entry = new_key("team")
    assert secret not in entry
    (tmp_path / "keys.yaml").write_text(entry)
    keys = read_keys(tmp_path / "keys.yaml")
    assert Keyring(keys).recognise(f"Bearer {secret}") == keys[0]
    assert keys[0].may_use("anything")
    assert keys[0].may_use(None)


def test_the_command_line_makes_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--new-key", "team"]) == 0
    out, err = capsys.readouterr()
    secret = err.rsplit(" ", 1)[1].strip()
    assert hashed(secret) in out
    assert run(["serve", "--base", "x", "--host", "0.0.0.0"]) == 2


@pytest.mark.parametrize(
    "text,word",
    [
        ("keys: [{name: a}]", "sha256"),
        ("keys: []", "keys"),
        ("nothing", "keys file"),
        ("keys: [{name: a, sha256: zz, spelling: 1}]", "spelling"),
        (f"keys: [{{name: a, sha256: {'a' * 64}}}, {{name: a, sha256: {'b' * 64}}}]", "several"),
        ("a: [", "YAML"),
    ],
)
def test_a_bad_keys_file_says_what_is_wrong(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(ConfigError, match=word):
        read_keys(tmp_path / "keys.yaml")


def test_limits_refill_with_time() -> None:
    now = [0.0]
    key = Key(name="a", sha256="0" * 64, requests_per_minute=2, tokens_per_minute=60, concurrent=2)
    ring = Keyring([key], clock=lambda: now[0])
    for _ in range(2):
        ring.begin(key)
        ring.spend(key, 10)
    with pytest.raises(Busy, match="running"):
        ring.begin(key)
    ring.end(key, 30)
    ring.end(key, 30)
    with pytest.raises(Busy, match="requests") as error:
        ring.begin(key)
    assert error.value.retry_after == pytest.approx(30.0)
    now[0] = 30.0
    ring.begin(key)
    with pytest.raises(Busy, match="tokens") as error:
        ring.spend(key, 20)
    assert error.value.retry_after == pytest.approx(10.0)
    ring.end(key, 45)
    now[0] = 60.0
    with pytest.raises(Busy, match="tokens"):  # nobody reads a prompt for a key that is in debt
        ring.begin(key)
    now[0] = 90.0
    ring.begin(key)
    ring.spend(key, 20)


def test_scopes() -> None:
    key = Key(name="a", sha256="0" * 64, adapters=("legal-*",), admin=frozenset({"read"}))
    assert key.may_use("legal-1")
    assert not key.may_use("tickets")
    assert not key.may_use(None)
    require(key, "read")
    with pytest.raises(Denied) as error:
        require(key, "load")
    assert error.value.known


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_others_need_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="without keys"):
        Settings(host=host)
    assert Settings(host=host, keys=True).host == host
    assert Settings(host="localhost").host == "localhost"


def test_keys_over_http(guarded: Running) -> None:
    nobody, alice, admin = guarded.client(), guarded.client(ALICE), guarded.client(ADMIN)
    for path in ("/v1/models", "/metrics", "/admin/adapters", "/docs", "/openapi.json"):
        answer = nobody.get(path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
    assert nobody.get("/health").status_code == 200
    assert nobody.get("/ready").json()["status"] == "ready"

    def status(client: object, model: str) -> int:
        return int(client.post("/v1/completions", json={**BODY, "model": model}).status_code)  # type: ignore[attr-defined]

    assert [status(alice, m) for m in ("tickets", "legal@1", "small", "local")] == [200, 200, 403, 403]
    assert [status(admin, m) for m in ("tickets", "small", "local")] == [200, 200, 200]
    assert {m["id"] for m in alice.get("/v1/models").json()["data"]} == {"tickets", "legal"}
    mixed = alice.post("/v1/completions", json={**BODY, "model": "small", "adapter": ["tickets", "local"]})
    assert mixed.status_code == 403
    assert alice.get("/admin/adapters").status_code == 403
    assert alice.get("/metrics").status_code == 403
    assert admin.get("/metrics").status_code == 200
    listed = admin.get("/admin/keys").text
    assert hashed(ALICE) not in listed
    assert "alice" in listed


def test_an_error_names_no_adapter_that_the_key_may_not_use(guarded: Running) -> None:
    """The hint on a name that is not there knows all names; a restricted key is sent to its own list instead."""
    for asked, status in (("nothing-like-it", 403), ("legal-nothing", 404), ("loca", 403), ("tickets@nothing", 404)):
        told = guarded.client(ALICE).post("/v1/completions", json={"model": asked, "prompt": "a"})
        assert told.status_code == status and (status == 403 or "/v1/models" in told.text)
        assert "local" not in told.text and "known:" not in told.text
    there, absent = (
        guarded.client(ALICE).post("/v1/completions", json={"model": name, "prompt": "a"})
        for name in ("local", "lacol")
    )
    assert there.status_code == absent.status_code == 403
    assert there.json()["error"]["message"].replace("local", "lacol") == absent.json()["error"]["message"]
    shown = guarded.client(ADMIN).post("/v1/completions", json={"model": "tickts", "prompt": "a"})
    assert shown.status_code == 404 and "did you mean 'tickets'" in shown.text


def test_limits_over_http(guarded: Running) -> None:
    tight = guarded.client(TIGHT)
    codes = [tight.post("/v1/completions", json={**BODY, "model": "tickets"}) for _ in range(3)]
    assert [c.status_code for c in codes] == [200, 200, 429]
    assert int(codes[2].headers["retry-after"]) >= 1
    assert codes[2].json()["error"]["code"] == "rate_limit_exceeded"
    schema = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}}
    wrong = {"model": "tickets", "messages": [{"role": "user", "content": "hi"}], **schema}
    assert guarded.client(ALICE).post("/v1/chat/completions", json=wrong).status_code == 400
    assert tight.post("/v1/chat/completions", json=wrong).status_code == 429  # it is not even read


def test_aliases_are_moved_by_those_who_may_use_the_adapter(guarded: Running) -> None:
    editor, before = guarded.client(EDITOR), guarded.library.aliases("legal")
    for path, body in (
        ("alias", {"ref": "legal@1", "alias": "mine"}),
        ("alias", {"ref": "nothing@1", "alias": "mine"}),
        ("rollback", {"name": "legal"}),
    ):
        assert editor.post(f"/admin/{path}", json=body).status_code == 403
    assert guarded.library.aliases("legal") == before
    assert editor.post("/admin/alias", json={"ref": "tickets@1", "alias": "mine"}).status_code == 200


def test_bodies_have_a_limit_whatever_the_headers_say(guarded: Running) -> None:
    client = guarded.client(ADMIN)
    long = {**BODY, "model": "small", "prompt": "x" * 30_000}
    assert client.post("/v1/completions", json=long).status_code == 413

    def pieces() -> object:
        for _ in range(30):
            yield b"x" * 1000

    answer = client.post("/v1/completions", content=pieces())  # type: ignore[arg-type]
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
