"""Optimisers against plain AdamW and their own laws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from veneer.adapter import Adapter, Part
from veneer.errors import ConfigError, ResourceError
from veneer.methods.dora import DoRA
from veneer.methods.full import Full
from veneer.methods.ia3 import IA3
from veneer.methods.lora import LoRA
from veneer.plan.counts import Counted
from veneer.train import checkpoint
from veneer.train.checkpoint import Cursor
from veneer.train.config import TrainConfig
from veneer.train.optim import OPTIMIZERS, FlatParameters, set_rate
from veneer.train.optimizers import _chunked, eight_bit, lora_pro, riemannian
from veneer.train.optimizers import load_all as load_optimizers

load_optimizers()


def parameters(spec: LoRA | None = None, rows: int = 40) -> FlatParameters:
    generator = torch.Generator().manual_seed(0)
    spec = spec or LoRA(rank=4, alpha=8)
    parts = [
        Part(
            "lora",
            "weight",
            f"layers.{i}.q",
            {"A": torch.randn(4, 60, generator=generator), "B": torch.randn(rows, 4, generator=generator)},
        )
        for i in range(3)
    ]
    return FlatParameters(Adapter(spec, tuple(parts)), torch.device("cpu"))


KEPT: list[torch.optim.Optimizer] = []
"""What `steps` made, the last of them last."""


def steps(name: str, flat: FlatParameters, count: int, folder: Path | None = None, **config: float) -> list[Tensor]:
    """Parameters after `count` steps of the same gradients."""
    settings = TrainConfig(lr=1e-2, **config)
    optimizer = OPTIMIZERS[name](flat, settings, folder)
    KEPT.append(optimizer)
    set_rate(optimizer, 1e-2)
    for step in range(count):
        for buffer in flat.buffers.values():
            generator = torch.Generator().manual_seed(step)
            buffer.grad = torch.randn(buffer.shape, generator=generator) + buffer.detach()
        optimizer.step()
    return [b.detach().clone() for b in flat.buffers.values()]


def test_the_mapped_optimiser_is_bitwise_plain_adamw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "CHUNK", 128)
    plain = steps("adamw", parameters(), 50, weight_decay=0.01)
    mapped = steps("adamw_mapped", parameters(), 50, tmp_path, weight_decay=0.01)
    assert all(torch.equal(a, b) for a, b in zip(plain, mapped, strict=True))
    assert (tmp_path / "moments.bin").stat().st_size == 8 * parameters().count


def test_a_file_that_cannot_be_made_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="could not be made"):
        OPTIMIZERS["adamw_mapped"](parameters(), TrainConfig(), tmp_path / "file")


def test_eight_bit_moments_stay_near_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit, "SMALL", 16)
    start = [b.detach().clone() for b in parameters().buffers.values()]
    plain = steps("adamw", parameters(), 30)
    small = steps("adamw8bit", parameters(), 30)
    for a, b, s in zip(plain, small, start, strict=True):
        assert float((a - b).norm() / (a - s).norm()) < 0.05


def test_lora_fa_moves_b_alone_along_the_projected_gradient() -> None:
    spec = LoRA(rank=4, alpha=8)
    flat = parameters(spec)
    before = flat.snapshot()
    optimizer = OPTIMIZERS["lora_fa"](flat, TrainConfig(lr=1e-2), None)
    assert set(flat.buffers) == {"B"} and flat.count == 3 * 40 * 4, "A has no buffer: no gradient, no share in the norm"
    full = torch.randn(40, 60, generator=torch.Generator().manual_seed(5))
    flat.buffers["B"].grad = torch.zeros_like(flat.buffers["B"])
    for pair in flat.pairs():
        assert pair.grad_a is None and pair.grad_b is not None
        pair.grad_b.copy_(pair.scale * full @ pair.a.t())
    set_rate(optimizer, 1e-2)
    optimizer.step()
    for pair in flat.pairs():
        projector = pair.a.t() @ torch.linalg.inv(pair.a @ pair.a.t()) @ pair.a
        assert pair.grad_b is not None
        assert torch.allclose(pair.scale * pair.grad_b @ pair.a, full @ projector, rtol=1e-3, atol=1e-4)
    for old, new in zip(before.parts, flat.snapshot().parts, strict=True):
        assert torch.equal(old.tensors["A"], new.tensors["A"])
        assert not torch.equal(old.tensors["B"], new.tensors["B"])


# -- the geometry of A and B: plain definitions in fp64 ----------------------------------------------------------------


def factors(out: int = 40, rank: int = 4, inp: int = 60, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and a gradient of the weight, fp64."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, inp, generator=g, dtype=torch.float64),
        torch.randn(out, rank, generator=g, dtype=torch.float64),
        torch.randn(out, inp, generator=g, dtype=torch.float64),
    )


def split_otherwise(a: Tensor, b: Tensor, seed: int = 9) -> tuple[Tensor, Tensor]:
    """(R A, B R^-1) for an R that is far from orthogonal."""
    r = torch.randn(len(a), len(a), generator=torch.Generator().manual_seed(seed), dtype=a.dtype)
    r = r + 3 * torch.diag(torch.linspace(1, 4, len(a), dtype=a.dtype))
    return r @ a, b @ torch.linalg.inv(r)


def moved(flat: FlatParameters, name: str, weight_gradients: list[Tensor], **config: object) -> list[Tensor]:
    """B A of each part after steps on given gradients of the weight, each turned into those of A and B where they are."""
    settings = TrainConfig.model_validate({"lr": 0.05, **config})
    optimizer = OPTIMIZERS[name](flat, settings, None)
    set_rate(optimizer, settings.lr)
    for full in weight_gradients:
        for buffer in flat.buffers.values():
            buffer.grad = torch.zeros_like(buffer)
        for pair in flat.pairs():
            assert pair.grad_a is not None and pair.grad_b is not None
            pair.grad_a.copy_(pair.scale * pair.b.t() @ full.float())
            pair.grad_b.copy_(pair.scale * full.float() @ pair.a.t())
        optimizer.step()
    return [pair.b @ pair.a for pair in flat.pairs()]


def one_pair(a: Tensor, b: Tensor) -> FlatParameters:
    part = Part("lora", "weight", "layers.0.q", {"A": a.float(), "B": b.float()})
    return FlatParameters(Adapter(LoRA(rank=len(a), alpha=2 * len(a)), (part,)), torch.device("cpu"))


def stream_of_gradients(count: int) -> list[Tensor]:
    return [0.3 * factors(seed=100 + i)[2] for i in range(count)]


@pytest.mark.parametrize(("name", "steps"), [("lora_rite", 5), ("lora_pro", 1), ("riemannian_sgd", 1)])
def test_the_split_into_a_and_b_is_not_seen(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """(A, B) and (R A, B R^-1) move the weight alike; AdamW does not. Science 3.3-3.5."""
    monkeypatch.setattr(riemannian, "DAMPING", 0.0)
    a, b, _ = factors()
    ta, tb = split_otherwise(a, b)

    def change(optimizer: str, one: Tensor, two: Tensor) -> Tensor:
        (after,) = moved(one_pair(one, two), optimizer, stream_of_gradients(steps), lr=0.02)
        return after.double() - b @ a

    plain, turned = change(name, a, b), change(name, ta, tb)
    assert float((plain - turned).norm() / plain.norm()) < 2e-3
    plain, turned = change("adamw", a, b), change("adamw", ta, tb)
    assert float((plain - turned).norm() / plain.norm()) > 0.1


def test_riemannian_preconditions_with_the_other_factor() -> None:
    a, b, full = factors()
    flat = one_pair(a, b)
    for buffer in flat.buffers.values():
        buffer.grad = torch.zeros_like(buffer)
    (pair,) = flat.pairs()
    assert pair.grad_a is not None and pair.grad_b is not None
    pair.grad_a.copy_(b.t() @ full)
    pair.grad_b.copy_(full @ a.t())
    riemannian.precondition(flat, riemannian.DAMPING)
    eye = 0.01 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(
        pair.grad_a.double(), torch.linalg.solve(b.t() @ b + eye, b.t() @ full), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        pair.grad_b.double(), torch.linalg.solve(a @ a.t() + eye, (full @ a.t()).t()).t(), rtol=1e-4, atol=1e-5
    )


def test_riemannian_moves_what_has_no_factors_as_adamw_does() -> None:
    """DoRA's magnitude and replaced tensors have no metric: they get AdamW's own step."""

    def made() -> FlatParameters:
        a, b, _ = factors(6, 2, 5)
        parts = (
            Part("dora", "weight", "a", {"A": a.float(), "B": b.float(), "magnitude": torch.ones(6)}),
            Part("full", "override", "b", {"weight": torch.ones(3, 3)}),
        )
        return FlatParameters(Adapter(DoRA(rank=2), parts), torch.device("cpu"))

    plain, scaled = made(), made()
    for name, flat in (("adamw", plain), ("riemannian", scaled)):
        steps(name, flat, 3)
    one, two = plain.snapshot(), scaled.snapshot()
    assert not torch.equal(one.parts[0].tensors["A"], two.parts[0].tensors["A"])
    torch.testing.assert_close(one.parts[1].tensors, two.parts[1].tensors)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_lora_pro_is_the_nearest_step_to_the_full_gradient(scale: float) -> None:
    """s B g_A + s g_B A = P_B G + (I - P_B) G P_A, and the step never goes uphill: science 3.4."""
    a, b, full = factors()
    grad_a, grad_b = scale * b.t() @ full, scale * full @ a.t()
    step_a, step_b = lora_pro.adjusted(a, b, grad_a, grad_b, scale, damping=0.0)
    on_b = b @ torch.linalg.solve(b.t() @ b, b.t())
    on_a = a.t() @ torch.linalg.solve(a @ a.t(), a)
    wanted = on_b @ full + (full - on_b @ full) @ on_a
    torch.testing.assert_close(scale * (b @ step_a + step_b @ a), wanted, rtol=1e-10, atol=1e-11)
    assert float((grad_a * step_a).sum() + (grad_b * step_b).sum()) >= 0
    sylvester = torch.linalg.lstsq(a.t(), (step_a - torch.linalg.solve(b.t() @ b, grad_a) / scale**2).t()).solution.t()
    left = b.t() @ b @ sylvester + sylvester @ a @ a.t()
    torch.testing.assert_close(left, -torch.linalg.solve(b.t() @ b, grad_a @ a.t()) / scale**2, rtol=1e-8, atol=1e-9)


def test_lora_pros_first_step_leaves_a_and_projects_b() -> None:
    a, b, full = factors()
    zero = torch.zeros_like(b)
    step_a, step_b = lora_pro.adjusted(a, zero, zero.t() @ full, 2 * full @ a.t(), 2.0)
    assert torch.equal(step_a, torch.zeros_like(a))
    torch.testing.assert_close(step_b, full @ a.t() @ torch.linalg.inv(a @ a.t()) / 2, rtol=1e-8, atol=1e-10)


def plain_rite(a: Tensor, b: Tensor, full: list[Tensor], scale: float, lr: float) -> Tensor:
    """LoRA-RITE from its definition: polar bases instead of QR, matrix roots by hand. Returns B A, fp64."""

    def polar(factor: Tensor) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(factor, full_matrices=False)
        return u @ vh, vh.t() @ torch.diag(s) @ vh

    def root(v: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(v)
        return vectors @ torch.diag(1 / (values.clamp_min(0).sqrt() + 1e-6)) @ vectors.t()

    x, y = a.t(), b  # [in, rank], [out, rank]
    memory: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for step, g in enumerate(full, 1):
        raw = {"x": scale * g.t() @ y, "y": scale * g @ x}
        bases = {"x": polar(y), "y": polar(x)}
        free = {k: raw[k] @ torch.linalg.inv(bases[k][1]) for k in raw}
        norm = float(sum(u.square().sum() for u in free.values())) ** 0.5
        updates = {}
        for k, u in free.items():
            u = u / max(1.0, norm)
            q, r = bases[k]
            rank = u.shape[1]
            first, second, last = memory.get(k, (torch.zeros_like(u), torch.zeros(rank, rank, dtype=u.dtype), q))
            turn = q.t() @ last
            b1 = 0.9 * (1 - 0.9 ** (step - 1)) / (1 - 0.9**step)
            b2 = 0.999 * (1 - 0.999 ** (step - 1)) / (1 - 0.999**step)
            second = b2 * turn @ second @ turn.t() + (1 - b2) * u.t() @ u / len(u)
            first = b1 * first @ turn.t() + (1 - b1) * u @ root(second)
            memory[k] = (first, second, q)
            updates[k] = first @ torch.linalg.inv(r).t()
        x, y = x - lr * updates["x"], y - lr * updates["y"]
    return y @ x.t()


def test_lora_rite_is_its_definition() -> None:
    a, b, _ = factors()
    gradients = stream_of_gradients(6)
    wanted = plain_rite(a, b, gradients, 2.0, 0.02)
    (found,) = moved(one_pair(a, b), "lora_rite", gradients, lr=0.02)
    change = (wanted - b @ a).norm()
    assert float((found.double() - wanted).norm() / change) < 1e-3


def test_lora_rite_starts_where_b_is_zero() -> None:
    a, b, _ = factors()
    flat = one_pair(a, torch.zeros_like(b))
    (after,) = moved(flat, "lora_rite", stream_of_gradients(4), lr=1e-3)
    assert bool(torch.isfinite(after).all()) and float(after.norm()) > 0
    assert float(after.norm()) < 4 * 1e-3 * (60 * 4 + 40 * 4) ** 0.5 * 5, "steps of about the rate, however small B is"


@pytest.mark.parametrize("name", ["lora_pro", "lora_rite"])
def test_optimisers_of_pairs_refuse_what_is_no_pair(name: str) -> None:
    part = Part("dora", "weight", "a", {"A": torch.ones(2, 3), "B": torch.ones(3, 2), "magnitude": torch.ones(3)})
    with pytest.raises(ConfigError, match=r"also trains a\.magnitude"):
        OPTIMIZERS[name](FlatParameters(Adapter(DoRA(rank=2), (part,)), torch.device("cpu")), TrainConfig(), None)


@pytest.mark.parametrize("name", ["lora_fa", "riemannian", "riemannian_sgd"])
def test_optimisers_of_factors_refuse_a_method_without(name: str) -> None:
    parts = (Part("ia3", "weight", "layers.0.k", {"vector": torch.ones(8)}),)
    with pytest.raises(ConfigError, match="factors A and B"):
        OPTIMIZERS[name](FlatParameters(Adapter(IA3(), parts), torch.device("cpu")), TrainConfig(), None)


@pytest.mark.parametrize("name", sorted(load_optimizers()))
def test_what_an_optimiser_keeps_is_what_the_planner_says(name: str, tmp_path: Path) -> None:
    flat = parameters(rows=400)
    steps(name, flat, 2, tmp_path)
    trained = [
        Counted("lora", f"layers.{i}.q", factor, shape, True)
        for i in range(3)
        for factor, shape in (("A", (4, 60)), ("B", (400, 4)))
        if factor not in OPTIMIZERS[name].freezes
    ]
    assert sum(tensor.numbers for tensor in trained) == flat.count
    kept = 0
    for buffer in flat.buffers.values():
        moments = KEPT[-1].state[buffer]
        kept += sum(t.nbytes for key, t in moments.items() if isinstance(t, Tensor) and key != "step")
    if name == "adamw_mapped":
        kept = 0  # in the file
    if name == "adamw8bit":
        assert OPTIMIZERS[name].state(trained) < 8 * flat.count / 2  # A's buffer is under 4,096 numbers and stays fp32
    else:
        assert OPTIMIZERS[name].state(trained) == kept


@pytest.mark.parametrize("name", sorted(load_optimizers()))
def test_resuming_is_bitwise(name: str, tmp_path: Path) -> None:
    """Three steps, a checkpoint, three more; and the same from the checkpoint in new objects."""

    def run(flat: FlatParameters, optimizer: torch.optim.Optimizer, first: int) -> None:
        for step in range(first, first + 3):
            for buffer in flat.buffers.values():
                generator = torch.Generator().manual_seed(step)
                buffer.grad = torch.randn(buffer.shape, generator=generator)
            optimizer.step()

    made = []
    for folder in ("one", "two"):
        flat = parameters(rows=80)
        optimizer = OPTIMIZERS[name](flat, TrainConfig(lr=1e-2), tmp_path / folder)
        set_rate(optimizer, 1e-2)
        made.append((flat, optimizer))
    (flat, optimizer), (again, fresh) = made
    run(flat, optimizer, 0)
    checkpoint.write(tmp_path / "saved", Cursor(step=3), flat, optimizer, {})
    run(flat, optimizer, 3)
    checkpoint.read(tmp_path / "saved", again, fresh, {}, "")
    run(again, fresh, 3)
    for one, two in zip(flat.snapshot().parts, again.snapshot().parts, strict=True):
        assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors)


def test_lora_plus_at_ratio_one_is_the_plain_optimiser_bitwise() -> None:
    one = steps("adamw", parameters(), 10)
    two = steps("adamw", parameters(), 10, lora_plus_ratio=1.0)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    optimizer = OPTIMIZERS["adamw"](parameters(), TrainConfig(lora_plus_ratio=16.0), None)
    set_rate(optimizer, 1e-3)
    assert sorted(g["lr"] for g in optimizer.param_groups) == pytest.approx([1e-3, 1.6e-2])


def test_an_unknown_optimiser_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        OPTIMIZERS["adamww"]


def test_lora_plus_speeds_up_b_and_nothing_beside_it() -> None:
    parts = (
        Part("dora", "weight", "a", {"A": torch.ones(2, 3), "B": torch.ones(3, 2), "magnitude": torch.ones(3)}),
        Part("full", "override", "b", {"weight": torch.ones(3, 3)}),
    )
    flat = FlatParameters(Adapter(DoRA(rank=2), parts), torch.device("cpu"))
    assert {name: buffer.numel() for name, buffer in flat.buffers.items()} == {"A": 6, "B": 9, "rest": 9}
    optimizer = OPTIMIZERS["adamw"](flat, TrainConfig(lora_plus_ratio=16.0), None)
    set_rate(optimizer, 1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 16e-3, 1e-3]


def test_lora_plus_without_factors_is_refused() -> None:
    part = Part("full", "override", "a", {"weight": torch.ones(2, 2)})
    flat = FlatParameters(Adapter(Full(), (part,)), torch.device("cpu"))
    with pytest.raises(ConfigError, match="lora_plus_ratio"):
        OPTIMIZERS["adamw"](flat, TrainConfig(lora_plus_ratio=16.0), None)
