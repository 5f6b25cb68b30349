"""What data-driven starts are given: directions, gradients, weights and texts, each against its definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import tinylm
from veneer.data import Dataset, batch, encode, load
from veneer.errors import ConfigError
from veneer.inject import attached, create
from veneer.inject.native import bank_of
from veneer.methods import lower
from veneer.methods.lora import LoRA
from veneer.methods.prefix import PrefixTuning
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.train import lots
from veneer.train.calibrate import calibrate, gradients, spread
from veneer.train.config import TrainConfig
from veneer.train.inputs import Directions, covariances, input_directions
from veneer.train.loop import pass_loss
from veneer.train.run import Task, run_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinylm.folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def dataset(base: Base, folder: Path) -> Dataset:
    return encode(load(tinylm.chat_rows(folder / "rows.jsonl", 20)), base.require_tokenizer(), max_length=256)


def test_incremental_directions_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 12, generator=generator, dtype=torch.float64) * torch.linspace(3, 0.1, 12) + 1.5
    seen = Directions(12)
    for piece in rows.split(50):
        seen.update(piece)
    _, values, vectors = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    assert seen.vectors is not None and seen.values is not None
    assert torch.allclose((seen.vectors @ vectors.T).abs(), torch.eye(12, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(seen.values, values, rtol=1e-9)
    assert seen.total == pytest.approx(float(values.square().sum()))


def test_layers_with_one_input_share_their_directions(base: Base, dataset: Dataset) -> None:
    targets = [f"model.layers.1.self_attn.{p}_proj" for p in "qkv"]
    passes = [list(range(10)), list(range(10, 20))]
    found = input_directions(base, dataset, passes, targets, 4, lambda share: None)
    one, two, three = (found[t].components for t in targets)
    assert one is not None and torch.equal(one, two) and torch.equal(one, three)
    assert torch.allclose(one @ one.T, torch.eye(4), atol=1e-5)


@pytest.mark.parametrize("target", ["model.layers.0.mlp.down_proj", "lm_head", "model.embed_tokens"])
def test_the_gradient_is_that_of_the_dense_weight(base: Base, dataset: Dataset, target: str) -> None:
    """On the tied embedding, too: an adapter there does not reach the head, and neither does its gradient."""
    assert base.config.tied_head
    step = 1e-4 if target == base.layout.embed_path else 1e-2
    rows = list(range(6))
    gradient = gradients(base, dataset, [rows], [target], lambda share: None)[target].gradient
    assert gradient is not None
    fresh = create(base, LoRA(rank=1, alpha=1, targets=(target,)), torch.Generator().manual_seed(0))
    u, v = (torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in gradient.shape)
    u, v = u[:, None], v[None]
    part = fresh.parts[0]
    losses = []
    for sign in (step, -step):
        moved = replace(fresh, parts=(replace(part, tensors={"A": v, "B": sign * u}),))
        bank = bank_of(base, [lower(moved, base)])
        item = batch(dataset, rows, 0)
        losses.append(float(pass_loss(base, bank, item).detach() / item.weights.sum()))
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(float((gradient * (u @ v)).sum()), rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("init", ["eva", "lora_ga", "corda", "corda_kpm"])
def test_a_data_driven_start_leaves_the_function_unchanged(base: Base, dataset: Dataset, init: str) -> None:
    spec = LoRA(rank=2, alpha=4, scaling="alpha/sqrt(r)", init=init)
    stats = calibrate(base, spec, dataset, 0, general=dataset)
    ids = [[5, 6, 7, 8]]
    before = base.logits(ids)
    with attached(base, create(base, spec, torch.Generator().manual_seed(0), stats=stats)):
        assert torch.allclose(base.logits(ids), before, atol=1e-4)


def test_lora_one_starts_with_a_lower_loss(base: Base, dataset: Dataset) -> None:
    spec = LoRA(rank=4, alpha=8, scaling="alpha/sqrt(r)", init="lora_one")
    adapter = create(base, spec, torch.Generator().manual_seed(0), stats=calibrate(base, spec, dataset, 0))
    item = batch(dataset, list(range(len(dataset))), 0)
    plain, moved = (float(pass_loss(base, bank_of(base, [lower(a, base)]), item).detach()) for a in (create(
        base, LoRA(rank=4, alpha=8), torch.Generator().manual_seed(0)), adapter))  # fmt: skip
    assert moved < plain


def test_covariances_are_those_of_the_inputs(base: Base, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """x of the first block's q, k, v is the normed embedding. One lot or many, the numbers are the same."""
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"] + ["model.layers.1.mlp.down_proj", "lm_head"]
    passes = [list(range(10)), list(range(10, 20))]
    found = covariances(base, dataset, passes, names, lambda share: None)
    tokens = torch.cat([batch(dataset, rows, -1).tokens for rows in passes])
    x = base.decoder.embed[tokens].double()
    weight = base.decoder.tensors["layers.0.attn_norm"].double()
    x = x * (x.square().mean(dim=1, keepdim=True) + base.config.norm_eps).rsqrt() * weight
    first = found[names[0]].covariance
    assert first is not None
    torch.testing.assert_close(first, x.t() @ x / len(x), rtol=1e-4, atol=1e-6)
    whole = {name: found[name].covariance for name in names}
    monkeypatch.setattr(lots, "LOT_BYTES", 1)
    shares: list[float] = []
    single = covariances(base, dataset, passes, names, shares.append)
    for name in names:
        torch.testing.assert_close(single[name].covariance, whole[name], rtol=1e-6, atol=0)
        assert len(single._held) == 1, "one lot at a time"
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_the_head_can_start_from_its_inputs(base: Base, dataset: Dataset) -> None:
    found = input_directions(base, dataset, [list(range(10))], ["lm_head"], 4, lambda share: None)["lm_head"]
    assert found.components is not None and found.components.shape == (4, 32)


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_an_embedding_has_no_inputs_to_start_from(base: Base, dataset: Dataset, init: str) -> None:
    with pytest.raises(ConfigError, match=r"those of 'model\.embed_tokens' are token ids"):
        calibrate(base, LoRA(rank=2, init=init, targets=("embed_tokens", "q_proj")), dataset, 0)


def test_quantised_starts_bring_the_function_nearer_to_the_original(folder: Path, dataset: Dataset) -> None:
    """The same base in 4 bits: with LoftQ or QPiSSA its weights are nearer to the 16-bit ones than without."""
    small = load_base(str(folder), dtype="float32", quantize="nf4")
    full = load_base(str(folder), dtype="float32")
    target = "model.layers.1.mlp.up_proj"
    lost = torch.linalg.norm(full.host(target).weight() - small.host(target).weight())
    for init in ("loftq", "qpissa"):
        spec = LoRA(rank=4, alpha=8, init=init)
        adapter = create(small, spec, torch.Generator().manual_seed(0), stats=calibrate(small, spec, dataset, 0))
        rest = full.host(target).weight() - small.host(target).weight() - adapter.delta(target)
        assert torch.linalg.norm(rest) < lost


def test_eva_moves_ranks_and_keeps_the_budget_and_the_scale(base: Base, dataset: Dataset) -> None:
    spec = LoRA(rank=4, alpha=8, init="eva", rho=2.0)
    stats = calibrate(base, spec, dataset, 0)
    moved = spread(spec, stats)
    assert isinstance(moved, LoRA)
    adapter = create(base, moved, torch.Generator().manual_seed(0), stats=stats)
    ranks = [p.tensors["A"].shape[0] for p in adapter.parts]
    assert sum(ranks) == 4 * 21 and max(ranks) <= 8 and len(set(ranks)) > 1
    assert {round(adapter.scale(t), 6) for t in adapter.targets} == {2.0}


def test_a_text_prefix_is_the_text_in_the_context(base: Base, dataset: Dataset) -> None:
    text = "say it short and sweet"
    spec = PrefixTuning(num_tokens=8, encoder=0, init="text", init_text=text)
    stats = calibrate(base, spec, dataset, 0)
    ready = spec.prepared(base.require_tokenizer().encode)
    adapter = create(base, ready, torch.Generator().manual_seed(0), stats=stats)
    ids = base.require_tokenizer().encode(text)[:8]
    rest = [5, 6, 7, 8, 9]
    expected = base.logits([ids + rest])[:, 8:]
    with attached(base, adapter):
        assert torch.allclose(base.logits([rest]), expected, atol=1e-5)


def test_what_cannot_be_gathered_is_refused(base: Base, dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="not quantised"):
        calibrate(base, LoRA(rank=2, init="loftq"), dataset, 0)
    with pytest.raises(ConfigError, match=r"init: qpissa .* not quantised"):
        calibrate(base, LoRA(rank=2, init="qpissa"), dataset, 0)
    with pytest.raises(ConfigError, match=r"data\.general"):
        calibrate(base, LoRA(rank=2, init="corda_kpm"), dataset, 0)
    with pytest.raises(ConfigError, match="tokens for 500"):
        calibrate(base, PrefixTuning(num_tokens=500, encoder=0, init="text", init_text="short"), dataset, 0)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_run_tells_how_far_its_calibration_is(base: Base, dataset: Dataset, tmp_path: Path, init: str) -> None:
    shares: list[float] = []
    config = TrainConfig(max_steps=1, tokens_per_step=100)
    task = Task(LoRA(rank=2, init=init), config, dataset, looking=shares.append)
    for _ in run_task(base, task, tmp_path / "run"):
        pass
    assert shares == sorted(shares) and shares[-1] == 1.0
