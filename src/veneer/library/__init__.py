"""The adapter library: content-addressed blobs, numbered versions, aliases that move and roll back atomically.

library = Library("adapters")                      # a folder, or an fsspec URL with a catalogue database
added = library.add("runs/tickets", "tickets", base=base)
library.alias("tickets@1", "production")
adapter = library.load(library.resolve("tickets"))
"""

from veneer.library.difference import Difference, TargetDifference, difference
from veneer.library.gate import Demand
from veneer.library.library import Library
from veneer.library.records import (
    Added,
    Alias,
    Collected,
    File,
    Move,
    Rebuilt,
    Record,
    Removed,
    Verified,
    Version,
)
from veneer.library.resolve import Reference, parse_reference, route
from veneer.library.source import Loralib

__all__ = [
    "Added",
    "Alias",
    "Collected",
    "Demand",
    "Difference",
    "File",
    "Library",
    "Loralib",
    "Move",
    "Rebuilt",
    "Record",
    "Reference",
    "Removed",
    "TargetDifference",
    "Verified",
    "Version",
    "difference",
    "parse_reference",
    "route",
]
