"""What is special to LoRA-XS, SHiRA, OFT, to a VeRA without projections, and to a LoRA with a bias of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tinylm
from tests.formats.test_peft_parity import lora_config, wrapped
from tests.formats.tiny import llama
from tests.laws.world import fresh, method, stirred, world
from veneer.adapter import Adapter
from veneer.algebra import combine
from veneer.errors import FormatError, NeedsBase, TargetError, Unsupported
from veneer.formats.vllm import servable
from veneer.inject import ModuleSource, attach, create
from veneer.merge import merge
from veneer.methods import completed, delta, lower, merged, parse
from veneer.models.bank import compose
from veneer.models.load import load_base
from veneer.train import train
from veneer.types import Override

TARGET = "model.layers.0.self_attn.q_proj"


# -- LoRA-XS -----------------------------------------------------------------------------------------------------------


def test_lora_xs_works_between_the_strongest_directions() -> None:
    base = world()
    adapter = fresh(method("lora_xs"), base)
    t, weight = adapter.part(TARGET).tensors, base.host(TARGET).weight()
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(t["B"] @ t["A"], (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-4, atol=1e-5)
    trained = sum(p.tensors["R"].numel() for p in adapter.parts)
    assert trained == 9 * len(adapter.parts)
    moved = stirred(adapter)
    update = delta(moved, TARGET, None)
    inside = u[:, :3] @ u[:, :3].t() @ update @ vh[:3].t() @ vh[:3]
    torch.testing.assert_close(inside, update, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.scaled(0.5).delta(TARGET), 0.5 * update)


def test_lora_xs_and_adalora_are_loras_to_other_tools() -> None:
    for kind in ("lora_xs", "adalora"):
        adapter = stirred(fresh(method(kind), world()))
        plain, _ = servable(adapter)
        for part in plain.parts:
            torch.testing.assert_close(plain.delta(part.target), delta(adapter, part.target, None))


def test_lora_xs_keeps_its_singular_vectors_when_trained(tmp_path: Path) -> None:
    base = load_base(str(tinylm.folder(tmp_path / "base")), dtype="float32")
    rows = tinylm.chat_rows(tmp_path / "rows.jsonl", 8)
    spec = parse({"kind": "lora_xs", "rank": 4, "targets": ["q_proj"]})
    start = create(base, spec, torch.Generator())
    trained = train(base, rows, method=spec, out=tmp_path / "run", max_steps=3, lr=1e-2)
    for before, after in zip(start.parts, trained.parts, strict=True):
        assert torch.equal(before.tensors["A"], after.tensors["A"])
        assert torch.equal(before.tensors["B"], after.tensors["B"])
        assert after.tensors["R"].abs().sum() > 0


# -- SHiRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_shira_changes_its_entries_and_nothing_else(mask: str) -> None:
    base = world()
    adapter = stirred(fresh(method("shira", rank=2, mask=mask), base))
    for part in adapter.parts:
        host = base.host(part.target)
        out, inp = host.weight().shape
        changed = (merged(adapter, part.target, host)[0] != host.weight()).nonzero()
        assert len(changed) == 2 * (out + inp)
        assert torch.equal(changed, part.tensors["indices"].t())
        if mask == "magnitude":
            kept = host.weight().abs()[tuple(part.tensors["indices"])].min()
            assert (host.weight().abs() > kept).sum() == len(changed) - 1


def test_shiras_with_places_of_their_own_commute() -> None:
    base = world()
    one = stirred(fresh(method("shira", rank=1), base))
    free = torch.ones(16, 16, dtype=torch.bool)
    free[tuple(one.part(TARGET).tensors["indices"])] = False
    part = replace(one.part(TARGET), tensors={"values": torch.ones(32), "indices": free.nonzero()[:32].t()})
    other, host = replace(one, parts=(part,)), base.host(TARGET)
    from veneer.base.host import DenseHost

    first = merged(other, TARGET, DenseHost(merged(one, TARGET, host)[0]))[0]
    second = merged(one, TARGET, DenseHost(merged(other, TARGET, host)[0]))[0]
    assert torch.equal(first, second)


def test_shira_refuses_what_cannot_be() -> None:
    with pytest.raises(TargetError, match=r"rank 6 asks for 144 entries, the layer has 128: a rank up to 5 fits"):
        fresh(method("shira", rank=6, targets=["k_proj"]), world())
    base = world()
    adapter = fresh(method("shira", rank=1), base)
    adapter.part(TARGET).tensors["indices"][0, -1] = 16
    with pytest.raises(TargetError, match=r"an entry at \[16, \d+\], the weight is \[16, 16\]"):
        lower(adapter, base)


@pytest.mark.parity
def test_a_shira_file_whose_indices_are_wrong_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    fresh(method("shira", rank=1), world()).save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(n for n in tensors if n.endswith("shira_indices"))
    tensors[name][:, 1] = tensors[name][:, 0]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "veneer.json").unlink()
    with pytest.raises(FormatError, match="an index is negative or stands twice"):
        Adapter.load(tmp_path)


# -- OFT ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [False, True])
def test_oft_rotates(share: bool) -> None:
    """R is orthogonal, the merged weight keeps its singular values, and the inverse is the opposite Q."""
    base = world()
    adapter = stirred(fresh(method("oft", share=share), base)).map_tensors(lambda t: 3 * t)
    part, host = adapter.part(TARGET), base.host(TARGET)
    blocks = adapter.spec.rotation(part, 16)
    assert blocks.shape == (4, 4, 4) and len(part.tensors["skew"]) == (1 if share else 4)
    torch.testing.assert_close(blocks @ blocks.mT, torch.eye(4).expand(4, 4, 4), atol=1e-5, rtol=1e-5)
    weight = merged(adapter, TARGET, host)[0]
    torch.testing.assert_close(torch.linalg.svdvals(weight), torch.linalg.svdvals(host.weight()), rtol=1e-4, atol=1e-5)
    back = merged(adapter.map_tensors(lambda t: -t), TARGET, type(host)(weight))[0]
    torch.testing.assert_close(back, host.weight(), rtol=1e-4, atol=1e-5)


def test_the_series_comes_near_a_rotation_the_other_way_round() -> None:
    base = world()
    exact = stirred(fresh(method("oft"), base))
    exact = exact.map_tensors(lambda t: 0.2 * t)
    part = exact.part(TARGET)
    wrong = exact.spec.rotation(part, 16).mT
    errors = []
    for terms in (3, 5, 9, 13):
        near = exact.spec.model_copy(update={"cayley": "neumann", "terms": terms}).rotation(part, 16)
        errors.append(float((near - wrong).abs().max()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 < errors[0]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"block": 5}, r"a block of 5 does not divide its 16 inputs; 4 would"),
        ({"block": 0, "blocks": 3}, r"3 blocks do not divide its 16 inputs; 2 would"),
    ],
)
def test_oft_refuses_blocks_that_do_not_fit(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(TargetError, match=match):
        fresh(method("oft", targets=["q_proj"], **fields), world())


def test_oft_wants_a_size() -> None:
    with pytest.raises(ValueError, match="size of a block"):
        parse({"kind": "oft", "block": 0})


def test_files_of_another_oft_are_refused(tmp_path: Path) -> None:
    import json

    fresh(method("oft", cayley="neumann"), world()).save(tmp_path)
    (tmp_path / "veneer.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, match in (
        ({"peft_version": "0.17.1"}, "the series of PEFT before 0.18 was another one"),
        ({"coft": True}, "coft = True is not something veneer can honour"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(FormatError, match=match):
            Adapter.load(tmp_path)
    del config["oft_block_size"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"older than PEFT 0\.15"):
        Adapter.load(tmp_path)


# -- what replaces the weight ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shira", "oft"])
def test_what_is_no_small_product_runs_as_a_replaced_weight(kind: str) -> None:
    base = world("nf4")
    adapter = stirred(fresh(method(kind), base))
    lowered = lower(adapter, base)
    assert not lowered.weights and all(isinstance(o, Override) for o in lowered.overrides.values())
    assert len(lowered.overrides) == len(adapter.parts)
    with pytest.raises(Unsupported, match="replaced tensors"):
        compose([lowered, lowered])
    with pytest.raises(Unsupported, match="vLLM can't serve"):
        servable(adapter)


@pytest.mark.parametrize("kind", ["shira", "oft", "lora_xs", "adalora"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_short_run_learns_and_merges(kind: str, quantize: str | None, tmp_path: Path) -> None:
    folder = tinylm.folder(tmp_path / "base")
    base = load_base(str(folder), dtype="float32", quantize=quantize)
    rows = tinylm.chat_rows(tmp_path / "rows.jsonl", 8)
    fields = {"oft": {"block": 8}, "adalora": {"rank": 4, "target_rank": 3}}.get(kind, {"rank": 4})
    spec = parse({"kind": kind, **fields})
    lines: list[float] = []
    settings = {"epochs": 6, "tokens_per_step": 200, "lr": 2e-2, "schedule": "constant"}
    adapter = train(
        base,
        rows,
        method=spec,
        out=tmp_path / "run",
        on_event=lambda e: lines.append(getattr(e, "loss", 0.0)),
        **settings,
    )
    losses = [line for line in lines if line]
    assert losses[-1] < losses[0] - 0.05
    if quantize is None:
        merge(folder, adapter, tmp_path / "merged")
        again = load_base(str(tmp_path / "merged"), dtype="float32")
        for target in adapter.targets:
            expected = merged(adapter, target, base.host(target))[0]
            torch.testing.assert_close(again.host(target).weight(), expected, rtol=1e-5, atol=1e-6)


# -- VeRA without projections ------------------------------------------------------------------------------------------


def test_a_vera_whose_projections_come_from_a_key() -> None:
    base = world()
    adapter = stirred(fresh(method("vera", projection_key=3), base))
    assert all(part.target is not None for part in adapter.parts)
    with pytest.raises(NeedsBase, match="leaves out A and B"):
        delta(adapter, TARGET, base.host(TARGET))
    whole = completed(adapter, base)
    shared = whole.parts[0].tensors
    assert shared["A"].shape == (3, 20) and shared["B"].shape == (20, 3)
    primitives, stored = lower(adapter, base).weights, lower(whole, base).weights
    for target, (product,) in primitives.items():
        assert torch.equal(product.A, stored[target][0].A) and torch.equal(product.B, stored[target][0].B)
    with pytest.raises(NeedsBase, match="depends on the frozen weight"):
        combine({"a": adapter}, "cat")
    both = combine({"a": (adapter, 0.5)}, "cat", base=base)
    torch.testing.assert_close(both.delta(TARGET), 0.5 * delta(whole, TARGET, base.host(TARGET)), rtol=1e-5, atol=1e-6)
    bound = (6 / 20) ** 0.5
    assert shared["A"].abs().max() <= bound and shared["A"].abs().max() > 0.8 * bound


def test_such_a_file_is_small_and_merges_into_a_checkpoint(tmp_path: Path) -> None:
    folder = tinylm.folder(tmp_path / "base")
    base = load_base(str(folder), dtype="float32")
    fields = {"kind": "vera", "rank": 64, "targets": ["q_proj", "down_proj"]}
    small = stirred(create(base, parse({**fields, "projection_key": 9}), torch.Generator().manual_seed(0)))
    small.save(tmp_path / "small")
    create(base, parse(fields), torch.Generator().manual_seed(0)).save(tmp_path / "large")
    sizes = [(tmp_path / n / "adapter_model.safetensors").stat().st_size for n in ("small", "large")]
    assert sizes[0] < sizes[1] / 4
    merge(folder, Adapter.load(tmp_path / "small"), tmp_path / "merged")
    again, whole = load_base(str(tmp_path / "merged"), dtype="float32"), completed(small, base)
    for target in small.targets:
        expected = merged(whole, target, base.host(target))[0]
        torch.testing.assert_close(again.host(target).weight(), expected, rtol=1e-5, atol=1e-6)


# -- lora_bias ---------------------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_a_trained_bias_is_scaled_with_the_update(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with pytest.warns(peft.utils.warning.PeftWarning, match="has no bias"):
        model = wrapped(llama(), lora_config({"target_modules": ["q_proj"], "lora_bias": True}))
    model.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    host = ModuleSource(llama()).host(TARGET)
    _, bias = merged(adapter, TARGET, host)
    torch.testing.assert_close(bias, 1.5 * adapter.part(TARGET).tensors["bias"])
    with pytest.raises(Unsupported, match="biases are not loaded"):
        servable(adapter)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"lora_bias": True, "bias": "all"}, "choose one"),
        ({"lora_bias": True, "targets": ["embed_tokens"]}, "no bias for lora_bias"),
    ],
)
def test_biases_that_cannot_be(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fresh(parse({"kind": "lora", "rank": 2, **fields}), world())


def test_a_bias_survives_a_shifted_start() -> None:
    base = llama()
    spec = parse({"kind": "lora", "rank": 2, "init": "pissa", "lora_bias": True, "targets": ["q_proj"]})
    adapter = stirred(create(ModuleSource(base), spec, torch.Generator().manual_seed(0)))
    ids = torch.arange(6)[None]
    outputs = []
    for value in (adapter, spec.folded(adapter)):
        handle = attach(base, value)
        with torch.no_grad():
            outputs.append(base(ids).logits)
        handle.detach()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
