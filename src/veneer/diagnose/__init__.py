"""What is wrong, why, and what to do about it: findings about adapters, bases, and the two together."""

from veneer.diagnose.adapter import adapter_findings, file_findings
from veneer.diagnose.base import base_findings
from veneer.diagnose.finding import Finding, Level, worst
from veneer.diagnose.probe import check_probe, drift, probe_findings, probed
from veneer.diagnose.together import pair_findings

__all__ = [
    "Finding",
    "Level",
    "adapter_findings",
    "base_findings",
    "check_probe",
    "drift",
    "file_findings",
    "pair_findings",
    "probe_findings",
    "probed",
    "worst",
]
