"""Merging file to file: the value, the rounding, the files, and every refusal."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.tiny import checkpoint
from veneer import methods
from veneer.adapter import Adapter, Part, Provenance
from veneer.errors import BaseMismatch, Conflict, FormatError, NotFound, ResourceError, TargetError, Unsupported
from veneer.formats.gguf_export import export_model
from veneer.formats.gguf_words import tokenizer_fields
from veneer.inject import attach, create
from veneer.merge import Merged, agreement, exact, merge, merge_four_bit, unmerge, write_checkpoint
from veneer.methods.lora import LoRA
from veneer.models.base import Base, bound
from veneer.models.load import load_base


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def folder(tmp_path: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    made = checkpoint(name, tmp_path / "base", **changes)
    if dtype != torch.float32:
        for file in made.glob("*.safetensors"):
            save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    return made


def trained(base: Base, spec: Any, size: float = 0.02) -> Adapter:
    """An adapter of `spec` that is not at its start any more."""
    g = torch.Generator().manual_seed(7)
    fresh = create(base, spec, g, provenance=Provenance(base=base.identity, base_name=base.name))
    frozen = spec.frozen()

    def moved(part: Part) -> Part:
        noise = {
            n: t + size * torch.randn(t.shape, generator=g) if t.is_floating_point() and n not in frozen else t
            for n, t in part.tensors.items()
        }
        return Part(part.kind, part.site, part.target, noise, part.host)

    samples = {t: base.samples(t) for t in fresh.targets if t in base.shape.hosts}
    provenance = Provenance(base=base.identity, base_name=base.name, base_samples=samples)
    return Adapter(spec, tuple(moved(p) for p in fresh.parts), provenance)


def hf_logits(path: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 33).view(2, 15)).logits


def by_definition(path: Path, adapter: Adapter) -> Tensor:
    """What each method's own `forward` gives on the transformers model; replaced tensors are simply put there."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if adapter.spec.kind == "full":
        own = {f"{p.target}.{name}": t for p in adapter.parts for name, t in p.tensors.items()}
        assert not model.load_state_dict(own, strict=False).unexpected_keys
    else:
        attach(model, adapter)
    with torch.no_grad():
        return model(torch.arange(3, 33).view(2, 15)).logits


def ours(base: Base, adapter: Adapter) -> Tensor:
    bank = base.bank([methods.lower(adapter, base)])
    with torch.no_grad(), bound(base, bank, 0):
        return base.logits(torch.arange(3, 33).view(2, 15))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3", "gemma3_text"])
@pytest.mark.parametrize("kind", ["lora", "dora", "vera", "full"])
def test_the_merged_model_computes_what_the_adapter_does(tmp_path: Path, name: str, kind: str) -> None:
    base = load_base(folder(tmp_path, name), "float32")
    adapter = trained(base, methods.parse({"kind": kind} | ({} if kind == "full" else {"rank": 4})))
    report = merge(base, adapter, tmp_path / "out")
    assert report.lost < 1e-5
    assert not report.warnings()
    got = hf_logits(tmp_path / "out")
    wanted = ours(base, adapter) if kind == "vera" else by_definition(tmp_path / "base", adapter)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
    assert float((got - hf_logits(tmp_path / "base")).norm() / wanted.norm()) > 1e-3


def test_merged_and_attached_agree_on_probes(tmp_path: Path) -> None:
    place = folder(tmp_path, dtype=torch.bfloat16)
    base = load_base(place, "float32")
    adapter = trained(base, LoRA(rank=4))
    merge(place, adapter, tmp_path / "bf16")
    rounded = agreement(base, adapter, tmp_path / "bf16")
    assert 0 < rounded.kl < 0.01
    assert rounded.kl <= rounded.worst_kl
    assert rounded.top1 > 0.9
    assert rounded.tokens == 128
    other = agreement(base, adapter, place, [[1, 2, 3, 4, 5]])
    assert other.kl > 10 * rounded.kl


def test_ia3_scales_weights_and_biases(tmp_path: Path) -> None:
    base = load_base(folder(tmp_path, "qwen2"), "float32")
    adapter = trained(base, methods.parse({"kind": "ia3"}), 0.3)
    merge(base, adapter, tmp_path / "out")
    got, wanted = hf_logits(tmp_path / "out"), ours(base, adapter)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
    assert not torch.equal(
        tensors(tmp_path / "out")["model.layers.0.self_attn.k_proj.bias"],
        tensors(tmp_path / "base")["model.layers.0.self_attn.k_proj.bias"],
    )


def test_biases_need_a_place(tmp_path: Path) -> None:
    spec = methods.parse({"kind": "bitfit", "targets": ["q_proj"]})
    with_bias = load_base(folder(tmp_path / "a", "qwen2"), "float32")
    adapter = trained(with_bias, spec)
    merge(with_bias, adapter, tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.bias"
    moved = tensors(tmp_path / "out")[name] - tensors(tmp_path / "a" / "base")[name]
    torch.testing.assert_close(
        moved, adapter.part("model.layers.0.self_attn.q_proj").tensors["bias"], rtol=0, atol=1e-6
    )
    without = load_base(folder(tmp_path / "b", "llama"), "float32")
    with pytest.raises(TargetError, match="has none there"):
        merge(without, trained(without, spec), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding_and_an_honest_account_of_it(tmp_path: Path, dtype: torch.dtype) -> None:
    place = folder(tmp_path, dtype=dtype)
    adapter = trained(load_base(place, "float32"), LoRA(rank=4), 0.003)
    report = merge(place, adapter, tmp_path / "out")
    before, after = tensors(place), tensors(tmp_path / "out")
    lost = total = 0.0
    for row in report.tensors:
        target = row.tensor.removesuffix(".weight")
        part = adapter.part(target)
        delta = adapter.scale(target) * part.tensors["B"].double() @ part.tensors["A"].double()
        error = float((after[row.tensor].double() - before[row.tensor].double() - delta).norm())
        assert row.lost == pytest.approx(error / float(delta.norm()), rel=1e-3)
        assert row.relative == pytest.approx(float(delta.norm() / before[row.tensor].double().norm()), rel=1e-4)
        lost, total = lost + error**2, total + float(delta.norm()) ** 2
        # one rounding of the exact sum, up to fp32's own last digit at a tie
        wrong = after[row.tensor] != (before[row.tensor].double() + delta).to(dtype)
        assert float(wrong.double().mean()) < 1e-3
    assert report.lost == pytest.approx(math.sqrt(lost / total), rel=1e-3)
    if dtype == torch.bfloat16:
        assert "rounding lost more than 5%" in report.warnings()[0]


def test_stochastic_rounding_keeps_a_small_update_on_average(tmp_path: Path) -> None:
    place = folder(tmp_path, dtype=torch.bfloat16)
    adapter = trained(load_base(place, "float32"), LoRA(rank=4), 0.0003)
    kept = {}
    for name, seed in (("nearest", None), ("random", 3), ("again", 3), ("other", 4)):
        merge(place, adapter, tmp_path / name, stochastic=seed)
        moved = tensors(tmp_path / name)
        before = tensors(place)
        inner = norm = 0.0
        for target in adapter.targets:
            delta = adapter.delta(target).double()
            inner += float(((moved[f"{target}.weight"].double() - before[f"{target}.weight"].double()) * delta).sum())
            norm += float(delta.square().sum())
        kept[name] = inner / norm
    assert kept["random"] == pytest.approx(1, abs=0.15)
    assert abs(kept["nearest"] - 1) > abs(kept["random"] - 1) or kept["nearest"] < 0.9
    assert kept["random"] == kept["again"] != kept["other"]


def test_the_files_stay_as_they_were(tmp_path: Path) -> None:
    place = checkpoint("llama", tmp_path / "base", shard_size="60KB")
    (place / "tokenizer.json").write_text("{}")
    (place / "notes.md").write_text("mine")
    (place / "pytorch_model.bin").write_bytes(b"a pickle")
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    adapter = trained(load_base(place, "float32"), LoRA(rank=2, targets=("q_proj",)))
    merge(place, adapter, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == set(before) - {"pytorch_model.bin"} | {"veneer_merge.json", "README.md"}
    assert len([n for n in names if n.startswith("model-")]) > 2
    assert (
        json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        == json.loads(before["model.safetensors.index.json"])["weight_map"]
    )
    old, new = tensors(place), tensors(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"{t}.weight" for t in adapter.targets}


def test_two_threads_write_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path, dtype=torch.bfloat16, shard_size="60KB")
    adapter = trained(load_base(place, "float32"), LoRA(rank=2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = merge(place, adapter, tmp_path / "one", unmergeable=True, stochastic=3)
        torch.set_num_threads(2)
        together = merge(place, adapter, tmp_path / "two", unmergeable=True, stochastic=3)
        assert torch.get_num_threads() == 2
        one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
        assert {**one, "README.md": b""} == {**two, "README.md": b""}
        assert replace(alone, out=place) == replace(together, out=place)
        assert unmerge(tmp_path / "two", tmp_path / "back").is_dir()
        monkeypatch.setattr(exact, "digest", _fail)
        with pytest.raises(ResourceError, match="the disk is gone"):
            merge(place, adapter, tmp_path / "three", unmergeable=True)
        assert torch.get_num_threads() == 2
        assert {p.name for p in tmp_path.iterdir()} == {"base", "one", "two", "back"}
    finally:
        torch.set_num_threads(threads)


def _fail(tensor: Tensor) -> str:
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("kind", "dtype", "cycles"),
    [
        ("lora", torch.bfloat16, 100),
        ("lora", torch.float32, 3),
        ("dora", torch.bfloat16, 3),
        ("dora", torch.float32, 3),
    ],
)
def test_unmerging_is_bitwise_through_many_cycles(
    tmp_path: Path, kind: str, dtype: torch.dtype, cycles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # what reaches the disk when is not in question here
    place = folder(tmp_path, dtype=dtype)
    (place / "README.md").write_text("the base's own card")
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    adapter = trained(load_base(place, "float32"), methods.parse({"kind": kind, "rank": 4}), 0.02)
    at = place
    for cycle in range(cycles):
        report = merge(at, adapter, tmp_path / f"merged{cycle}", unmergeable=True)
        at = unmerge(tmp_path / f"merged{cycle}", tmp_path / f"back{cycle}")
        assert {file.name: file.read_bytes() for file in at.iterdir()} == before
    if kind == "lora" and dtype == torch.bfloat16:
        assert report.unmerge is not None and report.unmerge < 2


def test_a_chain_of_merges_comes_back_link_by_link(tmp_path: Path) -> None:
    """A base that was merged itself has a card, a note and a way back of its own: the next merge leaves them be."""
    place = folder(tmp_path)
    (place / "README.base.md").write_text("a file of the base's own")
    (place / "README.md").write_text("the base's own card")
    links = [place]
    for seed in (1, 2, 3):
        adapter = trained(load_base(links[-1], "float32"), LoRA(rank=2), 0.02 * seed)
        merge(links[-1], adapter, tmp_path / f"merged{seed}", unmergeable=True)
        links.append(tmp_path / f"merged{seed}")
    at = links.pop()
    while links:
        before = {file.name: file.read_bytes() for file in links.pop().iterdir()}
        at = unmerge(at, tmp_path / f"back{len(links)}")
        assert {file.name: file.read_bytes() for file in at.iterdir()} == before


def test_a_config_may_say_that_nothing_is_quantised(tmp_path: Path) -> None:
    place = folder(tmp_path)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    merge(place, trained(load_base(place, "float32"), LoRA(rank=2)), tmp_path / "out")


def test_a_base_of_the_catalogue_comes_back_as_its_checkpoint(tmp_path: Path) -> None:
    """A base without a folder of its own (a .gguf file, a catalogue name) is unmerged to the checkpoint it is written as."""
    loaded = load_base(folder(tmp_path), "bfloat16")
    base = Base("somewhere", loaded.decoder, loaded.identity, loaded._samples, loaded.hf_config)
    adapter = trained(base, LoRA(rank=2), 0.05)
    report = merge(base, adapter, tmp_path / "merged", unmergeable=True)
    assert report.unmerge is not None
    write_checkpoint(base, tmp_path / "plain")
    back = unmerge(tmp_path / "merged", tmp_path / "back")
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "plain").iterdir()}
    assert {file.name: file.read_bytes() for file in back.iterdir()} == wanted


@pytest.mark.parametrize("ratio", [0.0005, 0.05, 0.25])
def test_the_correction_takes_less_than_a_bit_per_weight(ratio: float) -> None:
    from veneer.merge.exact import Recorder
    from veneer.merge.rounding import LowRankRows, merged

    g = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(512, 512, generator=g)).bfloat16()
    left, right = torch.randn(512, 16, generator=g), torch.randn(16, 512, generator=g)
    left *= ratio * 0.02 / 4
    recorder = Recorder()
    recorder.add("w", weight, merged(weight, LowRankRows(left, right)).value, (left, right))
    assert recorder.bits_per_weight < 1


def test_unmerging_refuses_what_it_cannot_prove(tmp_path: Path) -> None:
    place = folder(tmp_path)
    adapter = trained(load_base(place, "float32"), LoRA(rank=2))
    merge(place, adapter, tmp_path / "plain")
    with pytest.raises(NotFound, match="no record"):
        unmerge(tmp_path / "plain", tmp_path / "back")
    merge(place, adapter, tmp_path / "kept", unmergeable=True)
    with pytest.raises(Conflict):
        unmerge(tmp_path / "kept", tmp_path / "plain")
    found = load_file(tmp_path / "kept" / "model.safetensors")
    found["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(found, tmp_path / "kept" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="up_proj"):
        unmerge(tmp_path / "kept", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_tied_head_is_never_changed_by_accident(tmp_path: Path) -> None:
    place = folder(tmp_path, "llama-tied-mha")
    base = load_base(place, "float32")
    for target in ("model.embed_tokens", "lm_head"):
        adapter = trained(base, LoRA(rank=2, targets=(target,)), 0.1)
        with pytest.raises(TargetError, match="tied") as refusal:
            merge(place, adapter, tmp_path / "out")
        assert "--untie" in (refusal.value.help or "")
        assert not (tmp_path / "out").exists()
        done = tmp_path / target
        assert merge(place, adapter, done, untie=True).untied
        assert json.loads((done / "config.json").read_text())["tie_word_embeddings"] is False
        got, wanted = hf_logits(done), ours(base, adapter)
        assert float((got - wanted).norm() / wanted.norm()) < 1e-4
    with pytest.raises(Unsupported, match="of its own"):
        merge(place, adapter, tmp_path / "no", untie=True, unmergeable=True)


@pytest.mark.parametrize("both", [False, True])
def test_a_replaced_head_is_not_the_embedding_it_is_tied_to(both: bool, tmp_path: Path) -> None:
    place = folder(tmp_path, "llama-tied-mha")
    base = load_base(place, "float32")
    table = tensors(place)["model.embed_tokens.weight"].float()
    generator = torch.Generator().manual_seed(0)
    parts = [
        Part("full", "override", "lm_head", {"weight": table + 0.1 * torch.randn(table.shape, generator=generator)})
    ]
    if both:
        other = table + 0.1 * torch.randn(table.shape, generator=generator)
        parts.append(Part("full", "override", "model.embed_tokens", {"weight": other}, "embedding"))
    plain = trained(base, LoRA(rank=2, targets=("q_proj",)))
    adapter = replace(plain, parts=(*plain.parts, *parts))
    with pytest.raises(TargetError, match="tied"):
        merge(place, adapter, tmp_path / "out")
    assert merge(place, adapter, tmp_path / "out", untie=True).untied
    got, wanted = hf_logits(tmp_path / "out"), ours(base, adapter)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
    export_model(Merged(place, adapter, untie=True), tmp_path / "m.gguf", tokenizer_fields(None, 0), filetype="f32")
    got = ours(load_base(tmp_path / "m.gguf", "float32"), replace(adapter, parts=()))
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
    merge_four_bit(place, adapter, tmp_path / "four", untie=True)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(tensors(tmp_path / "four")[name], tensors(tmp_path / "out")[name])


def test_a_head_saved_beside_the_embedding_it_is_tied_to_stays_tied(tmp_path: Path) -> None:
    place = folder(tmp_path, "llama-tied-mha")
    base = load_base(place, "float32")
    table = tensors(place)["model.embed_tokens.weight"].float() * 1.1
    parts = (
        Part("full", "override", "lm_head", {"weight": table}),
        Part("full", "override", "model.embed_tokens", {"weight": table.clone()}, "embedding"),
    )
    plain = trained(base, LoRA(rank=2, targets=("q_proj",)))
    adapter = replace(plain, parts=(*plain.parts, *parts))
    assert not merge(place, adapter, tmp_path / "out").untied
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    got, wanted = hf_logits(tmp_path / "out"), ours(base, adapter)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4


def test_untying_is_written_down_where_the_head_is_stored_already(tmp_path: Path) -> None:
    place = folder(tmp_path, "llama-tied-mha")
    found = tensors(place)
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    save_file(found, place / "model.safetensors", metadata={"format": "pt"})
    adapter = trained(load_base(place, "float32"), LoRA(rank=2, targets=("lm_head",)), 0.1)
    assert merge(place, adapter, tmp_path / "out", untie=True).untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    place = folder(tmp_path, "llama-tied-mha")
    half = {name: tensor.half() for name, tensor in tensors(place).items()}
    save_file(half, place / "model.safetensors", metadata={"format": "pt"})
    adapter = trained(load_base(place, "float32"), LoRA(rank=2, targets=("q_proj",)))
    huge = adapter.map_tensors(lambda t: t * 1e4)
    for seed in (None, 0):
        with pytest.raises(Unsupported, match=r"q_proj.*float16"):
            merge(place, huge, tmp_path / "out", stochastic=seed)
    table = torch.full(half["model.embed_tokens.weight"].shape, 1e6)
    rows = Part("full", "override", "model.embed_tokens", {"weight": table}, "embedding")
    with pytest.raises(Unsupported, match=r"q_proj.*float16"):
        merge_four_bit(place, huge, tmp_path / "out", double=False)
    with pytest.raises(Unsupported, match=r"embed_tokens.*float16"):
        merge_four_bit(place, replace(adapter, parts=(*adapter.parts, rows)), tmp_path / "out", double=False)
    assert not (tmp_path / "out").exists()
    merge(place, adapter, tmp_path / "out")


def test_trained_token_rows_serve_both_ends_of_a_tied_table(tmp_path: Path) -> None:
    place = folder(tmp_path, "llama-tied-mha")
    base = load_base(place, "float32")
    adapter = trained(base, methods.parse({"kind": "token_rows", "tokens": [5, 9]}), 0.5)
    merge(place, adapter, tmp_path / "out")
    before, after = tensors(place), tensors(tmp_path / "out")
    name = "model.embed_tokens.weight"
    changed = (before[name] != after[name]).any(1).nonzero().flatten().tolist()
    assert changed == [5, 9]
    got, wanted = hf_logits(tmp_path / "out"), ours(base, adapter)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4


def test_the_wrong_base_is_refused_unless_there_is_a_reason(tmp_path: Path) -> None:
    right = folder(tmp_path / "a", seed=0)
    wrong = folder(tmp_path / "b", seed=1)
    adapter = trained(load_base(right, "float32"), LoRA(rank=2))
    with pytest.raises(BaseMismatch, match="differ"):
        merge(wrong, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = merge(wrong, adapter, tmp_path / "out", allow_base_mismatch="a test")
    assert report.base_check.outcome == "allowed"
    note = json.loads((tmp_path / "out" / "veneer_merge.json").read_text())
    assert "a test" in note["base_check"]["detail"]
    assert merge(right, adapter, tmp_path / "good").base_check.outcome == "equal"
    bare = Adapter(adapter.spec, adapter.parts)
    assert merge(right, bare, tmp_path / "bare").base_check.outcome == "unverified"


def test_refusals_come_before_anything_is_written(tmp_path: Path) -> None:
    place = folder(tmp_path)
    base = load_base(place, "float32")
    lora = trained(base, LoRA(rank=2, targets=("q_proj",)))
    stray = Part("lora", "weight", "model.layers.0.self_attn.q_prj", lora.parts[0].tensors)
    wide = Part("lora", "weight", "model.layers.0.mlp.up_proj", lora.parts[0].tensors)
    with pytest.raises(TargetError) as refusal:
        merge(place, Adapter(lora.spec, (*lora.parts, stray, wide)), tmp_path / "out")
    assert "q_prj" in str(refusal.value)
    assert "did you mean 'model.layers.0.self_attn.q_proj'" in str(refusal.value)
    assert "up_proj" in str(refusal.value)
    prompt = trained(base, methods.parse({"kind": "bottleneck"}))
    with pytest.raises(TargetError, match="bottleneck"):
        merge(place, prompt, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(Conflict, match="already there"):
        merge(place, lora, tmp_path / "full")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(Unsupported, match="gptq"):
        merge(place, lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_a_base_without_a_folder_becomes_a_plain_checkpoint(tmp_path: Path, name: str) -> None:
    loaded = load_base(folder(tmp_path, name), "float32")
    base = Base("somewhere", loaded.decoder, loaded.identity, loaded._samples, loaded.hf_config)
    adapter = trained(loaded, LoRA(rank=2))
    report = merge(base, adapter, tmp_path / "out")
    assert report.base_check.outcome == "equal"
    got, wanted = hf_logits(tmp_path / "out"), by_definition(tmp_path / "base", adapter)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
    assert set(tensors(tmp_path / "out")) == set(tensors(tmp_path / "base"))
    with pytest.raises(NotFound, match=r"no config\.json"):
        merge(Base("bare", loaded.decoder), adapter, tmp_path / "no")


def test_a_base_is_merged_from_its_own_folder_and_not_from_its_twin(tmp_path: Path) -> None:
    """The cache of converted bases goes by content: what another folder with the same weights becomes is its own affair."""
    twin = folder(tmp_path / "twin", seed=77)
    mine = folder(tmp_path / "mine", seed=77)
    first, base = load_base(twin, "float32"), load_base(mine, "float32")
    assert first.folder == base.folder
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    (mine / "mine.txt").write_text("kept")
    merge(base, trained(base, LoRA(rank=2)), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
    (mine / "config.json").write_text((twin / "config.json").read_text())
    merge(base, trained(base, LoRA(rank=2)), tmp_path / "from memory")
    assert not (tmp_path / "from memory" / "mine.txt").exists()


def test_a_family_outside_the_table_merges_by_names_and_shapes(tmp_path: Path) -> None:
    place = tmp_path / "base"
    place.mkdir()
    g = torch.Generator().manual_seed(0)
    weight, extra = torch.randn(6, 4, generator=g), torch.randn(3, generator=g)
    save_file({"blocks.0.proj.weight": weight, "other": extra}, place / "model.safetensors")
    (place / "config.json").write_text('{"model_type": "not-a-known-one"}')
    a, b = torch.randn(2, 4, generator=g), torch.randn(6, 2, generator=g)
    adapter = Adapter(LoRA(rank=2, alpha=4), (Part("lora", "weight", "blocks.0.proj", {"A": a, "B": b}),))
    merge(place, adapter, tmp_path / "out")
    torch.testing.assert_close(tensors(tmp_path / "out")["blocks.0.proj.weight"], weight + 2 * b @ a)
    assert torch.equal(tensors(tmp_path / "out")["other"], extra)
