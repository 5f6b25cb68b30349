"""One YAML file is one run: defaults < file < `--set a.b=c`, every value with its origin, every key checked.

The resolved configuration is saved in the run directory with a comment on each line that says where the value came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator

from veneer import yaml_file
from veneer.base import formats
from veneer.errors import ConfigError, complaints, listed
from veneer.methods import METHODS, Method, load_all, parse
from veneer.registry import Declared, did_you_mean

Auto = Literal["auto"]
KEYS_HELP = "`veneer train --help` shows every key"
RUN_FILE = ("run file", f"write one; {KEYS_HELP}")


def _known_format(value: str | None) -> str | None:
    if value is not None and value not in (known := formats.load_all()):
        raise ValueError(f"no base format is called '{value}'; {did_you_mean(value, list(known))}")
    return value


BaseFormat: TypeAlias = Annotated[str | None, AfterValidator(_known_format)]
"""A name that is registered in `base/formats`, or None for a base as it is."""


class DataConfig(Declared):
    train: Path = Field(description="rows to train on")
    eval: Path | None = Field(None, description="held-out rows of the same task")
    general: Path | None = Field(None, description="held-out general text: what tuning costs elsewhere")
    format: Literal["auto", "messages", "conversations", "alpaca", "prompt/completion", "text"] = "auto"
    train_on: Literal["assistant", "last", "all"] = Field("assistant", description="whose tokens are labels")

    def files(self) -> tuple[Path, ...]:
        """Every data file that is named."""
        return tuple(path for path in (self.train, self.eval, self.general) if path is not None)


class TrainConfig(Declared):
    epochs: float = Field(2.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimiser steps")
    lr: float = Field(2e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    tokens_per_step: int = Field(8192, ge=1, description="whole rows until the next would exceed it, at least one")
    tokens_per_pass: int | Auto = Field("auto", description="micro-batch in tokens")
    memory: int | Auto = Field("auto", description="byte budget of the process")
    max_length: int = Field(1024, ge=2, description="longest row in tokens")
    on_too_long: Literal["error", "truncate", "drop"] = "error"
    optimizer: str = "adamw"
    lora_plus_ratio: float = Field(1.0, ge=1.0, description="learning rate of B over that of A (LoRA+)")
    weight_decay: float = Field(0.0, ge=0)
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm")
    seed: int = Field(0, ge=0)
    eval_every: int = Field(50, ge=1, description="optimiser steps between evaluations")
    save_every: int = Field(50, ge=1, description="optimiser steps between checkpoints")
    patience: int | None = Field(None, ge=1, description="stop after so many evaluations without a better one")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    recompute: Literal["auto", "none", "all"] = "auto"
    tensorboard: bool = Field(False, description="also write events for TensorBoard into the run directory")

    @model_validator(mode="before")
    @classmethod
    def _numbers_with_exponents(cls, values: Any) -> Any:
        """YAML 1.1 reads `2e-4` as text; people mean the number."""
        if isinstance(values, Mapping):
            return {k: _as_number(v) for k, v in values.items()}
        return values


class RunConfig(Declared):
    """Everything that decides a run."""

    base: str
    quantize: BaseFormat = Field(None, description="format of the base's projections: nf4, nf4-dq, int8, bf12, ...")
    data: DataConfig
    method: dict[str, Any] = Field(default_factory=lambda: {"kind": "lora"})
    train: TrainConfig = TrainConfig()
    out: Path

    @field_validator("out")
    @classmethod
    def _is_a_folder_of_its_own(cls, out: Path) -> Path:
        if out == Path():
            raise ValueError("empty, or the current folder: a run needs a folder of its own, as runs/tickets")
        return out

    def spec(self) -> Method:
        """The method that the `method` section declares."""
        return method_from(self.method)


@dataclass(frozen=True)
class Resolved:
    """A checked configuration and where each of its values came from ("train.lr" -> "tickets.yaml:9")."""

    config: RunConfig
    origins: Mapping[str, str]

    def to_yaml(self) -> str:
        """The whole configuration as YAML, each leaf with its origin as a comment."""
        values = self.config.model_dump(mode="json")
        values["method"] = {"kind": self.config.method.get("kind", "lora")} | self.config.spec().model_dump(mode="json")
        return "".join(_lines(values, "", self.origins, 0))


def resolve_paths(values: dict[str, Any], origins: Mapping[str, str], folder: Path) -> None:
    """Make data paths of a file relative to its folder. Paths from `--set` are relative to where the command runs."""
    data = values.get("data")
    for key in ("train", "eval", "general"):
        if isinstance(data, dict) and isinstance(data.get(key), str) and origins.get(f"data.{key}") != "--set":
            if "\0" in data[key]:
                raise ConfigError(f"data.{key} is {data[key]!r}, which holds a NUL", help="no file is called so")
            data[key] = str((folder / data[key]).resolve())


def validate(model: type[RunConfig], values: Mapping[str, Any], where: str) -> RunConfig:
    """A checked model, or one ConfigError with every wrong key."""
    problems: list[str] = []
    checked: RunConfig | None = None
    try:
        checked = model.model_validate(values)
    except ValidationError as error:
        problems += explain(error, model)
    method = values.get("method", {"kind": "lora"})
    if isinstance(method, Mapping):
        problems += _method(method)[1]
    if problems or checked is None:
        raise ConfigError(f"{where} is not a valid run:\n{listed(problems)}", help=KEYS_HELP)
    return checked


def method_from(fields: Mapping[str, Any]) -> Method:
    """A method from its YAML section; a ConfigError lists every wrong key."""
    method, problems = _method(fields)
    if method is None:
        raise ConfigError("; ".join(problems))
    return method


def _method(fields: Mapping[str, Any]) -> tuple[Method | None, list[str]]:
    load_all()
    rest = {k: _as_number(v) for k, v in fields.items()}
    kind = rest.setdefault("kind", "lora")
    if not isinstance(kind, str) or kind not in METHODS:
        return None, [f"method.kind: no method is called '{kind}'; {did_you_mean(str(kind), list(METHODS))}"]
    try:
        return parse(rest), []
    except ValidationError as error:
        return None, [f"method.{problem}" for problem in explain(error, METHODS[kind])]


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Each problem as `path: what is wrong`, with the nearest key for a mistyped one."""
    return complaints(
        error.errors(include_url=False),
        lambda key, section: did_you_mean(key, list(_section_of(model, section).model_fields)),
    )


def _section_of(model: type[BaseModel], path: Sequence[Any]) -> type[BaseModel]:
    for name in path:
        field = model.model_fields.get(str(name))
        inner = field.annotation if field is not None else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return model


def apply_override(override: str, values: dict[str, Any], origins: dict[str, str]) -> None:
    """Lay one `a.b=value` of the command line over the values."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override}: expected a.b=value", help="for example --set train.lr=1e-4")
    *parents, name = path.split(".")
    section = values
    for parent in parents:
        section[parent] = {} if section.get(parent) is None else section[parent]  # `train:` with nothing below it
        section = section[parent]
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: '{parent}' is a value, not a section", help=KEYS_HELP)
    try:
        section[name] = _as_number(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {override}: the value is not YAML: {yaml_file.reason(error)}", help=yaml_file.HELP
        ) from error
    for replaced in [known for known in origins if known.startswith(f"{path}.")]:
        del origins[replaced]
    origins |= dict.fromkeys(leaves({path: section[name]}), "--set")


def leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The paths of all values that are no sections."""
    found = []
    for key, value in values.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}"]
    return found


def _as_number(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _lines(values: Mapping[str, Any], prefix: str, origins: Mapping[str, str], depth: int) -> list[str]:
    lines = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            lines += ["  " * depth + f"{key}:\n", *_lines(value, f"{path}.", origins, depth + 1)]
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
            lines.append("  " * depth + f"{key}: {text}  # {origins.get(path, 'default')}\n")
    return lines
