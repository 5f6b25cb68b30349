"""Identity: the same for the same weights in any file, layout or precision; different for any other weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.laws.world import fresh, method, world
from tests.models import gguf_writer, tiny
from veneer import methods
from veneer.adapter import Adapter, Part, Provenance
from veneer.base.identity import GOLDEN, SAMPLES, Hasher, compare, identity_of, same_weights, sampled
from veneer.errors import BaseMismatch
from veneer.inject import attached
from veneer.methods.lora import LoRA
from veneer.models.base import Base
from veneer.models.load import load_base

TARGET = "model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose values are bf16 ones, so that a bf16 copy of it has the same values."""
    folder = tiny.checkpoint("llama", tmp_path_factory.mktemp("base"))
    rewrite(folder, lambda tensor: tensor.bfloat16().float())
    return folder


def rewrite(folder: Path, change: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: change(t) for n, t in tensors.items()}, folder / "model.safetensors")  # type: ignore[operator]


def copied(folder: Path, place: Path, change: object) -> Base:
    place.mkdir()
    for name in ("config.json", "model.safetensors"):
        (place / name).write_bytes((folder / name).read_bytes())
    rewrite(place, change)
    return load_base(place, dtype="float32")


def adapter_for(made_on: Base, **provenance: object) -> Adapter:
    factors = {"A": torch.zeros(2, 48), "B": torch.zeros(24, 2)}
    known = Provenance(made_on.identity, made_on.name, {TARGET: made_on.samples(TARGET)})
    return Adapter(LoRA(rank=2), (Part("lora", "weight", TARGET, factors),), replace(known, **provenance))


def test_precision_and_file_format_are_not_part_of_it(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, dtype="float32")
    assert base.identity == load_base(folder, dtype="bfloat16").identity
    assert base.identity == load_base(folder, dtype="float32", quantize="int8").identity
    assert base.identity == copied(folder, tmp_path / "half", lambda t: t.bfloat16()).identity
    gguf_file = gguf_writer.write(loaded(folder), tmp_path / "m.gguf")
    assert base.identity == load_base(gguf_file, dtype="float32").identity


def loaded(folder: Path) -> object:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_it_is_the_identity_of_the_tensors_in_any_order(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert load_base(folder, dtype="float32").identity == identity_of(dict(reversed(tensors.items())))


@pytest.mark.parametrize("change", ["value", "name", "shape"])
def test_any_other_weight_is_another_base(change: str) -> None:
    first, second = {"a.weight": torch.arange(12.0).view(3, 4)}, {"a.weight": torch.arange(12.0).view(3, 4)}
    assert identity_of(first) == identity_of(second)
    if change == "value":
        second["a.weight"][2, 3] += 1
    elif change == "name":
        second = {"b.weight": second["a.weight"]}
    else:
        second["a.weight"] = second["a.weight"].view(4, 3)
    assert identity_of(first) != identity_of(second)


def test_rounding_forgives_less_than_half_a_bf16_step_and_no_more() -> None:
    hasher = Hasher()
    hasher.add("w", torch.tensor([1.0]))
    for value, same in ((1.0 + 2**-9, True), (1.0 + 2**-7, False)):
        assert (identity_of({"w": torch.tensor([value])}) == hasher.identity()) is same


def test_samples_are_spread_over_the_whole_weight() -> None:
    places = torch.arange(1000 * 64.0).view(1000, 64)
    values = sampled(places)
    assert len(values) == SAMPLES
    rows = {int(v) // 64 for v in values}
    columns = {int(v) % 64 for v in values}
    assert len(rows) > 55 and len(columns) > 30 and max(rows) > 900 and min(rows) < 100
    assert GOLDEN % 2 == 1
    assert len(sampled(torch.ones(3, 2))) == SAMPLES


def test_samples_do_not_depend_on_the_storage(tmp_path: Path) -> None:
    base, model = tiny.base("gpt2")
    tiny.checkpoint("gpt2", tmp_path / "m")
    loaded = load_base(tmp_path / "m", dtype="float32")
    path = "transformer.h.0.attn.c_attn"
    assert loaded.samples(path) == sampled(base.host(path).weight())
    assert loaded.samples(path) == sampled(model.get_submodule(path).weight.t())
    assert loaded.samples("lm_head") == loaded.samples("transformer.wte") == sampled(model.transformer.wte.weight)


def test_equal(folder: Path) -> None:
    base = load_base(folder, dtype="float32")
    assert compare(adapter_for(base), load_base(folder, dtype="bfloat16")).outcome == "equal"


def test_other_precision(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, dtype="float32")
    nudged = copied(folder, tmp_path / "nudged", lambda t: t * (1 + 0.9 * 2**-8))
    assert nudged.identity != base.identity
    verdict = compare(adapter_for(base), nudged)
    assert verdict.outcome == "other precision" and "another precision" in verdict.detail
    assert same_weights((1.0, -2.0, 0.0), (1.0, -2.0 - 2**-7, 0.0))
    assert not same_weights((1.0, 0.0), (1.0, 1e-3)) and not same_weights((1.0,), (1.0, 1.0))
    assert not same_weights((), ()), "nothing was compared"


def test_unverified(folder: Path) -> None:
    base = load_base(folder, dtype="float32")
    verdict = compare(adapter_for(base, base=None, base_samples={}), base)
    assert verdict.outcome == "unverified" and "does not say" in verdict.detail


def test_refused_and_allowed(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, dtype="float32")
    other = copied(folder, tmp_path / "other", lambda t: t + 0.25)
    with pytest.raises(BaseMismatch) as caught:
        compare(adapter_for(base), other)
    said = str(caught.value)
    assert base.identity and other.identity and base.identity[:12] in said and other.identity[:12] in said
    assert f"1 of 1 sampled layers differ, first {TARGET}" in said and "--allow-base-mismatch" in said
    verdict = compare(adapter_for(base), other, allow="the same family, on purpose")
    assert verdict.outcome == "allowed" and "on purpose" in verdict.detail


def test_a_shape_that_does_not_fit_is_refused_whatever_is_allowed(folder: Path) -> None:
    base = load_base(folder, dtype="float32")
    wrong = {"A": torch.zeros(2, 48), "B": torch.zeros(25, 2)}
    stray = Part("lora", "weight", "model.layers.7.self_attn.v_proj", wrong)
    adapter = replace(adapter_for(base), parts=(Part("lora", "weight", TARGET, wrong), stray))
    with pytest.raises(BaseMismatch) as caught:
        compare(adapter, base, allow="whatever")
    assert "B is [25, 2]" in str(caught.value) and "layers.7.self_attn.v_proj is not a layer" in str(caught.value)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "vera", "bitfit"])
def test_every_tensor_of_a_part_is_measured_not_only_its_factors(kind: str) -> None:
    base = world()
    adapter = fresh(method(kind), base)
    parts = [p for p in adapter.parts if p.site == "weight" and p.target is not None]
    for part in parts:
        shape = base.shape.hosts[part.target or ""]
        assert adapter.misfits(part, base.shape) == []
        larger = replace(shape, in_features=shape.in_features + 1, out_features=shape.out_features + 1)
        told = adapter.misfits(part, replace(base.shape, hosts={part.target or "": larger}))
        sized = [n for n, t in part.tensors.items() if {shape.in_features, shape.out_features} & set(t.shape)]
        assert sized and all(any(line.startswith(f"{part.target}: {name} is") for line in told) for name in sized)
    assert parts


def test_a_part_of_another_rank_than_the_spec_says_still_fits() -> None:
    adapter = fresh(method("lora", rank=3), world())
    part = adapter.parts[0]
    shape = world().shape.hosts[part.target or ""]
    doubled = {"A": part.tensors["A"].repeat(2, 1), "B": part.tensors["B"].repeat(1, 2)}
    assert adapter.misfits(replace(part, tensors=doubled), world().shape) == []
    torn = {"A": doubled["A"], "B": part.tensors["B"]}
    out, inp = shape.out_features, shape.in_features
    assert adapter.misfits(replace(part, tensors=torn), world().shape) == [
        f"{part.target}: B is [{out}, 3], expected [{out}, 6] for {out} x {inp}"
    ]


def test_a_single_number_counts_too() -> None:
    assert identity_of({"x": torch.tensor(1.0)}) != identity_of({"x": torch.tensor(2.0)})


OFF_WEIGHTS = {
    "a layer that is not there": ("bottleneck", "layers.9.mlp_out", {}, "layers.9.mlp_out is not a sublayer"),
    "a sublayer that is not there": ("bottleneck", "layers.0.attn_in", {}, "layers.0.attn_in is not a sublayer"),
    "too narrow": ("bottleneck", "layers.0.mlp_out", {"down": (4, 16)}, r"down is \[4, 16\], expected \[any, 48\]"),
    "rows of another width": ("prompt", None, {"rows": (2, 16)}, r"rows is \[2, 16\], expected \[any, 48\]"),
    "a prefix of fewer layers": ("prefix", None, {"key": (1, 2, 2, 16), "value": (1, 2, 2, 16)}, r"expected \[\d, any"),
    "keys without values": ("prefix", None, {"key": (2, 2, 2, 16), "value": (2, 3, 2, 16)}, "expected equal sizes"),
}


@pytest.mark.parametrize("case", OFF_WEIGHTS)
def test_what_does_not_act_on_a_weight_has_to_fit_too(case: str, folder: Path) -> None:
    base = load_base(folder, dtype="float32")
    kind, target, sizes, told = OFF_WEIGHTS[case]
    site = methods.load_all()[kind].site
    part = Part(kind, site, target, {name: torch.zeros(size) for name, size in sizes.items()})
    adapter = Adapter(methods.parse({"kind": kind}), (part,))
    with pytest.raises(BaseMismatch, match=told):
        compare(adapter, base)
    with pytest.raises(BaseMismatch, match=told), attached(base, adapter):
        pass


def test_attached_refuses_an_adapter_of_other_weights(folder: Path, tmp_path: Path) -> None:
    base, other = load_base(folder, dtype="float32"), load_base(tiny.checkpoint("qwen2", tmp_path, seed=5), "float32")
    adapter = adapter_for(base)
    with pytest.raises(BaseMismatch, match="made for another base"), attached(other, adapter):
        pass
    with attached(other, adapter, allow_base_mismatch="on purpose"):
        assert other.logits([[1, 2]]).isfinite().all()
