"""References: `name`, `name@version`, `name@alias`, and which version a bare name means.

The pattern is strict because references arrive over HTTP: no separator, no dot-dot, no capital that a case-blind file system
would fold. A reference is never a path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.errors import ConfigError
from veneer.library.records import Alias

NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
ALIAS = re.compile(r"[a-z](?:[a-z0-9_-]{0,30}[a-z0-9])?")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
DEFAULT = "production"
"""The alias that a bare name means; without it, the newest version."""
BASE = "base"
"""What keys, logs and metrics call the base without an adapter."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference: at most one of `version` and `alias` is set."""

    name: str
    version: int | None = None
    alias: str | None = None


def check_name(name: str) -> str:
    """`name` if it is one, else ConfigError."""
    if NAME.fullmatch(name) is None or ".." in name:
        raise ConfigError(
            f"{name[:80]!r} is not an adapter name: lower-case letters, digits, '.', '_' and '-', at most 64, "
            "starting and ending with a letter or digit",
            help=_suggest(name),
        )
    return name


def check_new_name(name: str) -> str:
    """`name` if an adapter may be called so, else ConfigError."""
    if check_name(name) == BASE:
        raise ConfigError(f"'{BASE}' means the base without an adapter", help="give the adapter another name")
    return name


def check_alias(alias: str) -> str:
    """`alias` if it is one, else ConfigError. It starts with a letter, so that it can't be taken for a version."""
    if ALIAS.fullmatch(alias) is None:
        raise ConfigError(
            f"{alias[:80]!r} is not an alias: lower-case letters, digits, '_' and '-', at most 32, starting with a letter",
            help="for example: production, canary",
        )
    return alias


def parse_reference(text: str) -> Reference:
    """`name`, `name@3` or `name@production`.

    >>> parse_reference("tickets@3")
    Reference(name='tickets', version=3, alias=None)
    """
    name, at, rest = text.partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    if VERSION.fullmatch(rest):
        return Reference(name, version=int(rest))
    return Reference(name, alias=check_alias(rest))


def route(aliases: Sequence[Alias], draw: float) -> Alias | None:
    """The alias that serves a request for a bare name, for a uniform `draw` in [0, 1).

    Every alias but production takes its weight of the traffic; production takes the rest. None without a production alias.
    The draw is the caller's, so that one conversation can stay with one version (hash its id).
    """
    production = next((a for a in aliases if a.alias == DEFAULT), None)
    if production is None:
        return None
    reached = 0.0
    for alias in sorted(aliases, key=lambda a: a.alias):
        if alias is not production:
            reached += alias.weight
            if draw < reached:
                return alias
    return production


def _suggest(name: str) -> str:
    guess = re.sub(r"[^a-z0-9._-]+|\.\.+", "-", name.lower())[:64].strip("._-")
    return f"for example: {guess or 'tickets'}"
