"""Merging adapters into checkpoints, file to file, and back."""

from veneer.merge.check import Agreement, agreement
from veneer.merge.exact import unmerge
from veneer.merge.file import Fidelity, Merged, MergeReport, merge
from veneer.merge.store import store_of, write_checkpoint

__all__ = [
    "Agreement",
    "Fidelity",
    "MergeReport",
    "Merged",
    "agreement",
    "merge",
    "store_of",
    "unmerge",
    "write_checkpoint",
]
