"""Many adapters, one base, one batch: requests, scheduling, caches, sampling, and the engine that joins them.

`request`, `scheduler`, `slots`, `kvcache`, `source` and `text` decide and import no torch; `arena`, `batch`,
`sampling` and `runner` hold tensors; `engine.Engine` is the glue. Names are imported when they are first used, so that
deciding needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.engine.engine import Engine as Engine
    from veneer.engine.hot import Heat as Heat
    from veneer.engine.request import Constraint as Constraint
    from veneer.engine.request import Delta as Delta
    from veneer.engine.request import Event as Event
    from veneer.engine.request import Failed as Failed
    from veneer.engine.request import Finished as Finished
    from veneer.engine.request import Request as Request
    from veneer.engine.request import Sampling as Sampling
    from veneer.engine.request import Use as Use
    from veneer.engine.scheduler import Limits as Limits
    from veneer.engine.source import AdapterSource as AdapterSource
    from veneer.engine.source import Found as Found

_HOME = {
    "Engine": "engine",
    "Constraint": "request",
    "Delta": "request",
    "Event": "request",
    "Failed": "request",
    "Finished": "request",
    "Request": "request",
    "Sampling": "request",
    "Use": "request",
    "Limits": "scheduler",
    "AdapterSource": "source",
    "Found": "source",
    "Heat": "hot",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veneer.engine' has no attribute '{name}'")
    return getattr(importlib.import_module(f"veneer.engine.{_HOME[name]}"), name)
