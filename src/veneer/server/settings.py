"""How a server is set up. Checked when it is made: a server that is open to others without keys is refused."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from veneer.errors import ConfigError

_LOCAL_NAMES = frozenset({"localhost"})


@dataclass(frozen=True)
class Settings:
    """host, port        where to listen; elsewhere than on this machine only with keys
    keys              whether keys are set up
    max_body          bytes of a request body
    max_tokens        most tokens that one answer may have
    timeout           seconds after which a request is cut off
    drain             seconds that a stopping server gives its streams
    named_adapters    adapters that metrics name; the rest is "other"
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: bool = False
    max_body: int = 1_000_000
    max_tokens: int = 4096
    timeout: float = 600.0
    drain: float = 30.0
    named_adapters: int = 50

    def __post_init__(self) -> None:
        if not self.keys and not is_loopback(self.host):
            raise ConfigError(
                f"listening on {self.host} without keys would let anybody use this server",
                help="make a keys file (`veneer serve --new-key NAME`) and pass --keys FILE, or listen on 127.0.0.1",
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name that is not an address is not taken for local.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    if host in _LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
