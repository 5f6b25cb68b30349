"""veneer: train, prove, keep, combine and serve many small adapters over one frozen base model.

Names are imported when they are first used, so `import veneer` costs nothing.

The surprise: the garbage collector rests meanwhile, and what exists afterwards is old at once. What torch defines is there to
stay, and looking through it again and again took a fifth of the time from the start of a process to its first token.
"""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.adapter import Adapter as Adapter
    from veneer.algebra import combine as combine
    from veneer.engine import Engine as Engine
    from veneer.engine import Request as Request
    from veneer.errors import VeneerError as VeneerError
    from veneer.inject.attach import attach as attach
    from veneer.inject.create import create as create
    from veneer.inject.native import attached as attached
    from veneer.library import Library as Library
    from veneer.merge import merge as merge
    from veneer.methods.bitfit import BitFit as BitFit
    from veneer.methods.bottleneck import Bottleneck as Bottleneck
    from veneer.methods.dora import DoRA as DoRA
    from veneer.methods.full import Full as Full
    from veneer.methods.ia3 import IA3 as IA3
    from veneer.methods.lora import LoRA as LoRA
    from veneer.methods.prefix import PrefixTuning as PrefixTuning
    from veneer.methods.prompt import PromptTuning as PromptTuning
    from veneer.methods.ptuning import PTuning as PTuning
    from veneer.methods.vera import VeRA as VeRA
    from veneer.models.base import Base as Base
    from veneer.models.load import load_base as load_base
    from veneer.train import train as train

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapter",
    "Base": "models.base",
    "load_base": "models.load",
    "train": "train",
    "attach": "inject.attach",
    "attached": "inject.native",
    "create": "inject.create",
    "merge": "merge",
    "combine": "algebra",
    "Engine": "engine",
    "Request": "engine",
    "Library": "library",
    "LoRA": "methods.lora",
    "DoRA": "methods.dora",
    "IA3": "methods.ia3",
    "PromptTuning": "methods.prompt",
    "PrefixTuning": "methods.prefix",
    "PTuning": "methods.ptuning",
    "Bottleneck": "methods.bottleneck",
    "BitFit": "methods.bitfit",
    "VeRA": "methods.vera",
    "Full": "methods.full",
    "VeneerError": "errors",
}
"""Public name -> the module it is taken from."""

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'veneer' has no attribute '{name}'")
    collects = gc.isenabled()
    gc.disable()
    try:
        value = getattr(importlib.import_module(f"veneer.{home}"), name)
    finally:
        if gc.get_freeze_count() == 0:
            gc.freeze()
            gc.unfreeze()  # into the oldest generation, unseen
        if collects:
            gc.enable()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`vn.train` is a function, `veneer.train` the folder it lives in: importing the folder must not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
