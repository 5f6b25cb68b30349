"""Merging adapters into checkpoints, file to file, and back."""

from veneer.merge.check import Agreement, agreement
from veneer.merge.exact import unmerge
from veneer.merge.file import Fidelity, MergeReport, merge
from veneer.merge.store import write_checkpoint

__all__ = ["Agreement", "Fidelity", "MergeReport", "agreement", "merge", "unmerge", "write_checkpoint"]
