"""Bytes and counts before anything is loaded: what a base weighs, what an adapter adds, what a training step needs."""

from veneer.plan.counts import adapter_parameters
from veneer.plan.estimate import Estimate, Work, estimate
from veneer.plan.sizes import Sizes, known_base, sizes_of

__all__ = ["Estimate", "Sizes", "Work", "adapter_parameters", "estimate", "known_base", "sizes_of"]
