"""4-bit merges keep the update, say how much of it, and are what bitsandbytes reads."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from tests.models.tiny import checkpoint
from veneer.adapter import Adapter
from veneer.errors import Unsupported
from veneer.inject import create
from veneer.merge import merge, merge_four_bit
from veneer.merge.four_bit import TABLES, Levels, stochastic
from veneer.methods.lora import LoRA
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.ops import four_bit
from veneer.ops.four_bit import Table

SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 97}


def pair(tmp_path: Path, size: float = 0.004) -> tuple[Base, Adapter]:
    base = load_base(checkpoint("llama", tmp_path / "base", **SIZES), "float32")
    g = torch.Generator().manual_seed(1)
    fresh = create(base, LoRA(rank=4, alpha=4), g)
    return base, fresh.map_tensors(lambda t: t + size * torch.randn(t.shape, generator=g))


def test_the_usual_route_loses_the_update_and_ours_keep_it(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path)
    dot = square = 0.0
    for target in adapter.targets:
        held = four_bit.quantise(base.host(target).weight(), TABLES["nf4"])
        before = held.dequantise(torch.empty(held.shape))
        again = four_bit.quantise(before + adapter.delta(target), TABLES["nf4"]).dequantise(torch.empty(held.shape))
        dot += float(((again - before) * adapter.delta(target)).sum())
        square += float(adapter.delta(target).square().sum())
    assert dot / square < 0.5
    original = merge_four_bit(base, adapter, tmp_path / "a")
    noisy = merge_four_bit(base, adapter, tmp_path / "b", route="stochastic")
    assert original.gain == pytest.approx(1, abs=0.1)
    assert noisy.gain == pytest.approx(1, abs=0.1)
    assert set(original.gains) == {f"{t}.weight" for t in adapter.targets}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_stochastic_rounding_on_the_grid_keeps_the_mean(table: Table) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 64, generator=g)
    draws = [stochastic(weight, table, g, double=False).dequantise(torch.empty(4, 64)) for _ in range(400)]
    stack = torch.stack(draws)
    off = (stack.mean(0) - weight).abs() / (stack.std(0) / 20 + 1e-6)
    assert float((off < 4).double().mean()) > 0.99
    on_grid = draws[0]
    torch.testing.assert_close(stochastic(on_grid, table, g, double=False).dequantise(torch.empty(4, 64)), on_grid)


def test_a_gain_below_the_limit_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = pair(tmp_path)
    monkeypatch.setattr(importlib.import_module("veneer.merge.four_bit"), "ENOUGH", 2.0)
    with pytest.raises(Unsupported, match="would survive in 4 bits"):
        merge_four_bit(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantised = load_base(tmp_path / "base", "float32", "nf4")
    with pytest.raises(Unsupported, match="its own weights"):
        merge_four_bit(quantised, adapter, tmp_path / "out")


def test_a_quantised_base_merges_to_the_function_that_was_trained(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, 0.05)
    quantised = load_base(tmp_path / "base", "float32", "nf4")
    merge(quantised, adapter, tmp_path / "out")
    again = load_base(tmp_path / "out", "float32")
    for target in adapter.targets:
        wanted = quantised.host(target).weight() + adapter.delta(target)
        torch.testing.assert_close(again.host(target).weight(), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(again.host(target).weight(), base.host(target).weight() + adapter.delta(target))


@pytest.mark.parity
@pytest.mark.parametrize(("levels", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
def test_bitsandbytes_reads_the_same_weights(tmp_path: Path, levels: Levels, double: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    base, adapter = pair(tmp_path, 0.05)
    merge_four_bit(base, adapter, tmp_path / "out", levels=levels, double=double)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for target in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        layer = model.get_submodule(target)
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        theirs = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        exact = base.host(target).weight() + adapter.delta(target)
        ours = four_bit.quantise(exact, TABLES[levels], double=double).dequantise(torch.empty(exact.shape))
        # Their kernel for fp4 on the CPU has a table of four digits.
        rtol, atol = (1e-5, 1e-6) if levels == "nf4" else (2e-3, 1e-5)
        torch.testing.assert_close(theirs.view(exact.shape), ours, rtol=rtol, atol=atol)
