"""What vLLM (and SGLang, which reads the same files) can carry of an adapter, and the adapter in a form that it reads right.

vLLM reads PEFT's LoRA folders with one r and one scale for all layers: rank and alpha patterns are passed over, which
is wrong without an error. `servable` folds the effective scales into B and pads all ranks with zeros to one, so every reader
computes the same update. The surprise: zeros in A and B change nothing, so padding is exact.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from veneer import methods
from veneer.adapter import Adapter, Part
from veneer.errors import NeedsBase, Unsupported, listed
from veneer.methods.lora import LoRA
from veneer.types import HostShape, LowRank

Tool: TypeAlias = Literal["vllm", "sglang"]
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes."""


def limits(adapter: Adapter, tool: Tool = "vllm") -> list[str]:
    """What can't be carried, one line each; empty where everything can. SGLang takes any rank, vLLM one of a list's."""
    problems = []
    if adapter.spec.model_dump().get("invocation"):
        problems.append(f"{adapter.spec.kind}: it switches on inside a sequence (aLoRA), here it would always be on")
    for part in adapter.parts:
        place = part.target or "the whole model"
        if part.site == "override":
            problems.append(
                f"{part.kind} at {place}: replaced tensors (modules_to_save, trainable tokens) are not loaded"
            )
        elif part.site != "weight":
            problems.append(f"{part.kind} at {place}: only LoRA is loaded")
        elif part.target is not None and _product(adapter, part) is None:
            problems.append(
                f"{part.kind} at {place}: not a plain low-rank update (DoRA, IA3 and biases are not loaded)"
            )
    ranks = [a.shape[0] for p in adapter.parts if p.target and (pair := _product(adapter, p)) for a in pair[:1]]
    if tool == "vllm" and ranks and max(ranks) > MAX_RANKS[-1]:
        problems.append(f"rank {max(ranks)} is above {MAX_RANKS[-1]}, the largest --max-lora-rank")
    return problems


def servable(adapter: Adapter) -> tuple[Adapter, int]:
    """The same update with one rank and effective scale 1 everywhere, and the `--max-lora-rank` that it needs."""
    adapter = methods.folded(adapter)
    problems = limits(adapter)
    if problems:
        raise Unsupported(
            f"vLLM can't serve this adapter as it is:\n{listed(problems)}",
            help="`veneer serve` serves any of it; `veneer merge` bakes all but an aLoRA into a model, "
            "and `veneer combine --rule svd` makes a LoRA of a DoRA or IA3",
        )
    pairs = {str(p.target): pair for p in adapter.parts if p.target and (pair := _product(adapter, p))}
    hosts = {str(p.target): p.host for p in adapter.parts}
    rank = max(a.shape[0] for a, _ in pairs.values())
    parts = []
    for target, (a, b) in pairs.items():
        missing = rank - a.shape[0]
        tensors = {
            "A": torch.cat([a, a.new_zeros(missing, a.shape[1])]),
            "B": torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1),
        }
        parts.append(Part("lora", "weight", target, tensors, hosts[target]))
    spec = LoRA(rank=rank, alpha=float(rank), scaling="alpha/r", targets=tuple(pairs))
    return Adapter(spec, tuple(parts), adapter.provenance), next(size for size in MAX_RANKS if size >= rank)


def _product(adapter: Adapter, part: Part) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A and scale * B in fp32 where the part is low-rank whatever the weight is."""
    try:
        whole = methods.complete(adapter, part)
        primitives = methods.method_of(adapter, part).lower(whole, methods.Place(_sizes(whole)))
    except (NeedsBase, Unsupported):
        return None
    low = [p for p in primitives if isinstance(p, LowRank)]
    if not low or len(low) < len(primitives):
        return None
    return torch.cat([p.A for p in low]).detach().float(), torch.cat([p.B for p in low], dim=1).detach().float()


def _sizes(part: Part) -> HostShape:
    """The layer's sizes as far as the part tells them."""
    t = part.tensors
    into = t["A"].shape[1] if "A" in t else t["in_scale"].shape[0] if "in_scale" in t else 0
    out = next((t[n].shape[0] for n in ("b", "B", "out_scale", "bias") if n in t), 0)
    return HostShape(part.host, into, out)
