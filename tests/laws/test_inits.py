"""What every init obeys, and the facts of science 6 that tell one from another."""

from __future__ import annotations

import pytest
import torch

from tests.laws.world import HIDDEN, fresh, host_of, method, stats_for, unshifted_inits, world
from veneer.base.formats import load_all as load_formats
from veneer.base.host import DenseHost
from veneer.base.quantized import QuantizedHost
from veneer.errors import ConfigError
from veneer.inits import INITS, InitStats, needs
from veneer.inits.data_driven import spread_ranks
from veneer.inits.loftq import alternate
from veneer.inits.spectral import randomised_svd

KINDS = ("linear", "biased", "bf16", "conv1d", "nf4", "bof4-s")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(INITS))
def test_training_starts_from_the_base(name: str, kind: str) -> None:
    """W' = W: bitwise where B or A is zero, to rounding where the start is shifted.

    LoftQ and QPiSSA are nearer to the original instead, and LoRA-One is one step away on purpose.
    """
    base = world(kind)
    adapter = fresh(method("lora", init=name), base)
    stats = stats_for(base)
    for target in adapter.targets:
        delta = adapter.delta(target)
        if name in unshifted_inits():
            assert torch.equal(delta, torch.zeros_like(delta))
        elif name == "lora_one":
            assert 0 < delta.norm() < base.host(target).weight().float().norm()
        elif name in ("loftq", "qpissa"):
            held, original = base.host(target).weight().float(), stats[target].weight
            assert torch.linalg.norm(original - held - delta) < torch.linalg.norm(original - held)
        else:
            size = base.host(target).weight().float().abs().max()
            assert delta.abs().max() <= 1e-5 * size
            assert adapter.part(target).tensors["B"].abs().sum() > 0
    again = fresh(method("lora", init=name), base)
    assert again.digest == adapter.digest, "the same seed gives the same start"


def test_another_target_changes_no_start() -> None:
    few, many = (fresh(method("lora", targets=t), world()) for t in (("q_proj",), ("q_proj", "v_proj")))
    for target in few.targets:
        assert torch.equal(few.part(target).tensors["A"], many.part(target).tensors["A"])


def test_default_is_uniform_with_variance_one_over_three_n() -> None:
    host = host_of("linear", 64, 200)
    a = INITS["default"](host, 50, 1.0, None, generator()).A
    assert a.abs().max() <= 200**-0.5
    assert abs(float(a.var()) * 3 * 200 - 1) < 0.05


@pytest.mark.parametrize("name", ["default", "gaussian", "orthogonal"])
def test_on_an_embedding_a_is_zero_and_b_random(name: str) -> None:
    factors = INITS[name](host_of("embedding", 16, 40), 4, 1.0, None, generator())
    assert torch.equal(factors.A, torch.zeros(4, 40))
    assert 0.5 < float(factors.B.std()) < 1.5


@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_pissa_takes_the_top_of_the_spectrum(scale: float) -> None:
    host = host_of("linear", 24, 18)
    factors = INITS["pissa"](host, 5, scale, None, generator())
    sigma = torch.linalg.svdvals(host.weight())
    rest = host.weight() - scale * factors.B @ factors.A
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:13], sigma[5:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors.A @ factors.A.t(), torch.diag(sigma[:5] / scale), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors.B.t() @ factors.B, torch.diag(sigma[:5] / scale), rtol=1e-4, atol=1e-5)


def test_the_randomised_svd_finds_a_decaying_spectrum() -> None:
    u, v = (torch.linalg.qr(torch.randn(60, 60, generator=generator(i))).Q for i in (1, 2))
    sigma = torch.arange(1, 61).float() ** -1.5
    weight = u * sigma @ v.t()
    left, s, right = randomised_svd(weight, 8, generator())
    torch.testing.assert_close(s, sigma[:8], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(left * s @ right.t(), u[:, :8] * sigma[:8] @ v.t()[:8], rtol=0, atol=5e-3)


def test_olora_is_the_beginning_of_q_r() -> None:
    factors = INITS["olora"](host_of("linear", 20, 16), 4, 2.0, None, generator())
    torch.testing.assert_close(factors.B.t() @ factors.B, torch.eye(4), rtol=1e-5, atol=1e-5)
    assert torch.equal(factors.A, torch.triu(factors.A))


def test_eva_takes_orthonormal_directions_of_the_inputs() -> None:
    base = world()
    seen = stats_for(base)["model.layers.0.mlp.down_proj"]
    factors = INITS["eva"](base.host("model.layers.0.mlp.down_proj"), 6, 1.0, seen, generator())
    torch.testing.assert_close(factors.A @ factors.A.t(), torch.eye(6), rtol=1e-5, atol=1e-5)
    assert not factors.shifted


def test_eva_spreads_the_same_budget() -> None:
    stats = stats_for(world())
    ranks = spread_ranks(stats, 4)
    assert sum(ranks.values()) == 4 * len(stats)
    assert max(ranks.values()) <= 8
    assert set(spread_ranks(stats, 4, rho=1.0).values()) == {4}


def test_the_first_step_of_lora_ga_follows_the_gradient() -> None:
    """d(dW) = s^2 sqrt(m) / gamma times the best rank-2r part of G (to first order in the learning rate)."""
    out, inp, rank, scale = 30, 26, 3, 4.0
    gradient = torch.randn(out, inp, generator=generator(3))
    host = DenseHost(host_of("linear", out, inp).weight() * 1e4)  # the clip is out of the way
    factors = INITS["lora_ga"](host, rank, scale, InitStats(gradient=gradient), generator())
    a, b, g = factors.A.double(), factors.B.double(), gradient.double()
    step = scale * (scale * (g @ a.t()) @ a + b @ (scale * (b.t() @ g)))
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    best = u[:, : 2 * rank] * s[: 2 * rank] @ vh[: 2 * rank]
    torch.testing.assert_close(step, scale**2 * out**0.5 / 16 * best, rtol=1e-4, atol=1e-4)


def test_lora_ga_never_shifts_further_than_the_weight() -> None:
    host = host_of("linear", 30, 26)
    factors = INITS["lora_ga"](
        host, 3, 100.0, InitStats(gradient=torch.randn(30, 26, generator=generator())), generator()
    )
    assert (100.0 * factors.B @ factors.A).abs().max() <= host.weight().abs().max() * 1.0001


def test_lora_one_is_one_step_against_the_gradient() -> None:
    """dW = (s / gamma) (-G)_r / S_1, science 6.7; and a small enough step falls on any smooth loss."""
    gradient = torch.randn(30, 26, generator=generator(3))
    scale = 4.0
    factors = INITS["lora_one"](host_of("linear", 30, 26), 3, scale, InitStats(gradient=gradient), generator())
    u, s, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    wanted = -(scale / 128) * (u[:, :3] * s[:3] @ vh[:3]) / s[0]
    delta = scale * factors.B.double() @ factors.A.double()
    torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-6)
    assert float((delta * gradient).sum()) < 0 and not factors.shifted
    torch.testing.assert_close(factors.A.norm(), factors.B.norm())
    with pytest.raises(ConfigError, match="no gradient"):
        INITS["lora_one"](host_of("linear", 8, 8), 2, 1.0, InitStats(gradient=torch.zeros(8, 8)), generator())


@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_corda_is_the_best_part_of_w_for_the_inputs(scale: float) -> None:
    """|(W - s B A) C| is the tail of W C's spectrum, and C = I gives PiSSA. Science 6.8."""
    host, rank = host_of("linear", 24, 18), 5
    seen = torch.randn(200, 18, generator=generator(2), dtype=torch.float64) * torch.linspace(3, 0.1, 18)
    covariance = seen.t() @ seen / 200
    factors = INITS["corda"](host, rank, scale, InitStats(covariance=covariance), generator())
    damped = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(18, dtype=torch.float64)
    spectrum = torch.linalg.svdvals(host.weight().double() @ damped)
    rest = (host.weight().double() - scale * factors.B.double() @ factors.A.double()) @ damped
    torch.testing.assert_close(torch.linalg.norm(rest), torch.linalg.norm(spectrum[rank:]), rtol=1e-4, atol=1e-6)
    assert factors.shifted
    same = INITS["corda"](host, rank, scale, InitStats(covariance=torch.eye(18)), generator())
    pissa = INITS["pissa"](host, rank, scale, None, generator())
    torch.testing.assert_close(same.B @ same.A, pissa.B @ pissa.A, rtol=1e-4, atol=1e-5)


def test_cordas_other_half_is_what_the_inputs_use_least() -> None:
    host, seen = host_of("linear", 24, 18), InitStats(covariance=torch.diag(torch.arange(1.0, 19.0)))
    top, bottom = (INITS[n](host, r, 1.0, seen, generator()) for n, r in (("corda", 13), ("corda_kpm", 5)))
    torch.testing.assert_close(top.B @ top.A + bottom.B @ bottom.A, host.weight(), rtol=1e-4, atol=1e-5)
    used = [torch.linalg.norm(f.B @ f.A @ torch.diag(torch.arange(1.0, 19.0))) for f in (top, bottom)]
    assert used[0] > 4 * used[1]
    with pytest.raises(ConfigError, match="no input"):
        INITS["corda"](host, 2, 1.0, InitStats(covariance=torch.zeros(18, 18)), generator())


def test_mica_trains_a_beside_the_weakest_directions() -> None:
    host = host_of("linear", 24, 18)
    factors = INITS["mica"](host, 4, 1.0, None, generator())
    assert torch.equal(factors.A, torch.zeros(4, 18))
    torch.testing.assert_close(factors.B.t() @ factors.B, torch.eye(4), rtol=1e-5, atol=1e-5)
    weakest = torch.linalg.svdvals(host.weight())[-4:]
    torch.testing.assert_close(torch.linalg.svdvals(factors.B.t() @ host.weight()), weakest, rtol=1e-4, atol=1e-5)
    adapter = fresh(method("lora", init="mica"), world())
    assert adapter.spec.frozen() >= {"B"}
    assert "B" not in fresh(method("lora"), world()).spec.frozen()


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("name", ["nf4", "bof4-s"])
def test_qpissa_trains_the_original_weights_top_and_is_never_further_from_it(name: str, scale: float) -> None:
    u, v = (torch.linalg.qr(torch.randn(96, 96, generator=generator(i))).Q for i in (1, 2))
    weight = u * torch.arange(1, 97).float() ** -0.7 @ v.t()
    host = QuantizedHost(load_formats()[name](weight), torch.float32)
    factors = INITS["qpissa"](host, 8, scale, InitStats(weight=weight), generator())
    sigma = torch.linalg.svdvals(weight)
    torch.testing.assert_close(factors.A @ factors.A.t(), torch.diag(sigma[:8] / scale), rtol=1e-3, atol=1e-4)
    assert factors.taken is not None
    a0, b0 = factors.taken
    start = host.weight() + scale * (factors.B @ factors.A - b0 @ a0)
    assert torch.linalg.norm(weight - start) < torch.linalg.norm(weight - host.weight())


def test_repeating_loftq_on_a_base_that_stays_gives_the_same_again() -> None:
    """Why one step is all there is: for a fixed Q the first factors are the best of their rank, and the second are they."""
    weight = torch.randn(64, 64, generator=generator(1))
    host = QuantizedHost(load_formats()["nf4"](weight), torch.float32)
    first = INITS["loftq"](host, 6, 2.0, InitStats(weight=weight), generator())
    tail = torch.linalg.svdvals(weight - host.weight())[6:]
    rest = weight - host.weight() - 2.0 * first.B @ first.A
    torch.testing.assert_close(torch.linalg.norm(rest), torch.linalg.norm(tail), rtol=1e-5, atol=1e-6)
    _, again = alternate(weight, lambda _: host.weight(), 6, 2.0, 5)
    torch.testing.assert_close(again.B @ again.A, first.B @ first.A, rtol=1e-4, atol=1e-5)


def nf4(weight: torch.Tensor) -> torch.Tensor:
    return load_formats()["nf4"](weight).dequantise(torch.empty_like(weight))


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_loftq_wins_most_on_a_decaying_spectrum(scale: float) -> None:
    """A smaller version of science 6.4's 1024 x 1024 case, whatever alpha / r is."""
    u, v = (torch.linalg.qr(torch.randn(256, 256, generator=generator(i))).Q for i in (1, 2))
    weight = u * torch.arange(1, 257).float() ** -0.7 @ v.t()
    plain = torch.linalg.norm(weight - nf4(weight)) / torch.linalg.norm(weight)
    errors = []
    for steps in (1, 5):
        base, factors = alternate(weight, nf4, 16, scale, steps)
        errors.append(torch.linalg.norm(weight - base - scale * factors.B @ factors.A) / torch.linalg.norm(weight))
    assert errors[1] <= errors[0] < plain


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "ratio"), [(8, 0.985), (16, 0.970), (64, 0.888)])
def test_loftqs_published_ratios_on_white_weights(rank: int, ratio: float) -> None:
    weight = torch.randn(1024, 1024, generator=generator(1))
    base, factors = alternate(weight, nf4, rank, 1.0, 1)
    residual = torch.linalg.norm(weight - base - factors.B @ factors.A) / torch.linalg.norm(weight - nf4(weight))
    assert abs(float(residual) - ratio) < 0.004


@pytest.mark.slow
def test_science_6_on_a_decaying_spectrum() -> None:
    """sigma_i = i^-0.7, r = 16, errors as norms: NF4 0.1579, LoftQ 0.1511 (1 step), 0.1427 (5), QPiSSA's residual 0.0746."""
    u, v = (torch.linalg.qr(torch.randn(1024, 1024, generator=generator(i))).Q for i in (1, 2))
    weight = u * torch.arange(1, 1025).float() ** -0.7 @ v.t()
    assert abs(float(torch.linalg.norm(weight - nf4(weight))) - 0.1579) < 0.002
    for steps, expected in ((1, 0.1511), (5, 0.1427)):
        base, factors = alternate(weight, nf4, 16, 1.0, steps)
        assert abs(float(torch.linalg.norm(weight - base - factors.B @ factors.A)) - expected) < 0.002
    rest = weight - u[:, :16] * torch.arange(1, 17).float() ** -0.7 @ v.t()[:16]
    assert abs(float(torch.linalg.norm(rest - nf4(rest))) - 0.0746) < 0.002


@pytest.mark.parametrize("name", [n for n in sorted(INITS) if needs(n)])
def test_a_start_from_data_without_data_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"init: {name} needs"):
        INITS[name](host_of("linear", HIDDEN, HIDDEN), 2, 1.0, None, generator())
