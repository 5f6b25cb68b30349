"""API keys: who may use which adapters, do which admin actions, and how much.

A keys file (YAML) holds hashes, never keys:

    keys:
      - name: support-team
        sha256: 9f2c...
        adapters: [tickets, "legal-*", base]
        admin: []                       # read (everything the server knows, all names included), load, alias
        requests_per_minute: 120
        tokens_per_minute: 60000
        concurrent: 8

A key is 256 random bits, so a plain SHA-256 can't be guessed back; it is compared in constant time, with all entries, so timing
tells nothing. `base` among the adapters is the bare base.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from veneer import yaml_file
from veneer.errors import Busy, ConfigError, Denied, complaints, listed
from veneer.library.resolve import BASE

Action: TypeAlias = Literal["read", "load", "alias"]


class Key(BaseModel):
    """One entry of a keys file. Limits of 0 are no limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    adapters: tuple[str, ...] = ("*",)
    admin: frozenset[Action] = frozenset()
    requests_per_minute: int = Field(0, ge=0)
    tokens_per_minute: int = Field(0, ge=0)
    concurrent: int = Field(0, ge=0)

    def may_use(self, adapter: str | None) -> bool:
        """Whether this key may ask for an adapter (its name without version), or for the bare base (None)."""
        return any(fnmatch.fnmatchcase(BASE if adapter is None else adapter, pattern) for pattern in self.adapters)

    def check_use(self, adapter: str | None) -> None:
        """Denied unless `may_use`."""
        if not self.may_use(adapter):
            what = "the bare base" if adapter is None else repr(adapter[:100])
            raise Denied(f"the key '{self.name}' may not use {what}", known=True)


LOCAL = Key(name="local", sha256="0" * 64, admin=frozenset({"read", "load", "alias"}))
"""Everybody, on a server without keys: it listens to this machine only."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: tuple[Key, ...] = Field(min_length=1)


def hashed(secret: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_key(name: str) -> tuple[str, str]:
    """A fresh key, to be shown once, and its entry for the keys file."""
    secret = f"vn-{secrets.token_urlsafe(32)}"
    Key(name=name, sha256=hashed(secret))
    entry = {"keys": [{"name": name, "sha256": hashed(secret), "adapters": ["*", BASE], "admin": []}]}
    return secret, yaml.safe_dump(entry, sort_keys=False)


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file; everything wrong with it is in one error."""
    help = "`veneer serve --new-key NAME` shows an entry"
    value, _ = yaml_file.read(path, "keys file", help)
    try:
        keys = _File.model_validate(value).keys
    except ValidationError as error:
        problems = complaints(error.errors())
        raise ConfigError(f"{path} is not a keys file:\n{listed(problems)}", help=help) from error
    names = [key.name for key in keys]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path} has several keys called {', '.join(twice)}")
    return keys


class _Bucket:
    """So many a minute, with a minute's worth at once."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._rate, self._most = per_minute / 60, float(per_minute)
        self._level, self._at = float(per_minute), now

    def wait(self, now: float, need: float = 1.0) -> float:
        """Seconds until `need` can be taken; 0 if it can be now. More than a minute's worth needs a full bucket."""
        self._level = min(self._most, self._level + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (min(need, self._most) - self._level) / self._rate)

    def take(self, amount: float) -> None:
        """The level may go below zero: what was used is paid back before the next one."""
        self._level -= amount


class _Account:
    def __init__(self, key: Key, now: float) -> None:
        self.requests = _Bucket(key.requests_per_minute, now) if key.requests_per_minute else None
        self.tokens = _Bucket(key.tokens_per_minute, now) if key.tokens_per_minute else None
        self.running = 0


class Keyring:
    """Recognises keys and keeps their limits. Without keys everybody is `LOCAL`. Safe on any thread."""

    def __init__(self, keys: Iterable[Key] = (), *, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = tuple(keys)
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: dict[str, _Account] = {}

    @property
    def open(self) -> bool:
        """No keys are asked for."""
        return not self._keys

    @property
    def known(self) -> tuple[Key, ...]:
        return self._keys

    def recognise(self, authorization: str | None) -> Key:
        """The key of an `Authorization: Bearer` header, or Denied."""
        if self.open:
            return LOCAL
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise Denied("an API key is needed", known=False, help="send it as `Authorization: Bearer KEY`")
        given, found = hashed(secret.strip()), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, given):
                found = key
        if found is None:
            raise Denied("this API key is not known", known=False)
        return found

    def begin(self, key: Key) -> None:
        """Take one request from the key's limits, or Busy with the time to wait. Then `spend` its prompt, and `end` it."""
        with self._lock:
            now = self._clock()
            account = self._accounts.setdefault(key.name, _Account(key, now))
            if key.concurrent and account.running >= key.concurrent:
                raise Busy(f"the key '{key.name}' has {account.running} requests running already", retry_after=1.0)
            for bucket, what in ((account.requests, "requests"), (account.tokens, "tokens")):
                _require(bucket, now, 1, key, what)
            if account.requests is not None:
                account.requests.take(1)
            account.running += 1

    def spend(self, key: Key, prompt_tokens: int) -> None:
        """Take a prompt from the key's tokens, or Busy with the time to wait."""
        with self._lock:
            account = self._accounts[key.name]
            _require(account.tokens, self._clock(), prompt_tokens, key, "tokens")
            if account.tokens is not None:
                account.tokens.take(prompt_tokens)

    def end(self, key: Key, completion_tokens: int) -> None:
        """The request is over."""
        with self._lock:
            account = self._accounts[key.name]
            account.running -= 1
            if account.tokens is not None:
                account.tokens.wait(self._clock(), 0.0)
                account.tokens.take(completion_tokens)


def _require(bucket: _Bucket | None, now: float, need: float, key: Key, what: str) -> None:
    wait = 0.0 if bucket is None else bucket.wait(now, need)
    if wait > 0:
        raise Busy(f"the key '{key.name}' has used up its {what} for this minute", retry_after=wait)


def require(key: Key, action: Action) -> None:
    """Denied unless the key may do this admin action."""
    if action not in key.admin:
        raise Denied(f"the key '{key.name}' may not {action} here", known=True, help="its `admin` list must name it")


def summary(key: Key) -> dict[str, Any]:
    """What may be shown of a key."""
    return key.model_dump(mode="json", exclude={"sha256"})
