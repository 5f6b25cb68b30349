"""One training run in bytes, by category, before anything is loaded.

The categories sum to the total. Base, adapter, gradients and optimiser are exact; copies, activations, logits and
workspace follow what the trainer and the native decoder hold at the end of a forward pass (`activations.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from veneer.methods import Method
from veneer.models.config import DecoderConfig, Layout
from veneer.ops.loss import chunk_rows
from veneer.plan.activations import Traffic, activation_bytes, logits_bytes, workspace_bytes
from veneer.plan.bytes import DENSE, GRADIENT, MASTER, base_bytes, copies_bytes, two_moments
from veneer.plan.counts import Counted, adapter_tensors
from veneer.plan.sizes import sizes_of


@dataclass(frozen=True)
class Work:
    """How a step is run.

    tokens       packed tokens in one pass (`tokens_per_pass`)
    label_share  the share of them that carry a label
    dtype        of products and activations
    quantize     format of the frozen projections, or None
    recompute    blocks whose activations are computed again
    state        trained tensors -> bytes of the optimiser's state
    freezes      names of tensors that the optimiser leaves as they start
    """

    tokens: int = 2048
    label_share: float = 1.0
    dtype: str = "bfloat16"
    quantize: str | None = None
    recompute: int = 0
    state: Callable[[Sequence[Counted]], int] = two_moments
    freezes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """What a run needs. `bytes` maps category to bytes, in the order they come into being."""

    parameters: int
    stored: int
    bytes: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def estimate(config: DecoderConfig, layout: Layout, spec: Method, targets: Sequence[str], work: Work) -> Estimate:
    """Bytes of training `spec` at `targets` on a native base. Nothing is loaded."""
    tensors = list(adapter_tensors(spec, layout.base_shape(config), targets))
    moved = [t for t in tensors if t.trained and t.name not in work.freezes]
    trained = sum(t.numbers for t in moved)
    stored = sum(t.numbers for t in tensors)
    itemsize = DENSE[work.dtype]
    traffic = traffic_of(layout, spec, tensors, work.label_share)
    labels = round(work.tokens * work.label_share)
    hosts = layout.base_shape(config).hosts
    dense = sum(hosts[t].in_features * hosts[t].out_features for t in targets) if spec.dense else 0
    return Estimate(
        parameters=trained,
        stored=stored,
        bytes={
            "base": base_bytes(sizes_of(config, layout), work.dtype, work.quantize),
            "adapter": MASTER * stored,
            "gradients": GRADIENT * trained,
            "optimizer": work.state(moved),
            "copies": copies_bytes(trained, itemsize, packed=spec.site != "override")
            + copies_bytes(dense, itemsize, packed=True),
            "activations": activation_bytes(config, traffic, work.tokens, itemsize, recompute=work.recompute),
            "logits": logits_bytes(config.vocab, labels, itemsize, chunk_rows(config.vocab, itemsize)),
            "workspace": workspace_bytes(config, work.tokens, itemsize) + _scratch(layout, work, itemsize),
        },
    )


def _scratch(layout: Layout, work: Work, itemsize: int) -> int:
    """The one buffer that quantised projections are made dense in: as large as the largest group."""
    if work.quantize is None:
        return 0
    return itemsize * max(group.out_features * group.in_features for group in layout.groups if group.name != "head")


def traffic_of(layout: Layout, spec: Method, tensors: Sequence[Counted], label_share: float) -> Traffic:
    """Which native groups carry what, from the tensors of an adapter. A shrink is as wide as the part's A has rows."""
    group_of = {part.path: group.name for group in layout.groups for part in group.parts}
    ranks: dict[str, int] = {}
    inside = True
    for tensor in tensors:
        path = tensor.target if tensor.target in group_of else tensor.target.removesuffix(".weight")
        group = group_of.get(path)
        if group is None:
            inside = False
            continue
        ranks.setdefault(group, 0)
        if tensor.name in ("A", "Q"):
            ranks[group] += tensor.shape[0]
    return Traffic(ranks, from_input=not inside or spec.site in ("tokens", "kv", "sublayer"), label_share=label_share)
