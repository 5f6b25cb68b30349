"""The formulas against the published tables: every row of the memory table, and the corrected statements about LoRA's sizes."""

from __future__ import annotations

import pytest

from veneer.methods import parse
from veneer.models.families import decoder_config, layout
from veneer.plan.bytes import (
    FULL_RECIPES,
    TRAINED,
    base_bytes,
    block_activations,
    linear_bytes,
    stored_bytes,
)
from veneer.plan.counts import adapter_parameters
from veneer.plan.sizes import KNOWN, Sizes, sizes_of
from veneer.types import BaseShape, HostShape


def sizes(name: str) -> Sizes:
    config = decoder_config(KNOWN[name])
    return sizes_of(config, layout(config))


def shape(name: str) -> BaseShape:
    config = decoder_config(KNOWN[name])
    return layout(config).base_shape(config)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def lora(name: str, rank: int, *, only: tuple[str, ...] = ATTENTION + MLP) -> int:
    base = shape(name)
    targets = [path for path in base.hosts if path.rsplit(".", 1)[-1] in only]
    return adapter_parameters(parse({"kind": "lora", "rank": rank}), base, targets)


def billions(count: float) -> float:
    return count / 1e9


# model, parameters and those in linear layers (B), bf16 GB, full fine-tuning at 16 and 12 B a parameter (GB), NF4+DQ linear GB,
# the rest in 16 bits GB, their sum GB, NF4 without DQ GB, r=16 all-linear: M, bf16 MB, training state GB; r=16 on q and v: MB
ROWS = [
    ("LLaMA-7B", 6.738, 6.476, 13.5, 107.8, 80.9, 3.34, 0.52, 3.87, 4.17, 39.98, 80.0, 0.64, 16.8),
    ("Llama-3-8B", 8.030, 6.979, 16.1, 128.5, 96.4, 3.60, 2.10, 5.70, None, 41.94, 83.9, 0.67, 13.6),
    ("LLaMA-65B", 65.286, 64.760, 130.6, 1044.6, 783.4, 33.41, 1.05, 34.46, 37.5, 199.9, 399.8, 3.20, 83.9),
    ("Llama-2-70B", 68.977, 68.451, 138.0, 1103.6, 827.7, 35.31, 1.05, 36.36, None, 207.1, 414.2, 3.31, 65.5),
    ("Llama-3-70B", 70.554, 68.451, 141.1, 1128.9, 846.6, 35.31, 4.21, 39.52, None, 207.1, 414.2, 3.31, 65.5),
]


def near(value: float, printed: float) -> bool:
    """Equal to the printed digits: within half a unit of the last one (and a hair, for values printed on the edge)."""
    digits = len(str(printed).partition(".")[2])
    return abs(value - printed) <= 0.501 * 10**-digits


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_memory_table(row: tuple[str, *tuple[float, ...]]) -> None:
    name, params, linear, weights, mixed, no_master, nf4_linear, rest, nf4, no_dq, millions, megabytes, state, qv = row
    base = sizes(name)
    full = lora(name, 16)
    found = {
        "parameters": (billions(base.parameters), params),
        "in linear": (billions(base.in_linear), linear),
        "bf16": (billions(base_bytes(base, "bfloat16")), weights),
        "full, 16 B": (billions(FULL_RECIPES["mixed"] * base.parameters), mixed),
        "full, 12 B": (billions(FULL_RECIPES["no-master"] * base.parameters), no_master),
        "NF4+DQ linear": (billions(linear_bytes(base, "nf4-dq")), nf4_linear),
        "the rest": (billions(base_bytes(base, "bfloat16", "nf4-dq") - linear_bytes(base, "nf4-dq")), rest),
        "NF4+DQ": (billions(base_bytes(base, "bfloat16", "nf4-dq")), nf4),
        "NF4": (billions(base_bytes(base, "bfloat16", "nf4")), no_dq),
        "adapter M": (full / 1e6, millions),
        "adapter MB": (2 * full / 1e6, megabytes),
        "training state": (billions(TRAINED * full), state),
        "q, v MB": (2 * lora(name, 16, only=("q_proj", "v_proj")) / 1e6, qv),
    }
    wrong = {what: pair for what, pair in found.items() if pair[1] is not None and not near(*pair)}
    assert not wrong


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [("LLaMA-7B", 1_048_576, 1_449_984), ("Llama-3-8B", 851_968, 1_769_472)],
)
def test_numbers_per_rank(name: str, attention: int, mlp: int) -> None:
    assert lora(name, 1, only=ATTENTION) == attention
    assert lora(name, 1, only=MLP) == mlp
    assert lora(name, 1) == attention + mlp


@pytest.mark.parametrize(("name", "count"), [("LLaMA-65B", 12_492_800), ("Llama-2-70B", 12_943_360)])
def test_numbers_per_rank_of_the_large_ones(name: str, count: int) -> None:
    assert lora(name, 1) == count


@pytest.mark.parametrize(("name", "factor"), [("LLaMA-7B", 2.38), ("Llama-3-8B", 3.08)])
def test_adding_the_mlp_multiplies_the_size(name: str, factor: float) -> None:
    assert near(lora(name, 8) / lora(name, 8, only=ATTENTION), factor)


def test_one_square_matrix_saves_d_over_2r() -> None:
    """4096 x 4096 at rank 8: 65,536 numbers, 256 times fewer. Not ten thousand."""
    count = _square(4096, 8, targets=1)
    assert count == 65_536
    assert 4096**2 / count == 4096 / (2 * 8) == 256


def test_where_ten_thousand_times_comes_from() -> None:
    """GPT-3, rank 4 on q and v only, against all its parameters (175,255.8 M as published)."""
    count = _square(12288, 4, targets=2 * 96)
    assert count == 18_874_368
    assert int(175_255.8e6 / count) == 9_285
    assert 2 * count == 36 * 2**20  # fp16


def test_the_smallest_published_adapter() -> None:
    """4.7 M trainable is rank 1 on q and v of GPT-3."""
    assert _square(12288, 1, targets=2 * 96) == 4_718_592


def test_a_4_bit_65b_fits_one_48_gb_card_and_no_24_gb_card() -> None:
    weights = billions(base_bytes(sizes("LLaMA-65B"), "bfloat16", "nf4-dq"))
    adapter = billions(12 * lora("LLaMA-65B", 64))
    checkpoints = billions(block_activations(8192, 64, 80, 2048, policy="full"))
    assert near(weights, 34.5) and near(adapter, 9.6) and near(checkpoints, 2.7)
    assert near(weights + adapter + checkpoints, 46.7)  # the table says 46.8, the sum of its rounded terms
    assert weights > 32 and weights + adapter + checkpoints < 48


def test_a_16_bit_70b_does_not_fit_one_80_gb_card() -> None:
    assert near(billions(base_bytes(sizes("Llama-2-70B"), "bfloat16")), 138.0)
    assert near(billions(base_bytes(sizes("Llama-3-70B"), "bfloat16")), 141.1)


def test_what_an_80_mb_adapter_is() -> None:
    """LLaMA-7B, all linear layers, rank 16, in 16 bits; for a 70B the same is 414 MB, q and v alone 65.5 MB."""
    assert near(2 * lora("LLaMA-7B", 16) / 1e6, 80.0)
    assert near(2 * lora("Llama-2-70B", 16, only=("q_proj", "v_proj")) / 1e6, 65.5)
    assert round(2 * lora("Llama-2-70B", 16) / 1e6) == 414


def test_full_fine_tuning_conventions() -> None:
    assert {name: FULL_RECIPES[name] for name in sorted(FULL_RECIPES)} == {
        "16-bit": 8,
        "fp32-gradients": 18,
        "mixed": 16,
        "no-master": 12,
    }
    assert near(billions(16 * sizes("LLaMA-65B").parameters) / 1000, 1.045)
    assert near(billions(12 * sizes("LLaMA-65B").parameters), 783.4)


def test_bits_of_nf4() -> None:
    """4.5 bits a weight, 4.127 with double quantisation."""
    rows, columns = 4096, 4096
    assert 8 * stored_bytes("nf4", rows, columns) / rows / columns == 4.5
    assert near(8 * stored_bytes("nf4-dq", rows, columns) / rows / columns, 4.127)


@pytest.mark.parametrize(
    ("hidden", "heads", "layers", "none", "selective", "full"),
    [(12288, 96, 96, 275.4, 82.1, 4.8), (4096, 32, 32, 30.6, 9.1, 0.54), (8192, 64, 80, 153.0, 45.6, 2.7)],
    ids=["GPT-3", "7B", "65B"],
)
def test_activation_table(hidden: int, heads: int, layers: int, none: float, selective: float, full: float) -> None:
    found = [billions(block_activations(hidden, heads, layers, 2048, policy=p)) for p in ("none", "selective", "full")]  # type: ignore[arg-type]
    assert all(near(value, printed) for value, printed in zip(found, (none, selective, full), strict=True)), found


def test_scores_are_most_of_gpt3() -> None:
    assert 5 * 96 * 2048 / 12288 == 80


def _square(width: int, rank: int, targets: int) -> int:
    hosts = {f"layers.{i}.q_proj": HostShape("linear", width, width) for i in range(targets)}
    base = BaseShape(width, targets, 1, 1, width, 1, hosts)
    return adapter_parameters(parse({"kind": "lora", "rank": rank}), base, list(hosts))
