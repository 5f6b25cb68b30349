"""AdaLoRA: the budget, the importance and the penalty against PEFT's own, and a whole run that stops and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tinylm
from tests.formats.tiny import llama
from tests.laws.world import fresh, method, stirred, world
from veneer.adapter import Adapter
from veneer.errors import ConfigError, Unsupported
from veneer.formats.vllm import servable
from veneer.inject import attach
from veneer.methods import folded, lower, parse
from veneer.methods.adalora import AdaLoRA, Budget
from veneer.models.load import load_base
from veneer.train import train
from veneer.train.api import read_task
from veneer.train.config import Resolved, RunConfig, validate
from veneer.train.run import run_task

IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(4))


def test_the_budget_falls_on_a_cubic_curve() -> None:
    budget = Budget(AdaLoRA(rank=12, target_rank=4, hold_first=0.1, hold_last=0.3), 100)
    counts = [budget.triplets(step, 5) for step in range(101)]
    assert counts[:11] == [60] * 11 and counts[70:] == [20] * 31
    assert counts[40] == int(40 * 0.5**3 + 20)
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rank": 4, "target_rank": 5}, "target_rank 5 is above the rank at the start, 4"),
        ({"hold_first": 0.5, "hold_last": 0.5}, "leave no step"),
    ],
)
def test_a_schedule_that_cannot_be_says_so(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AdaLoRA(**fields)


def test_a_run_too_short_for_its_budget_says_so() -> None:
    with pytest.raises(ConfigError, match="a run of 2 steps leaves AdaLoRA's budget none to fall in"):
        AdaLoRA().regime(2)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # PEFT's, of its own files too
def test_every_cut_is_the_one_that_peft_makes(tmp_path: Path) -> None:
    """Both start from one file, learn the same steps with plain gradient descent, and agree on every number after each."""
    peft = pytest.importorskip("peft")
    total = 12
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=2, total_step=total, lora_alpha=8, beta1=0.7, beta2=0.9,
        target_modules=["q_proj", "down_proj"], orth_reg_weight=0.3, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(llama(), config).train()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        assert "ranknum" not in name or not parameter.requires_grad
    theirs.save_pretrained(tmp_path / "start")
    adapter = Adapter.load(tmp_path / "start")
    spec = adapter.spec
    assert isinstance(spec, AdaLoRA) and (spec.rank, spec.target_rank, spec.every, spec.beta1) == (4, 2, 2, 0.7)
    assert spec.hold_first * total == pytest.approx(2) and spec.hold_last * total == pytest.approx(4)
    base = llama()
    handle, regime = attach(base, adapter), spec.regime(total)
    ours_params = handle.parameters()
    theirs_params = [p for p in theirs.parameters() if p.requires_grad]
    ours_optimiser, their_optimiser = torch.optim.SGD(ours_params, lr=0.3), torch.optim.SGD(theirs_params, lr=0.3)
    alive = []
    for step in range(1, total + 1):
        theirs(IDS, labels=IDS).loss.backward()
        their_optimiser.step()
        theirs.base_model.update_and_allocate(step)
        their_optimiser.zero_grad()
        parts = [part for layer in handle.layers.values() for part in layer.parts()]
        loss = base(IDS, labels=IDS).loss + regime.penalty(parts)
        loss.backward()
        ours_optimiser.step()
        gradients = [
            type(p)(p.kind, p.site, p.target, {n: t.grad for n, t in p.tensors.items()}, p.host) for p in parts
        ]
        values = [type(p)(p.kind, p.site, p.target, {n: t.data for n, t in p.tensors.items()}, p.host) for p in parts]
        regime.after_step(step, values, gradients)
        ours_optimiser.zero_grad()
        for part in values:
            layer = theirs.base_model.model.get_submodule(part.target)
            for name, theirs_name in {"P": "lora_B", "Q": "lora_A", "E": "lora_E"}.items():
                expected = getattr(layer, theirs_name)["default"].detach().reshape(part.tensors[name].shape)
                torch.testing.assert_close(part.tensors[name], expected, rtol=1e-3, atol=1e-5)
        alive.append(sum(int((part.tensors["E"] != 0).sum()) for part in values))
    assert alive[0] == 16 and alive[-1] == 8 and len(set(alive)) > 2
    theirs.save_pretrained(tmp_path / "end")
    with torch.no_grad():
        expected = theirs.eval()(IDS).logits
    kept = folded(handle.adapter())
    assert sum(len(p.tensors["E"]) for p in kept.parts) == 8
    for loaded in (kept, Adapter.load(tmp_path / "end")):
        plain = llama()
        attach(plain, loaded)
        with torch.no_grad():
            torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    kept.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parity
def test_a_layer_that_peft_left_no_rank_is_read_past(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(
        init_r=3, target_r=1, total_step=10, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(llama(), config)
    names = [n for n, _ in theirs.base_model.model.named_parameters() if "lora_E" in n]
    for _, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    mask = {n: [True, False, True] if "q_proj" in n else [False] * 3 for n in names}
    theirs.peft_config["default"].rank_pattern = mask
    theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, mask)
    with torch.no_grad():
        expected = theirs.eval()(IDS).logits
    theirs.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert {p.target.rpartition(".")[2] for p in adapter.parts} == {"q_proj"}
    assert all(len(p.tensors["E"]) == 2 for p in adapter.parts)
    plain = llama()
    attach(plain, adapter)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_dropped_triplets_are_not_stored_and_the_function_stays(tmp_path: Path) -> None:
    base = world()
    adapter = stirred(fresh(method("adalora", rank=3), base))
    for i, part in enumerate(adapter.parts):
        part.tensors["E"][: i % 4] = 0.0
    kept = folded(adapter)
    assert {p.target for p in adapter.parts} - {p.target for p in kept.parts} == {
        p.target for i, p in enumerate(adapter.parts) if i % 4 == 3
    }
    before, after = lower(adapter, base).weights, lower(kept, base).weights
    for target, (product,) in after.items():
        torch.testing.assert_close(product.B @ product.A, before[target][0].B @ before[target][0].A)
    adapter.save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a").digest == kept.digest
    (tmp_path / "a" / "veneer.json").unlink()
    from_peft = lower(Adapter.load(tmp_path / "a"), base).weights
    for target, (product,) in after.items():
        torch.testing.assert_close(product.B @ product.A, from_peft[target][0].B @ from_peft[target][0].A)
    plain, _ = servable(kept)
    for part in plain.parts:
        torch.testing.assert_close(part.tensors["B"] @ part.tensors["A"], kept.delta(part.target))


def test_a_run_ends_at_its_budget_and_resumes_bitwise(tmp_path: Path) -> None:
    base = load_base(str(tinylm.folder(tmp_path / "base")), dtype="float32")
    rows = tinylm.chat_rows(tmp_path / "rows.jsonl", 12)
    spec = parse({"kind": "adalora", "rank": 4, "target_rank": 2, "targets": ["q_proj", "up_proj"]})
    settings = {"max_steps": 10, "lr": 5e-3, "save_every": 4, "tokens_per_step": 200}
    whole = train(base, rows, method=spec, out=tmp_path / "whole", **settings)
    ranks = [len(p.tensors["E"]) for p in whole.parts]
    assert sum(ranks) == 2 * 6 and isinstance(whole.spec, AdaLoRA)
    assert set(whole.spec.kept.values()) <= set(ranks)
    values = {
        "base": base.name, "data": {"train": str(rows)}, "out": str(tmp_path / "cut"), "train": settings,
        "method": {"kind": "adalora"} | spec.model_dump(mode="json"),
    }  # fmt: skip
    task = read_task(base, Resolved(validate(RunConfig, values, "the test"), {}))
    done = 0

    def enough() -> bool:
        nonlocal done
        done += 1
        return done > 6

    list(run_task(base, task, tmp_path / "cut", should_stop=enough))
    list(run_task(base, task, tmp_path / "cut", resume=True))
    again = Adapter.load(tmp_path / "cut" / "adapter")
    for one, other in zip(whole.parts, again.parts, strict=True):
        assert one.target == other.target
        for name, tensor in one.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), (one.target, name)


def test_it_has_no_scale_to_change() -> None:
    with pytest.raises(Unsupported, match="cannot be scaled"):
        fresh(method("adalora"), world()).scaled(0.5)
