"""Merging adapters into checkpoints, file to file, and back."""

from veneer.merge.check import Agreement, agreement
from veneer.merge.exact import unmerge
from veneer.merge.file import Fidelity, Merged, MergeReport, merge
from veneer.merge.four_bit import FourBitReport, merge_four_bit
from veneer.merge.store import store_of, write_checkpoint

__all__ = [
    "Agreement",
    "Fidelity",
    "FourBitReport",
    "MergeReport",
    "Merged",
    "agreement",
    "merge",
    "merge_four_bit",
    "store_of",
    "unmerge",
    "write_checkpoint",
]
