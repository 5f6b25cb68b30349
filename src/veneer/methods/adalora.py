"""AdaLoRA: W + scale P diag(E) Q, whose triplets are dropped where they matter least; arXiv 2303.10512.

All layers start with `rank` triplets (a column of P, an entry of E, a row of Q) and share one budget, which falls from rank to
target_rank a layer on average along a cubic curve. A triplet's importance is s(E_i) + mean s(P_i) + mean s(Q_i), where s(w) is
the running mean of |w dL/dw| times the running mean of its deviation from that mean. Triplets outside the budget have their E set
to zero; they may come back while the budget still falls. 0.5 (|P^T P - 1| + |Q Q^T - 1|), a mean over all P and Q, keeps them
apart.

E starts at zero, P and Q are random, so the start is the base. Saved, the dropped triplets are gone, and layers have ranks of
their own; the scale is alpha over the rank at the start, as in PEFT.

The surprise: exactly `budget` triplets survive each cut. PEFT drops everything up to a threshold, ties included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from veneer.adapter import Adapter, Part
from veneer.base.host import Host
from veneer.errors import ConfigError
from veneer.methods._abstract import PeftForm, Regime
from veneer.methods._lowrank import Factored, Names
from veneer.types import Factors, HostShape, Site

_STEPS = 10_000
"""PEFT counts its phases in steps; a file says ours as shares of so many."""


def _decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    p, e, q = tensors["lora_B"], tensors["lora_E"], tensors["lora_A"]
    if p.dim() != 2 or q.dim() != 2 or tuple(e.shape) != (q.shape[0], 1) or p.shape[1] != q.shape[0]:
        raise ValueError(f"lora_B {list(p.shape)}, lora_E {list(e.shape)} and lora_A {list(q.shape)} are no triplets")
    return {"P": p, "E": e.reshape(-1), "Q": q}


def _config(method: Any, parts: Sequence[Part]) -> dict[str, Any]:
    kept = {p.target: len(p.tensors["E"]) for p in parts}
    masks = {f"{t}.lora_E": [i < rank for i in range(method.rank)] for t, rank in kept.items()}
    first, last = (round(share * _STEPS) for share in (method.hold_first, method.hold_last))
    return {
        "r": 8,  # PEFT's default: it warns about any other, and reads init_r
        "total_step": _STEPS,
        "tinit": first,
        "tfinal": last,
        "rank_pattern": masks if any(rank < method.rank for rank in kept.values()) else None,
        "init_lora_weights": True,
    }


def _parse(config: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    rank, total = config.get("init_r", 12), config.get("total_step") or 1
    kept = {p.target: len(p.tensors["E"]) for p in parts if p.target is not None and len(p.tensors["E"]) != rank}
    shares = {"hold_first": config.get("tinit", 0) / total, "hold_last": config.get("tfinal", 0) / total}
    return {"rank": rank, "alpha": config.get("lora_alpha", 8), "kept": kept, **shares}


@final
class AdaLoRA(Factored):
    """A low-rank update in SVD form that moves its ranks to where they matter."""

    kind: ClassVar[str] = "adalora"
    site: ClassVar[Site] = "weight"
    paper: ClassVar[str] = "2303.10512"
    summary: ClassVar[str] = "W + scale P diag(E) Q"
    use: ClassVar[str] = "layers differ in how much they need, and the budget of ranks is tight"
    limits: ClassVar[str] = "the run's length decides the schedule; linear layers; two more numbers of state each"
    peft: ClassVar[PeftForm | None] = PeftForm(
        peft_type="ADALORA",
        tensors={"Q": "lora_A", "P": "lora_B", "E": "lora_E"},
        encode=lambda t: {"lora_A": t["Q"], "lora_B": t["P"], "lora_E": t["E"][:, None]},
        decode=_decode,
        fields={
            "rank": "init_r",
            "target_rank": "target_r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "every": "deltaT",
            "beta1": "beta1",
            "beta2": "beta2",
            "orthogonality": "orth_reg_weight",
        },
        hosts=("linear", "conv1d"),
        config=_config,
        parse=_parse,
    )

    rank: int = Field(12, ge=1, description="triplets a layer at the start")
    target_rank: int = Field(8, ge=1, description="triplets a layer at the end, on average")
    alpha: float = Field(32.0, gt=0, description="numerator of the scale, alpha / rank")
    hold_first: float = Field(0.1, ge=0, lt=1, description="share of the steps before the budget falls")
    hold_last: float = Field(0.3, ge=0, lt=1, description="share of the steps after it has fallen, with fixed triplets")
    every: int = Field(1, ge=1, description="steps between two cuts")
    beta1: float = Field(0.85, gt=0, lt=1, description="decay of the running mean of importance")
    beta2: float = Field(0.85, gt=0, lt=1, description="decay of the running mean of its deviation")
    orthogonality: float = Field(0.5, ge=0, description="weight of the penalty that keeps P and Q orthogonal")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input during training")
    targets: Names = Field(("all-linear",), description="which layers carry the adapter")
    exclude: Names = Field((), description="layers to leave out")
    layers: str | tuple[int, ...] | None = Field(None, description="block numbers, or last:N, first:N")
    kept: Mapping[str, int] = Field(
        default_factory=dict, description="target -> triplets left; written when it is saved"
    )

    @model_validator(mode="after")
    def _has_a_phase(self) -> Self:
        if self.target_rank > self.rank:
            raise ValueError(f"target_rank {self.target_rank} is above the rank at the start, {self.rank}")
        if self.hold_first + self.hold_last >= 1:
            raise ValueError("hold_first and hold_last leave no step in which the budget could fall")
        return self

    def rank_at(self, target: str) -> int:
        return self.kept.get(target, self.rank)

    def refusal(self, target: str, shape: HostShape) -> str | None:
        if shape.kind not in ("linear", "conv1d"):
            return f"{shape.kind} layers take no AdaLoRA; linear layers do"
        most = min(shape.in_features, shape.out_features)
        return f"rank {self.rank} is above the layer's {most}" if self.rank > most else None

    def tensor_shapes(self, target: str, shape: HostShape) -> dict[str, tuple[int, ...]]:
        rank = self.rank_at(target)
        return {"P": (shape.out_features, rank), "E": (rank,), "Q": (rank, shape.in_features)}

    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.tensor_shapes(target, host.shape)
        p, q = (0.02 * torch.randn(shapes[name], generator=generator) for name in "PQ")
        return {"P": p, "E": torch.zeros(shapes["E"]), "Q": q}

    def factors(self, part: Part) -> tuple[Tensor, Tensor]:
        """The LoRA that this part is: Q and scale * P diag(E)."""
        t = part.tensors
        return t["Q"], t["P"] * (t["E"] * (self.alpha / (self.rank + 1e-5)))  # PEFT's guard, kept for equality

    def folded(self, adapter: Adapter) -> Adapter:
        """Without the triplets whose E is zero, and without the layers that keep none. A fresh adapter stays whole."""
        alive = {str(p.target): p.tensors["E"] != 0 for p in adapter.parts if p.kind == self.kind}
        if all(bool(mask.all()) for mask in alive.values()) or not any(bool(mask.any()) for mask in alive.values()):
            return adapter
        kept = {target: int(mask.sum()) for target, mask in alive.items()}
        parts = [_cut(p, alive[str(p.target)]) for p in adapter.parts if kept.get(str(p.target))]
        spec = self.model_copy(update={"kept": {target: n for target, n in kept.items() if n not in (0, self.rank)}})
        return replace(adapter, spec=spec, parts=tuple(parts))

    def regime(self, total: int) -> Regime:
        return Budget(self, total)


def _cut(part: Part, alive: Tensor) -> Part:
    t = part.tensors
    return replace(part, tensors={**t, "P": t["P"][:, alive], "E": t["E"][alive], "Q": t["Q"][alive]})


@final
class Budget(Regime):
    """The falling budget of one run: importance of every number, and which triplets are alive."""

    def __init__(self, spec: AdaLoRA, total: int) -> None:
        self._spec = spec
        self.first, self.last = round(spec.hold_first * total), total - round(spec.hold_last * total)
        self._state: dict[str, Tensor] = {}
        if self.last - self.first < 2:
            raise ConfigError(
                f"a run of {total} steps leaves AdaLoRA's budget none to fall in: it is held for the first {self.first} and "
                f"from step {self.last} on",
                help="train for more steps, hold it for fewer (hold_first, hold_last), or use lora",
            )

    @property
    def state(self) -> dict[str, Tensor]:
        return self._state

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._state = dict(state)

    def triplets(self, step: int, layers: int) -> int:
        """How many triplets of `layers` layers live after `step` steps."""
        start, end = self._spec.rank * layers, self._spec.target_rank * layers
        if step <= self.first:
            return start
        if step >= self.last:
            return end
        left = 1 - (step - self.first) / (self.last - self.first)
        return int((start - end) * left**3 + end)

    def penalty(self, parts: Sequence[Part]) -> Tensor | None:
        own = self._own(parts)
        if not self._spec.orthogonality or not own:
            return None
        total = own[0].tensors["P"].new_zeros(())
        for part in own:
            for gram in (part.tensors["P"].mT @ part.tensors["P"], part.tensors["Q"] @ part.tensors["Q"].mT):
                one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
                total = total + torch.linalg.matrix_norm(gram - one)
        return self._spec.orthogonality * total / (2 * len(own))

    @torch.no_grad()
    def after_step(self, step: int, parts: Sequence[Part], gradients: Sequence[Part]) -> None:
        own = self._own(parts)
        if step < self.last:
            for part, gradient in zip(own, self._own(gradients), strict=True):
                self._observe(part, gradient)
        falling = self.first < step < self.last and step % self._spec.every == 0
        if falling or step == self.last:
            self._choose(own, self.triplets(step, len(own)))
        if falling or step >= self.last:
            for part in own:
                part.tensors["E"].mul_(self._state[f"{part.target}.alive"])

    def _own(self, parts: Sequence[Part]) -> list[Part]:
        return [part for part in parts if part.kind == self._spec.kind]

    def _observe(self, part: Part, gradient: Part) -> None:
        """Running means of |w g| and of its deviation, for every number of a part."""
        for name, value in part.tensors.items():
            now = (value * gradient.tensors[name]).abs()
            mean, deviation = (f"{part.target}.{name}.{what}" for what in ("mean", "deviation"))
            for key in (mean, deviation):
                self._state.setdefault(key, torch.zeros_like(now))
            self._state[mean] = torch.lerp(now, self._state[mean], self._spec.beta1)
            apart = (now - self._state[mean]).abs()
            self._state[deviation] = torch.lerp(apart, self._state[deviation], self._spec.beta2)

    def _choose(self, own: Sequence[Part], budget: int) -> None:
        """Mark the `budget` most important triplets of all layers as alive."""
        scores = [self._importance(part) for part in own]
        alive = torch.zeros(sum(len(s) for s in scores), device=scores[0].device)
        alive[torch.cat(scores).topk(budget).indices] = 1.0
        for part, mask in zip(own, alive.split([len(s) for s in scores]), strict=True):
            self._state[f"{part.target}.alive"] = mask.clone()

    def _importance(self, part: Part) -> Tensor:
        """Of each triplet of a part."""

        def score(name: str) -> Tensor:
            return self._state[f"{part.target}.{name}.mean"] * self._state[f"{part.target}.{name}.deviation"]

        return score("E") + score("P").mean(0) + score("Q").mean(1)
