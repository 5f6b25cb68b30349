"""What a method is: a frozen declaration whose fields are its configuration, and a handful of pure functions.

A method is one file in this folder; the file's public class is found by name. From the declaration follow the YAML keys, the
parameter count, the file format, the docs row and the law suite.

    forward(x, part, host)   the definition: slow, plain, what the paper says
    lower(part, host)        the same as primitives (`types.py`), which training and the engine run
    merged(part, host)       the same as a plain weight, where the mathematics allows

The law that every method is tested against: forward = lowered = merged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from veneer.adapter import Adapter, HostSource, Part
from veneer.base.host import Host
from veneer.errors import Unsupported
from veneer.registry import Declared, Registry
from veneer.types import BaseShape, Factors, HostKind, HostShape, Lowered, Override, Primitive, Site

METHODS: Registry[type[Method]] = Registry("method")


@dataclass(frozen=True)
class PeftForm:
    """How PEFT's files name a method. What is said here is all that `formats/peft.py` knows of it.

    peft_type  as in adapter_config.json
    tensors    our tensor name -> what follows the module path in a key ("lora_A.weight")
    embedding  the same on an embedding; `shared` is the same for the tensors that all parts share
    remade     whether, by its config, a file leaves the shared tensors out because they can be made again
    optional   names that need not be there
    level      "module": keys carry a module path. "model": the tensors stand at the top of the file
    ranked     r, lora_alpha, use_rslora and the two patterns say the scale
    when       config values that tell methods of one peft_type apart
    fields     our field -> the config key that holds the same value
    encode     our tensors of a part -> PEFT's, where more than the name differs; `decode` is its inverse
    config     more config keys, from the method and its parts; `parse` gives the fields that they stand for
    """

    peft_type: str
    tensors: Mapping[str, str]
    embedding: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    remade: Callable[[Mapping[str, Any]], bool] = lambda config: False
    optional: Mapping[str, str] = field(default_factory=dict)
    level: Literal["module", "model"] = "module"
    ranked: bool = False
    when: Mapping[str, object] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    encode: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    decode: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]] | None = None
    hosts: tuple[HostKind, ...] = ("linear", "conv1d", "embedding")
    config: Callable[[Any, Sequence[Part]], dict[str, Any]] | None = None
    parse: Callable[[Mapping[str, Any], Sequence[Part]], dict[str, Any]] | None = None


class Regime(ABC):
    """What a method does in training beside following its gradient. One object a run; `state` goes into its checkpoints."""

    @property
    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that a later step depends on, by name. `load` takes it back."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None: ...

    def penalty(self, parts: Sequence[Part]) -> Tensor | None:
        """A term of the loss of each optimiser step, differentiable in the parts' tensors."""
        return None

    @abstractmethod
    def after_step(self, step: int, parts: Sequence[Part], gradients: Sequence[Part]) -> None:
        """Called after optimiser step `step` (from 1) with the parts as they are now and the step's gradients, by the same names.

        The parts' tensors are the run's own memory: what is written to them stays.
        """


class Method(Declared, ABC):
    """One way to adapt a base. Subclasses are final, frozen, and hold only configuration.

    `summary` is the formula, `use` when to choose it, `limits` what it can't do: the docs have a row of them for each method.

    A method with a field `targets` acts where that selects; any other says so itself (`places`).
    """

    kind: ClassVar[str]
    site: ClassVar[Site]
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    use: ClassVar[str] = ""
    limits: ClassVar[str] = ""
    peft: ClassVar[PeftForm | None] = None
    why_not_mergeable: ClassVar[str] = "its update is not a change of the weight"
    dense: ClassVar[bool] = False
    """Whether a weight part is lowered to the whole weight (`Override`), so that it costs a dense tensor for each layer."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Fields that a part off the weights depends on beside its tensors. An adapter of another method can't hold them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            METHODS.register(cls.kind)(cls)

    @abstractmethod
    def tensor_shapes(self, target: str, shape: HostShape) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every tensor a part at `target` stores."""

    @abstractmethod
    def start(self, target: str, host: Host, factors: Factors | None, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh fp32 tensors that leave the function unchanged. `factors` come from `inits/` for methods that have A and B."""

    @abstractmethod
    def forward(self, x: Tensor, part: Part, host: Host) -> Tensor:
        """The adapted output, from the definition."""

    @abstractmethod
    def lower(self, part: Part, host: Host) -> tuple[Primitive, ...]:
        """The part as primitives; differentiable in the part's tensors."""

    def lower_into(self, lowered: Lowered, part: Part, source: HostSource) -> Lowered:
        """`lowered` with this part in it. Sites other than `weight` say here where their primitives go."""
        assert part.target is not None
        primitives = self.lower(part, source.host(part.target))
        lowered = self.replacing(lowered, {f"{part.target}.weight": p for p in primitives if isinstance(p, Override)})
        primitives = tuple(p for p in primitives if not isinstance(p, Override))
        if not primitives:
            return lowered
        primitives = lowered.weights.get(part.target, ()) + primitives
        return replace(lowered, weights={**lowered.weights, part.target: primitives})

    @staticmethod
    def replacing(lowered: Lowered, overrides: Mapping[str, Override]) -> Lowered:
        """`lowered` with more replaced tensors. One tensor has one replacement: a second would hide the first."""
        if not overrides:
            return lowered
        twice = sorted(set(overrides) & set(lowered.overrides))
        if twice:
            raise Unsupported(
                f"two parts of this adapter replace {', '.join(twice)}",
                help="train the whole tensor (modules_to_save) or some rows of it (trainable_tokens), not both",
            )
        return replace(lowered, overrides={**lowered.overrides, **overrides})

    def places(self, shape: BaseShape) -> tuple[str, ...] | None:
        """Where its parts go, for methods that know; None where the field `targets` selects. "" is the whole model."""
        return None

    def companions(self, shape: BaseShape, targets: Sequence[str]) -> tuple[tuple[dict[str, Any], str], ...]:
        """Parts of other kinds that belong to the adapter: (the method's fields with `kind`, target)."""
        return ()

    def refusal(self, target: str, shape: HostShape) -> str | None:
        """Why `target` cannot carry this method, or None."""
        return None

    def shared_start(self, shapes: Sequence[HostShape], generator: torch.Generator) -> dict[str, Tensor]:
        """Tensors that all parts of one adapter share, stored once in a part without target (VeRA's A and B)."""
        return {}

    def direct_delta(self, part: Part) -> Tensor | None:
        """The dense update `[out, in]` in fp32 where it does not depend on the frozen weight, else None."""
        return None

    def merged(self, part: Part, host: Host) -> tuple[Tensor, Tensor | None]:
        """The adapted weight `[out, in]` and bias in fp32, or `Unsupported` with the way out."""
        raise Unsupported(
            f"{self.kind} cannot be merged into a weight: {self.why_not_mergeable}",
            help="serve it as it is, or train a method that merges (lora, dora, ia3, vera, full)",
        )

    def folded(self, adapter: Adapter) -> Adapter:
        """What files keep: the same function without what only training needs (a reparameterisation, a shifted start)."""
        return adapter

    def regime(self, total: int) -> Regime | None:
        """What happens in a run of `total` optimiser steps beside the optimiser's own work; None for most methods."""
        return None

    def prepared(self, encode: Callable[[str], Sequence[int]]) -> Self:
        """This method with the texts in its fields turned into token ids."""
        return self

    def completed(self, adapter: Adapter, source: HostSource) -> Adapter:
        """`adapter` with the tensors that its file leaves out because they follow from the base's sizes."""
        return adapter

    def scale(self, target: str, rank: int) -> float:
        """The effective scale at `target`. Methods without a scaled product refuse."""
        raise Unsupported(f"{self.kind} has no scale", help="only methods with a scaled product (lora, dora) have one")

    def scaled(self, factor: float) -> Self:
        """This method with the effective scale multiplied by `factor`."""
        raise Unsupported(f"{self.kind} cannot be scaled", help="only methods with a scaled product have a scale")

    def plain_scale(self, part: Part) -> float | None:
        """The s for which `lower` gives LowRank(A, s B) of the part's own tensors A and B and nothing else, or None."""
        return None

    def frozen(self) -> frozenset[str]:
        """Names of tensors that are stored but not trained."""
        return frozenset()

    def rank_at(self, target: str) -> int | None:
        """The rank at `target` for methods that have one."""
        return None
