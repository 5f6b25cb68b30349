"""A combination as a file: what goes in, with which weights, by which rule. The file has a digest, and the result records it.

    rule: ties
    options: {density: 0.3}
    adapters:
      legal: {path: adapters/legal, weight: 0.7, targets: {"mlp.*": 0.4}}
      tone: {path: adapters/tone, weight: 0.3}
    exclude: [lm_head]
    seed: 0

The digest covers the adapters' own digests, so the same recipe over other adapters is another recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from veneer import yaml_file
from veneer.adapter import Adapter, HostSource
from veneer.algebra._combine import Combination, Others, combination
from veneer.errors import ConfigError, complaints, listed
from veneer.registry import did_you_mean


class Entry(BaseModel):
    """One adapter of a recipe. `targets` replaces the weight where a selector matches; the first match wins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="adapter folder, relative to the recipe")
    weight: float = Field(1.0, allow_inf_nan=False, description="weight in the combination; may be negative")
    targets: dict[str, FiniteFloat] = Field(default_factory=dict, description="selector -> weight there")


class Recipe(BaseModel):
    """A combination to run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str = Field("linear", description="combination rule")
    options: dict[str, Any] = Field(default_factory=dict, description="the rule's own options")
    adapters: dict[str, Entry] = Field(min_length=1, description="name -> adapter")
    base: str | None = Field(None, description="base, for adapters whose update depends on its weights (DoRA, IA3)")
    rank: int | None = Field(None, ge=1, description="largest rank of the result")
    seed: int = Field(0, description="seed of the random rules")
    include: tuple[str, ...] = Field((), description="selectors of the targets to combine")
    exclude: tuple[str, ...] = Field((), description="selectors of the targets to leave out")
    others: Others = Field("refuse", description="parts that are no weight update: refuse, keep, drop")
    allow_base_mismatch: str | None = Field(None, description="reason for combining adapters of different bases")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file, or one ConfigError that lists everything wrong with it."""
    fields, _ = yaml_file.read(path, "recipe", "docs/howto/combine.md shows one")
    recipe = recipe_of(fields, f"{path} is not a recipe")
    entries = {n: e.model_copy(update={"path": str(path.parent / e.path)}) for n, e in recipe.adapters.items()}
    return recipe.model_copy(update={"adapters": entries})


def recipe_of(fields: Mapping[str, Any], wrong: str) -> Recipe:
    """The recipe of these fields, or one ConfigError that begins with `wrong` and lists everything that is."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{wrong}:\n{listed(complaints(error.errors(), _near))}") from error


def _near(key: str, section: Sequence[Any]) -> str:
    return did_you_mean(key, list(Entry.model_fields if section else Recipe.model_fields))


def digest(recipe: Recipe, adapters: Mapping[str, Adapter]) -> str:
    """SHA-256 over the recipe with each path replaced by what stands there."""
    fields = recipe.model_dump(mode="json")
    for name, adapter in adapters.items():
        fields["adapters"][name]["path"] = adapter.digest
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _apart(recipe: Recipe) -> tuple[dict[str, Any], int | None]:
    """The options that are the rule's alone, and the rank, which may stand among them."""
    options = dict(recipe.options)
    inner = options.pop("rank", None)
    rank = recipe.rank if inner is None else inner
    if recipe.rank not in (None, rank):
        raise ConfigError(f"the rank is {recipe.rank}, and {rank} among the rule's options", help="say it once")
    if fields := sorted(options.keys() & {*Recipe.model_fields, "weights"}):
        raise ConfigError(
            f"{', '.join(fields)}: no option of the rule '{recipe.rule}'",
            help="it belongs beside `options` in a recipe; `veneer combine --rules` lists the options of each rule",
        )
    return options, rank


def run_recipe(
    recipe: Recipe, load: Callable[[str], Adapter] = Adapter.load, base: HostSource | None = None
) -> Combination:
    """Load the adapters and combine them; the recipe and its digest are recorded in the result."""
    adapters = {name: load(entry.path) for name, entry in recipe.adapters.items()}
    options, rank = _apart(recipe)
    made = combination(
        {name: (adapter, recipe.adapters[name].weight) for name, adapter in adapters.items()},
        recipe.rule,
        base=base,
        rank=rank,
        seed=recipe.seed,
        include=recipe.include,
        exclude=recipe.exclude,
        weights={name: entry.targets for name, entry in recipe.adapters.items() if entry.targets},
        others=recipe.others,
        allow_base_mismatch=recipe.allow_base_mismatch,
        **options,
    )
    note = {"recipe": recipe.model_dump(mode="json"), "recipe_digest": digest(recipe, adapters)}
    provenance = replace(made.adapter.provenance, extra={**made.adapter.provenance.extra, **note})
    return Combination(replace(made.adapter, provenance=provenance), made.report)
