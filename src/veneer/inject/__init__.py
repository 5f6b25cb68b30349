"""Where adapters go: selecting targets, making fresh adapters, attaching them to a base or to any module."""

from veneer.inject.attach import Handle, ModuleSource, attach
from veneer.inject.create import create
from veneer.inject.native import attached, bank_of, disabled
from veneer.inject.targets import Match, Selection, select

__all__ = [
    "Handle",
    "Match",
    "ModuleSource",
    "Selection",
    "attach",
    "attached",
    "bank_of",
    "create",
    "disabled",
    "select",
]
