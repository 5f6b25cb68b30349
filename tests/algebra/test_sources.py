"""Adapters of other methods in a combination: exact, or refused with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import checkpoint
from veneer import methods
from veneer.adapter import Adapter
from veneer.algebra import combination, combine, interference
from veneer.errors import ConfigError, NeedsBase, Unsupported
from veneer.inject import attached, create
from veneer.methods.lora import LoRA
from veneer.models.base import Base
from veneer.models.load import load_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(checkpoint("qwen2", tmp_path_factory.mktemp("base")), "float32")


def trained(base: Base, fields: dict[str, Any], seed: int = 0, size: float = 0.05) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    spec = methods.parse(fields)
    fresh = create(base, spec, g)
    frozen = spec.frozen()
    parts = []
    for part in fresh.parts:
        noise = {n: t if n in frozen else t + size * torch.randn(t.shape, generator=g) for n, t in part.tensors.items()}
        parts.append(type(part)(part.kind, part.site, part.target, noise, part.host))
    return Adapter(spec, tuple(parts))


O = {"targets": ["o_proj", "down_proj"], "rank": 3}


@pytest.mark.parametrize("rule", ["cat", "linear", "svd"])
@pytest.mark.parametrize("kind", ["dora", "vera"])
def test_a_sum_with_an_update_that_depends_on_the_base(base: Base, kind: str, rule: str) -> None:
    odd, lora = trained(base, {"kind": kind, **O}), trained(base, {"kind": "lora", **O}, 1)
    with pytest.raises(NeedsBase, match=kind):
        combine({"odd": odd, "lora": lora}, rule)
    made = combination({"odd": (odd, 0.5), "lora": lora}, rule, base=base, rank=48)
    for target in lora.targets:
        wanted = 0.5 * odd.delta(target, base) + lora.delta(target)
        torch.testing.assert_close(made.adapter.delta(target), wanted, rtol=1e-4, atol=1e-5)
    assert made.report.error < 1e-6


def test_a_dense_update_is_projected_and_says_how_well(base: Base) -> None:
    dora = trained(base, {"kind": "dora", **O})
    made = combination({"dora": dora}, base=base)
    for row in made.report.targets:
        wanted = dora.delta(row.target, base).double()
        sigma = torch.linalg.svdvals(wanted)
        assert row.rank == 3
        assert row.error == pytest.approx(float(sigma[3:].norm() / sigma.norm()), rel=1e-4)
    assert made.report.error > 0.01


def test_ia3_is_a_dense_update_unless_it_scales_a_bias(base: Base) -> None:
    feed = trained(base, {"kind": "ia3", "targets": ["down_proj"]}, size=0.3)
    with pytest.raises(ConfigError, match="no adapter there has a rank"):
        combine({"feed": feed}, base=base)
    made = combine({"feed": feed}, base=base, rank=48)
    for target in feed.targets:
        torch.testing.assert_close(made.delta(target), feed.delta(target, base), rtol=1e-4, atol=1e-5)
    keys = trained(base, {"kind": "ia3", "targets": ["k_proj"]}, size=0.3)
    with pytest.raises(Unsupported, match="bias"):
        combine({"keys": keys}, base=base, rank=8)


def test_biases_are_other_parts(base: Base) -> None:
    bias = trained(base, {"kind": "bitfit", "targets": ["o_proj"]})
    lora = trained(base, {"kind": "lora", **O})
    with pytest.raises(Unsupported, match="bitfit at model"):
        combine({"bias": bias, "lora": lora})
    kept = combine({"bias": bias, "lora": lora}, others="keep")
    assert {p.kind for p in kept.parts} == {"lora", "bitfit"}


def test_a_kept_part_would_lose_settings_that_a_lora_has_no_field_for(base: Base) -> None:
    lora = trained(base, {"kind": "lora", **O})
    odd = trained(base, {"kind": "bottleneck", "activation": "gelu", "strength": 2.0})
    with pytest.raises(Unsupported, match=r"layers\.0\.mlp_out has activation='gelu'") as refused:
        combine({"lora": lora, "odd": odd}, others="keep")
    assert "strength=2.0" in str(refused.value)
    plain = trained(base, {"kind": "bottleneck"})
    kept = combine({"lora": lora, "plain": plain}, others="keep")
    with attached(base, Adapter(lora.spec, (*lora.parts, *plain.parts))):
        expected = base.logits([[1, 2, 3, 4]])
    with attached(base, kept):
        torch.testing.assert_close(base.logits([[1, 2, 3, 4]]), expected, rtol=1e-4, atol=1e-4)


def test_a_network_behind_virtual_tokens_is_folded_before_they_are_kept(base: Base) -> None:
    lora = trained(base, {"kind": "lora", **O})
    tokens = trained(base, {"kind": "ptuning", "encoder": "lstm", "num_tokens": 3})
    kept = combine({"lora": lora, "tokens": tokens}, others="keep").parts[-1]
    torch.testing.assert_close(kept.tensors["rows"], methods.folded(tokens).parts[0].tensors["rows"])


def test_a_sparse_update_is_a_dense_one_in_a_sum_and_in_the_report(base: Base) -> None:
    shira, lora = trained(base, {"kind": "shira", **O}), trained(base, {"kind": "lora", **O}, 1)
    made = combine({"shira": shira, "lora": lora}, "cat", base=base, rank=48)
    for target in lora.targets:
        wanted = shira.delta(target, base) + lora.delta(target)
        torch.testing.assert_close(made.delta(target), wanted, rtol=1e-4, atol=1e-5)
    report = interference({"shira": shira, "lora": lora}, base)
    assert report.norms["shira"] == pytest.approx(
        float(torch.cat([shira.delta(t, base).flatten() for t in shira.targets]).norm()), rel=1e-4
    )


def test_a_shifted_start_is_subtracted(base: Base) -> None:
    lora = trained(base, {"kind": "lora", **O})
    part = lora.parts[0]
    shifted = type(part)(
        "lora", "weight", part.target, {**part.tensors, "A0": part.tensors["A"], "B0": part.tensors["B"]}
    )
    made = combine({"a": Adapter(lora.spec, (shifted,))})
    assert float(made.delta(str(part.target)).abs().max()) < 1e-6


def test_an_embedding_combines_like_any_matrix(base: Base) -> None:
    one = trained(base, {"kind": "lora", "targets": ["embed_tokens"], "rank": 2})
    two = trained(base, {"kind": "lora", "targets": ["embed_tokens"], "rank": 3}, 1)
    made = combine({"one": one, "two": (two, -1.0)}, "cat")
    assert made.parts[0].host == "embedding"
    torch.testing.assert_close(
        made.delta("model.embed_tokens"), one.delta("model.embed_tokens") - two.delta("model.embed_tokens")
    )


def test_interference_takes_any_method_with_its_base(base: Base) -> None:
    dora, lora = trained(base, {"kind": "dora", **O}), trained(base, {"kind": "lora", **O}, 1)
    report = interference({"dora": dora, "lora": lora}, base)
    one = dora.delta(lora.targets[0], base).double()
    two = lora.delta(lora.targets[0]).double()
    assert report.pairs[0].cosine == pytest.approx(
        float((one * two).sum() / one.norm() / two.norm()), rel=1e-4, abs=1e-6
    )


# -- PEFT as it is -----------------------------------------------------------------------------------------------------


def peft_pair(tmp_path: Path, rslora: bool = False) -> tuple[Any, dict[str, Adapter]]:
    """A PEFT model with adapters a and b, and the same two as ours, by way of PEFT's files."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    path = checkpoint("llama", tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], use_rslora=rslora)
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path), config, adapter_name="a")
    model.add_adapter("b", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "saved", selected_adapters=["a", "b"])
    return model, {name: Adapter.load(tmp_path / "saved" / name) for name in ("a", "b")}


def peft_delta(model: Any, name: str, target: str) -> torch.Tensor:
    delta: torch.Tensor = model.get_submodule(f"base_model.model.{target}").get_delta_weight(name).detach()
    return delta


@pytest.mark.parity
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0)])
def test_where_peft_is_right_we_agree(tmp_path: Path, weights: tuple[float, float]) -> None:
    model, ours = peft_pair(tmp_path)
    pairs = {name: (ours[name], w) for name, w in zip("ab", weights, strict=True)}
    for kind, made in (
        ("cat", combine(pairs, "cat")),
        ("svd", combine(pairs, "svd", rank=4)),
        ("linear", combine(pairs, "factor_linear")),
    ):
        model.add_weighted_adapter(["a", "b"], list(weights), kind, combination_type=kind, svd_rank=4)
        for target in made.targets:
            torch.testing.assert_close(made.delta(target), peft_delta(model, kind, target), rtol=1e-3, atol=1e-4)


@pytest.mark.parity
def test_ties_on_whole_updates_is_pefts_where_the_weights_are_one(tmp_path: Path) -> None:
    model, ours = peft_pair(tmp_path)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "t", combination_type="ties_svd", svd_rank=48, density=0.5)
    made = combine(ours, "ties", density=0.5, space="dense", rank=48)
    for target in made.targets:
        torch.testing.assert_close(made.delta(target), peft_delta(model, "t", target), rtol=1e-3, atol=1e-3)


@pytest.mark.parity
def test_where_peft_is_wrong_we_are_right(tmp_path: Path) -> None:
    """rsLoRA through its `linear` comes back sqrt(rank) times too large (PEFT issue 3761); its `linear` is no sum (3004)."""
    model, ours = peft_pair(tmp_path, rslora=True)
    model.add_weighted_adapter(["a"], [1.0], "single", combination_type="linear")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type="linear")
    one, half = combine({"a": ours["a"]}), combine({"a": (ours["a"], 0.5), "b": (ours["b"], 0.5)})
    for target in one.targets:
        right = ours["a"].delta(target)
        torch.testing.assert_close(one.delta(target), right, rtol=1e-4, atol=1e-5)
        assert float(peft_delta(model, "single", target).norm() / right.norm()) == pytest.approx(2.0, rel=1e-3)
        both = 0.5 * (ours["a"].delta(target) + ours["b"].delta(target))
        torch.testing.assert_close(half.delta(target), both, rtol=1e-4, atol=1e-5)
        assert float((peft_delta(model, "mean", target) - both).norm() / both.norm()) > 0.5
    assert isinstance(one.spec, LoRA)
