"""What a rule is: one decorated function from the updates at one target to one product.

    @rule("mine")
    def mine(updates: Updates, *, density: Density = 0.2) -> Product: ...

The keyword arguments are the rule's schema: they are checked, suggested and documented from the signature. A rule works on
effective updates delta_t = B_t A_t with the scale inside B_t; whatever it does must not depend on how they are factored.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Concatenate, ParamSpec, TypeAlias, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor

from veneer.errors import ConfigError, complaints, listed
from veneer.registry import Registry, did_you_mean, discover

Density: TypeAlias = Annotated[float, Field(gt=0, le=1, description="share of the entries that is kept")]
Rank: TypeAlias = Annotated[int, Field(ge=1, description="rank of the result")]


@dataclass(frozen=True, eq=False)
class Updates:
    """What a rule sees of one target: the adapters' updates there, sorted by name.

    names    the adapters that touch this target
    weights  one number each; may be negative
    A        fp64 `[rank_t, in]` each
    B        fp64 `[out, rank_t]` each, the effective scale folded in
    rank     the largest rank an adapter stores here; None where none has one (IA3)
    seed     of the whole combination
    """

    target: str
    names: tuple[str, ...]
    weights: tuple[float, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    rank: int | None = None
    seed: int = 0

    def generators(self) -> list[torch.Generator]:
        """One random stream per adapter, from seed, name and target: the order of the adapters plays no part."""
        streams = []
        for name in self.names:
            key = hashlib.sha256(f"{self.seed}|{name}|{self.target}".encode()).digest()
            streams.append(torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True)))
        return streams


@dataclass(frozen=True, eq=False)
class Product:
    """The combined update B A, fp64. With `rank` it asks to be projected to that rank, the error reported."""

    B: Tensor
    A: Tensor
    rank: int | None = None


Rule: TypeAlias = Callable[..., Product]
P = ParamSpec("P")

RULES: Registry[Rule] = Registry("combination rule")


def rule(
    name: str,
) -> Callable[[Callable[Concatenate[Updates, P], Product]], Callable[Concatenate[Updates, P], Product]]:
    """File a function under `name` in `RULES`."""

    def file(function: Callable[Concatenate[Updates, P], Product]) -> Callable[Concatenate[Updates, P], Product]:
        RULES.register(name)(function)
        return function

    return file


def load_all() -> Registry[Rule]:
    """Every rule by its name; imports the files of this folder."""
    discover(__package__ or "veneer.algebra")
    return RULES


def schema(name: str) -> type[BaseModel]:
    """The options of a rule as a pydantic model, made from its keyword arguments."""
    function = load_all()[name]
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        key: (hints[key], ... if value.default is inspect.Parameter.empty else value.default)
        for key, value in inspect.signature(function).parameters.items()
        if value.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return create_model(f"{name} options", __config__=ConfigDict(extra="forbid", frozen=True), **fields)


def options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` checked against the rule's schema, defaults filled in; one ConfigError lists every problem."""
    model = schema(name)
    try:
        return model(**given).model_dump()
    except ValidationError as error:
        known = list(model.model_fields)
        problems = complaints(error.errors(), lambda key, _: did_you_mean(key, known))
        raise ConfigError(
            f"rule '{name}' can't take these options:\n{listed(problems)}",
            help=f"options of '{name}': {', '.join(known) or 'none'}",
        ) from error
