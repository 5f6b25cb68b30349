"""What pydantic finds, in the words of a run file's or a request's author."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from veneer.errors import complaints


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lr: float = Field(1.0, gt=0, lt=2.5)


class Thing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int | Literal["auto"] = "auto"
    stop: str | list[str] = ""
    inner: Inner = Inner()
    files: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": "x"}, ["size: expected a whole number or 'auto', got 'x'"]),
        ({"stop": 5}, ["stop: expected text or a list, got 5"]),
        ({"stop": ["a", 5]}, ["stop.1: expected text, got 5"]),
        ({"inner": {"lr": 0}}, ["inner.lr: expected a number above 0, got 0"]),
        ({"inner": {"lr": 2.5}}, ["inner.lr: expected a number below 2.5, got 2.5"]),
        ({"inner": {"rl": 1}}, ["inner.rl: unknown key; near rl in ('inner',)"]),
        ({"inner": 3, "files": 4}, ["inner: expected keys and values, got 3", "files: expected a list, got 4"]),
    ],
)
def test_complaints(fields: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Thing.model_validate(fields)
    assert complaints(caught.value.errors(), lambda key, section: f"near {key} in {section}") == said
