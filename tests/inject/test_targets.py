"""Selectors: each form, strictness, and the coverage table."""

from __future__ import annotations

import pytest

from veneer.errors import ConfigError, TargetError
from veneer.inject.targets import layer_of, matching, select
from veneer.methods.lora import LoRA
from veneer.types import BaseShape, HostShape


def shape(layers: int = 4) -> BaseShape:
    hosts = {"model.embed_tokens": HostShape("embedding", 100, 16)}
    for i in range(layers):
        for name, (fan_in, fan_out) in {
            "self_attn.q_proj": (16, 16),
            "self_attn.k_proj": (16, 8),
            "mlp.up_proj": (16, 32),
            "mlp.down_proj": (32, 16),
        }.items():
            hosts[f"model.layers.{i}.{name}"] = HostShape("linear", fan_in, fan_out)
    hosts["lm_head"] = HostShape("linear", 16, 100)
    return BaseShape(16, layers, 4, 2, 4, 100, hosts, head="lm_head")


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        ("all-linear", 16),
        ("q_proj", 4),
        ("self_attn.k_proj", 4),
        ("model.layers.2.mlp.up_proj", 1),
        ("*.mlp.*", 8),
        (r"re:.*layers\.[01]\..*_proj", 8),
        ("embed_tokens", 1),
        ("lm_head", 1),
    ],
)
def test_each_form_of_selector_matches(entry: str, count: int) -> None:
    assert len(list(matching(entry, shape()))) == count


def test_a_suffix_is_whole_names_only() -> None:
    assert list(matching("proj", shape())) == []


def test_targets_keep_checkpoint_order_and_numbers_add_up() -> None:
    spec = LoRA(rank=2, targets=("down_proj", "q_proj"), rank_pattern={"down_proj": 4})
    selection = select(shape(), spec)
    assert selection.targets[:2] == ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
    assert selection.parameters == 4 * (2 * (16 + 16) + 4 * (32 + 16))


@pytest.mark.parametrize(
    ("layers", "expected"), [("last:2", {2, 3}), ("first:1", {0}), ((1, 3), {1, 3}), (None, {0, 1, 2, 3})]
)
def test_layers_keeps_blocks_by_number(layers: object, expected: set[int]) -> None:
    selection = select(shape(), LoRA(rank=2, layers=layers))
    assert {layer_of(path) for path in selection.targets} == expected


def test_exclude_takes_the_same_words() -> None:
    selection = select(shape(), LoRA(rank=2, exclude=("*.mlp.*", "re:.*layers.0.*")))
    assert len(selection.targets) == 6


def test_everything_wrong_is_said_at_once() -> None:
    spec = LoRA(
        rank=9,
        targets=("q_prj", "k_proj"),
        exclude=("gate_proj",),
        rank_pattern={"o_proj": 2},
        alpha_pattern={"v_proj": 2.0},
    )
    with pytest.raises(TargetError) as caught:
        select(shape(), spec)
    text = str(caught.value)
    for part in (
        "'q_prj' matches nothing",
        "did you mean 'q_proj'",
        "gate_proj",
        "o_proj",
        "v_proj",
        "rank 9 at",
        "help:",
    ):
        assert part in text, part


@pytest.mark.parametrize("layers", ["last:9", "middle:2", "last:0", (0, 7)])
def test_wrong_layers_are_refused(layers: object) -> None:
    with pytest.raises(TargetError, match="layers"):
        select(shape(), LoRA(rank=2, layers=layers))


def test_a_broken_regular_expression_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="regular expression"):
        list(matching("re:(", shape()))


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(TargetError, match="leave no layer"):
        select(shape(), LoRA(rank=2, targets=("q_proj",), exclude=("q_proj",)))
