"""What a comparison of methods is: data, methods with their learning rates, token budgets, and the cells that follow from them.

A cell is one training and its scores. Search cells train `search_tokens` at each of a method's rates with seed 0 and are scored
on the first third of the held-out rows; final cells train `tokens` at the rate that scored best, with several seeds, and are
scored on the other rows, so that choosing a rate cannot flatter the figure.

The surprise: every method gets a grid of its own. One rate for all would compare how well it suits each.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from veneer import __version__, yaml_file
from veneer.data import file_digest
from veneer.errors import ConfigError, listed
from veneer.registry import Declared, did_you_mean
from veneer.train.config import (
    RUN_FILE,
    BaseFormat,
    TrainConfig,
    apply_override,
    explain,
    method_from,
    resolve_paths,
)

Stage = Literal["search", "final"]

HELP = "`veneer bench --help` shows an example"
PREFIX_TEXT = (
    "You are asked to say a sentence your own way. "
    "Answer with that one sentence and nothing else, and keep what it means."
)
DEFAULTS: Mapping[str, Any] = {
    "base": "smollm2-135m",
    "methods": {
        "lora": {"method": {"kind": "lora", "rank": 16, "alpha": 32}, "rates": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]},
        "rslora": {
            "method": {"kind": "lora", "rank": 16, "alpha": 16, "scaling": "alpha/sqrt(r)"},
            "rates": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        },
        "dora": {"method": {"kind": "dora", "rank": 16, "alpha": 32}, "rates": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]},
        "ia3": {"method": {"kind": "ia3"}, "rates": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1]},
        "prefix": {
            "method": {"kind": "prefix", "num_tokens": 20, "encoder": 0, "init": "text", "init_text": PREFIX_TEXT},
            "rates": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
        },
        "bottleneck": {
            "method": {"kind": "bottleneck", "style": "pfeiffer", "size": 64},
            "rates": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
        },
        "vera": {"method": {"kind": "vera", "rank": 256}, "rates": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1]},
        "full": {"method": {"kind": "full", "layers": "last:4"}, "rates": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]},
    },
    "train": {"tokens_per_step": 512, "max_length": 512, "on_too_long": "truncate"},
}
"""The comparison that runs where nothing else is said. A file's `methods` takes the place of these; other keys are laid over."""

FIXED = ("lr", "seed", "epochs", "max_steps", "patience", "eval_every", "save_every")
"""Keys of `train` that a comparison decides itself."""


class Entry(Declared):
    """One method of the comparison."""

    method: dict[str, Any] = Field(description="as the `method` section of a run file")
    rates: tuple[float, ...] = Field(min_length=1, description="learning rates to try")


class Files(Declared):
    """The rows."""

    train: Path = Field(description="rows to train on")
    eval: Path = Field(description="held-out rows: a third chooses the rates, the rest is the result")
    general: Path | None = Field(None, description="held-out general text: what tuning costs elsewhere")
    format: Literal["auto", "messages", "conversations", "alpaca", "prompt/completion", "text"] = "auto"


class Comparison(Declared):
    """Everything that decides a comparison."""

    base: str
    quantize: BaseFormat = None
    data: Files
    methods: dict[str, Entry] = Field(min_length=1)
    search_tokens: int = Field(15_000, ge=1, description="training tokens for each rate")
    tokens: int = Field(40_000, ge=1, description="training tokens for each seed at the best rate")
    seeds: int = Field(3, ge=1, le=20)
    answers: int = Field(40, ge=0, description="held-out questions that each final adapter answers in words")
    train: TrainConfig

    def only(self, names: Sequence[str]) -> Comparison:
        """The same with these methods alone."""
        wrong = [f"'{n}': {did_you_mean(n, list(self.methods))}" for n in names if n not in self.methods]
        if wrong:
            raise ConfigError(f"methods that are not in this comparison:\n{listed(wrong)}", help=HELP)
        return self.model_copy(update={"methods": {n: self.methods[n] for n in dict.fromkeys(names)}})


@dataclass(frozen=True, eq=False)
class Cell:
    """One training and its scores, as plain values that another process can read."""

    method: str
    rate: float
    seed: int
    stage: Stage
    tokens: int
    fields: Mapping[str, Any]
    base: str
    quantize: str | None
    train: Mapping[str, Any]
    files: Mapping[str, str]
    digests: Mapping[str, str]
    answers: int

    @property
    def name(self) -> str:
        """What its files are called."""
        safe = re.sub(r"[^\w.-]", "_", self.method)
        return f"{self.stage}-{safe}-{self.rate:g}-seed{self.seed}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides its figures. Where its files are does not."""
        decisive = {k: v for k, v in self.as_dict().items() if k != "files"} | {"veneer": __version__}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read(path: Path | None, overrides: Sequence[str], examples: Path) -> Comparison:
    """The comparison of a YAML file (None: the project's own, on the demo data in `examples`), `A.B=C` texts laid over it."""
    values: dict[str, Any] = deepcopy(dict(DEFAULTS))
    if path is not None:
        own, origins = yaml_file.read(path, *RUN_FILE)
        resolve_paths(own, origins, path.parent)
        values = {**values, **own, "train": {**values["train"], **_section(own, "train")}}
    if "data" not in values:
        values["data"] = {
            "train": str(examples / "jive.train.jsonl"),
            "eval": str(examples / "jive.eval.jsonl"),
            "general": str(examples / "general.jsonl"),
        }
    for override in overrides:
        apply_override(override, values, {})
    return _validated(values, "the comparison" if path is None else str(path))


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: expected a section of keys and values, got {found!r}", help=HELP)
    return found


def _validated(values: Mapping[str, Any], where: str) -> Comparison:
    problems = [f"train.{key}: a comparison sets it itself" for key in FIXED if key in values["train"]]
    checked = None
    try:
        checked = Comparison.model_validate(values)
    except ValidationError as error:
        problems += explain(error, Comparison)
    for name, entry in checked.methods.items() if checked is not None else ():
        problems += [f"methods.{name}.rates: {r:g} is not a positive number" for r in entry.rates if not r > 0]
        if len(set(entry.rates)) != len(entry.rates):
            problems.append(f"methods.{name}.rates: a rate stands there twice")
        try:
            method_from(entry.method)
        except ConfigError as error:
            problems.append(f"methods.{name}.{error.message}")
    if problems or checked is None:
        raise ConfigError(f"{where} is not a valid comparison:\n{listed(problems)}", help=HELP)
    return checked


def search_cells(comparison: Comparison) -> list[Cell]:
    """Every rate of every method, rates in ascending order."""
    digests = _digests(comparison)
    return [
        _cell(comparison, name, rate, 0, "search", digests)
        for name, entry in comparison.methods.items()
        for rate in sorted(entry.rates)
    ]


def final_cells(comparison: Comparison, best: Mapping[str, float]) -> list[Cell]:
    """Every seed of every method that has a best rate. Seeds take turns, so that a break leaves every method with some."""
    digests = _digests(comparison)
    return [
        _cell(comparison, name, rate, seed, "final", digests)
        for seed in range(1, comparison.seeds + 1)
        for name, rate in best.items()
    ]


def _cell(comparison: Comparison, name: str, rate: float, seed: int, stage: Stage, digests: Mapping[str, str]) -> Cell:
    files = comparison.data
    train = comparison.train.model_dump(mode="json", exclude_unset=True) | {"lr": rate, "seed": seed}
    return Cell(
        method=name,
        rate=rate,
        seed=seed,
        stage=stage,
        tokens=comparison.search_tokens if stage == "search" else comparison.tokens,
        fields={"kind": "lora"} | comparison.methods[name].method,
        base=comparison.base,
        quantize=comparison.quantize,
        train=train,
        files={k: str(v) for k, v in files.model_dump().items() if v is not None},
        digests=digests,
        answers=comparison.answers if stage == "final" else 0,
    )


def _digests(comparison: Comparison) -> dict[str, str]:
    data = comparison.data
    named = {"train": data.train, "eval": data.eval, "general": data.general}
    return {name: file_digest(path) for name, path in named.items() if path is not None} | {"format": data.format}
