"""What holds for every low-rank update at any size: rank, gauge, first gradients, the scale rules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.laws.world import fresh, host_of, method, own_parts, stirred, world
from veneer.adapter import Adapter, Part
from veneer.base.host import DenseHost
from veneer.errors import ConfigError, TargetError
from veneer.inits import INITS
from veneer.methods import METHODS, folded
from veneer.methods.dora import row_norms
from veneer.methods.lora import LoRA
from veneer.types import SCALE_RULES, HostShape, effective_scale

sizes = st.integers(2, 12)


def lora_part(out: int, inp: int, rank: int, seed: int) -> Part:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inp, generator=generator), torch.randn(out, rank, generator=generator)
    return Part("lora", "weight", "x.proj", {"A": a, "B": b})


@given(
    out=sizes, inp=sizes, rank=st.integers(1, 12), alpha=st.floats(0.1, 64), rule=st.sampled_from(sorted(SCALE_RULES))
)
def test_delta_is_scale_b_a_of_at_most_its_rank(out: int, inp: int, rank: int, alpha: float, rule: str) -> None:
    part = lora_part(out, inp, rank, seed=out * 31 + inp)
    adapter = Adapter(LoRA(rank=rank, alpha=alpha, scaling=rule), (part,))
    delta = adapter.delta("x.proj").double()
    exact = effective_scale(rule, alpha, rank) * part.tensors["B"].double() @ part.tensors["A"].double()
    torch.testing.assert_close(delta, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    assert torch.linalg.matrix_rank(exact) <= min(rank, out, inp)


@given(out=sizes, inp=sizes, rank=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_gauge_of_the_factors_is_not_seen(out: int, inp: int, rank: int, seed: int) -> None:
    """(B M, M^-1 A) is the same update as (B, A)."""
    part = lora_part(out, inp, rank, seed)
    part = replace(part, tensors={n: t.double() for n, t in part.tensors.items()})
    generator = torch.Generator().manual_seed(seed)
    m = torch.linalg.qr(torch.randn(rank, rank, generator=generator).double()).Q * 3
    turned = {"A": torch.linalg.solve(m, part.tensors["A"]), "B": part.tensors["B"] @ m}
    spec = LoRA(rank=rank)
    one = Adapter(spec, (part,)).delta("x.proj")
    other = Adapter(spec, (replace(part, tensors=turned),)).delta("x.proj")
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@given(out=sizes, inp=sizes, rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_first_step_moves_only_b(out: int, inp: int, rank: int, seed: int) -> None:
    """dL/dA = s B^T G = 0 and dL/dB = s G A^T at the start, for G = dL/dW of the plain layer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, generator=generator).double()
    x = torch.randn(6, inp, generator=generator).double()
    spec = LoRA(rank=rank, alpha=3.0)
    a = torch.randn(rank, inp, generator=generator).double().requires_grad_()
    b = torch.zeros(out, rank).double().requires_grad_()
    part = Part("lora", "weight", "x.proj", {"A": a, "B": b})
    spec.forward(x, part, DenseHost(weight)).sin().sum().backward()
    plain = weight.clone().requires_grad_()
    (x @ plain.t()).sin().sum().backward()
    assert plain.grad is not None and a.grad is not None and b.grad is not None
    assert torch.equal(a.grad, torch.zeros_like(a))
    torch.testing.assert_close(b.grad, spec.scale("x.proj", rank) * plain.grad @ a.detach().t())


def test_scale_rules_and_their_identity() -> None:
    assert LoRA(rank=16, alpha=16, scaling="alpha/sqrt(r)").scale("t", 16) == 4.0
    assert LoRA(rank=16, alpha=16).scale("t", 16) == 1.0
    for rank in (1, 3, 8, 64):
        rs = LoRA(rank=rank, alpha=6.0, scaling="alpha/sqrt(r)").scale("t", rank)
        assert math.isclose(rs, LoRA(rank=rank, alpha=6.0 * math.sqrt(rank)).scale("t", rank), rel_tol=1e-15)


def test_patterns_are_resolved_per_target_first_hit_first() -> None:
    spec = method("lora", rank_pattern={"layers.0.*q_proj": 2, "q_proj": 5}, alpha_pattern={"v_proj": 9.0})
    adapter = fresh(spec, world())
    ranks = {t: adapter.part(t).tensors["A"].shape[0] for t in adapter.targets}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2
    assert ranks["model.layers.1.self_attn.q_proj"] == 5
    assert ranks["model.layers.1.self_attn.k_proj"] == 3
    assert adapter.scale("model.layers.0.self_attn.v_proj") == 9.0 / 3
    assert adapter.scale("model.layers.1.self_attn.q_proj") == 5.0 / 5


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_rank_above_the_layer_is_refused_for_all_layers_at_once(kind: str) -> None:
    with pytest.raises(TargetError, match="17") as caught:
        fresh(method(kind, rank=17), world())
    assert caught.value.message.count("rank 17") == 10


def test_a_scale_factor_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        LoRA().scaled(-1.0)


@given(out=sizes, inp=sizes, rank=st.integers(1, 5), seed=st.integers(0, 99))
def test_doras_norm_needs_no_dense_product(out: int, inp: int, rank: int, seed: int) -> None:
    host = host_of("linear", out, inp, seed)
    tensors = lora_part(out, inp, rank, seed).tensors
    dense = torch.linalg.norm(host.weight().double() + tensors["B"].double() @ tensors["A"].double(), dim=1)
    torch.testing.assert_close(row_norms(tensors["A"], tensors["B"], host).double(), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "nf4"])
def test_dora_keeps_the_lengths_of_its_rows(kind: str) -> None:
    base = world(kind)
    targets = ("model.embed_tokens",) if kind == "embedding" else ("all-linear",)
    adapter = stirred(fresh(method("dora", targets=targets), base))
    for part in own_parts(adapter):
        weight, _ = adapter.spec.merged(part, base.host(part.target))
        torch.testing.assert_close(
            torch.linalg.norm(weight, dim=1), part.tensors["magnitude"].abs(), rtol=1e-4, atol=1e-5
        )


def test_doras_magnitude_gradient_and_direction() -> None:
    """dL/dm_j = (V G'^T)_jj / c_j, and dL/dV = diag(m / c) G' with c held constant."""
    host = host_of("linear", 5, 7)
    start = stirred(Adapter(method("dora"), (Part("dora", "weight", "t", {
        **lora_part(5, 7, 3, 1).tensors, "magnitude": torch.rand(5) + 1}),)))  # fmt: skip
    leaves = {n: t.clone().requires_grad_() for n, t in start.parts[0].tensors.items()}
    spec = start.spec
    weight, _ = spec.merged(replace(start.parts[0], tensors=leaves), host)
    g = torch.randn(5, 7, generator=torch.Generator().manual_seed(5))
    (weight * g).sum().backward()
    scale = spec.scale("t", 3)
    v = host.weight() + scale * leaves["B"].detach() @ leaves["A"].detach()
    c = torch.linalg.norm(v, dim=1)
    torch.testing.assert_close(leaves["magnitude"].grad, (v * g).sum(1) / c)
    through = (leaves["magnitude"].detach() / c)[:, None] * g
    torch.testing.assert_close(leaves["B"].grad, scale * through @ leaves["A"].detach().t())


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_a_shifted_start_is_kept_as_twice_the_rank_on_the_original_base(init: str, scaling: str) -> None:
    """Science 6.2: dW = s (B A - B0 A0) = s [B, -B0] [A; A0], at the same scale."""
    base = world()
    spec = method("lora", init=init, scaling=scaling, rank_pattern={"q_proj": 2})
    adapter = stirred(fresh(spec, base))
    kept = folded(adapter)
    assert not any("A0" in p.tensors for p in kept.parts)
    for target in adapter.targets:
        assert kept.part(target).tensors["A"].shape[0] == 2 * adapter.part(target).tensors["A"].shape[0]
        assert math.isclose(kept.scale(target), adapter.scale(target), rel_tol=1e-14)
        torch.testing.assert_close(kept.delta(target), adapter.delta(target), rtol=1e-5, atol=1e-6)


def test_vera_is_the_lora_it_says_it_is() -> None:
    base = world()
    adapter = stirred(fresh(method("vera"), base))
    shared = adapter.parts[0].tensors
    for part in own_parts(adapter):
        host = base.host(part.target)
        out, inp = host.shape.out_features, host.shape.in_features
        t = part.tensors
        dense = torch.diag(t["b"]) @ shared["B"][:out] @ torch.diag(t["d"]) @ shared["A"][:, :inp]
        torch.testing.assert_close(adapter.delta(part.target, base), dense, rtol=1e-4, atol=1e-5)
        assert part.num_parameters == 3 + out


def test_ia3_counts_as_published_and_stacks() -> None:
    """LLaMA-7B: 32 * (4096 + 4096 + 11008) numbers; two adapters multiply."""
    ia3 = METHODS["ia3"]()
    per_block = [("k_proj", 4096, 4096), ("v_proj", 4096, 4096), ("down_proj", 11008, 4096)]
    count = sum(
        torch.Size(size).numel()
        for name, inp, out in per_block
        for size in ia3.tensor_shapes(f"model.layers.0.x.{name}", HostShape("linear", inp, out)).values()
    )
    assert 32 * count == 614_400


def test_every_init_is_known_to_the_methods() -> None:
    with pytest.raises(ConfigError, match="did you mean 'pissa'"):
        INITS["pisa"]
