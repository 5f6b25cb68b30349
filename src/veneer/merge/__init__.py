"""Merging adapters into checkpoints, file to file, and back."""

from veneer.merge.exact import unmerge
from veneer.merge.file import Fidelity, MergeReport, merge

__all__ = ["Fidelity", "MergeReport", "merge", "unmerge"]
