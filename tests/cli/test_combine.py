"""combine, where what was typed and what a recipe says could contradict each other or be no recipe at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from veneer.adapter import Adapter, Part, Provenance
from veneer.algebra import combination, read_recipe
from veneer.cli.main import run
from veneer.errors import ConfigError
from veneer.methods.lora import LoRA

SIZES = {"q_proj": 12, "up_proj": 20}


def adapter(seed: int, *, up: int = 20, bias: bool = False) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    parts = [
        Part("lora", "weight", name, {"A": torch.randn(2, wide, generator=g), "B": torch.randn(16, 2, generator=g)})
        for name, wide in (SIZES | {"up_proj": up}).items()
    ]
    if bias:
        parts.append(Part("full", "override", "up_proj", {"bias": torch.ones(16)}))
    return Adapter(LoRA(rank=2, bias="all" if bias else "none"), tuple(parts))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    adapter(0).save(tmp_path / "a")
    adapter(1, up=24, bias=True).save(tmp_path / "wide")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [["--seed", "0"], ["--rule", "linear"], ["--others", "refuse"], ["--base", "y"]])
def test_any_option_beside_a_recipe_is_refused(
    words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "r.yaml").write_text("{rule: cat, seed: 3, base: x, adapters: {a: {path: a}}}")
    assert run(["combine", "r.yaml", *words, "--out", "out"]) == 2
    assert f"{words[0]} would have no effect" in capsys.readouterr().err and not (place / "out").exists()


def test_what_a_recipe_leaves_open_of_the_bases_is_said_beside_it(place: Path) -> None:
    for name in ("one", "two"):
        replace(adapter(0), provenance=Provenance(base=name * 20)).save(place / name)
    (place / "r.yaml").write_text("{adapters: {one: {path: one}, two: {path: two}}}")
    assert run(["combine", "r.yaml", "--out", "out"]) == 1
    assert run(["combine", "r.yaml", "--allow-base-mismatch", "a copy", "--out", "out"]) == 0
    extra = Adapter.load(place / "out").provenance.extra
    assert extra["base_mismatch_allowed"] == extra["recipe"]["allow_base_mismatch"] == "a copy"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "rank=x"], "rank is 'x', expected a whole number"),
        (["--set", "rank=["], "not YAML"),
        (["--rule", "ties", "--density", "0.2", "--set", "density=0.3"], "density is given twice"),
    ],
)
def test_options_that_are_none(words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["combine", "a=1", *words, "--out", "out"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{1: 2, adapters: {a: {path: a}}}", "{adapters: {1: {path: a}}}"])
def test_keys_that_are_no_words(text: str, place: Path) -> None:
    (place / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match="is not a recipe"):
        read_recipe(place / "r.yaml")


def test_a_selector_that_is_no_regular_expression() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        combination({"a": adapter(0)}, include=["re:("])


def test_targets_left_out_are_not_compared_either(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bias that is kept at a target that is left out makes it no target of the combination."""
    (place / "r.yaml").write_text("{adapters: {a: {path: a}, wide: {path: wide}}, exclude: [up_proj], others: keep}")
    assert run(["combine", "r.yaml", "--out", "out"]) == 0
    assert "linear over 1 targets" in capsys.readouterr().out


def test_a_weight_at_a_target_of_others_only_is_refused() -> None:
    biased = adapter(1, bias=True)
    biased = Adapter(biased.spec, tuple(p for p in biased.parts if p.target == "q_proj" or p.kind == "full"))
    with pytest.raises(ConfigError, match="'up_proj' matches no target of it"):
        combination({"a": adapter(0), "b": biased}, others="keep", weights={"b": {"up_proj": 0.1}})
