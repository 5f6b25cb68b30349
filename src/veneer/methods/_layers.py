"""Which blocks a method without targets acts on: all, some numbers, `first:N` or `last:N`."""

from __future__ import annotations

import re

from veneer.errors import ConfigError


def chosen_layers(layers: str | tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    """Block numbers out of `count`.

    >>> chosen_layers("last:2", 6), chosen_layers(None, 2)
    ((4, 5), (0, 1))
    """
    if layers is None:
        return tuple(range(count))
    if isinstance(layers, str):
        match = re.fullmatch(r"(first|last):(\d+)", layers)
        if match is None or not 0 < int(match[2]) <= count:
            raise ConfigError(
                f"layers: {layers!r} does not choose among {count} blocks", help="first:N, last:N, or numbers"
            )
        n = int(match[2])
        return tuple(range(n)) if match[1] == "first" else tuple(range(count - n, count))
    beyond = [layer for layer in layers if not -count <= layer < count]
    if beyond:
        raise ConfigError(f"layers: {beyond} are outside the {count} blocks")
    return tuple(sorted(layer % count for layer in layers))
