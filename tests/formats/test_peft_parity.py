"""PEFT as the judge: files it writes load here, files written here load there, and both are the same function.

The function is PEFT's own forward. Ours is checked against it by merging into a copy of the base, gradients through `attach`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.tiny import gpt2, llama, stir
from tests.laws.world import fresh, method, world
from veneer.adapter import Adapter
from veneer.errors import FormatError, TargetError
from veneer.inject.attach import ModuleSource, attach
from veneer.inject.create import create
from veneer.methods import complete, completed, folded, method_of, parse

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(4))

LORA: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"], "rank_pattern": {"layers.1.*q_proj": 2, "up_proj": 6},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3.5},
    },
    "regex": {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "all-linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 11]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "lora_alpha": 3},
    "pissa kept apart": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS).logits
    return result


def wrapped(model: Any, config: Any) -> Any:
    made = peft.get_peft_model(model, config)
    stir(made)
    return made


def lora_config(fields: dict[str, Any]) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **fields})


def reloaded(base: Any, folder: Path) -> Any:
    """PEFT's reading of a folder; missing or unexpected keys are an error, not a warning."""
    model = peft.PeftModel.from_pretrained(base, folder)
    written = load_file(folder / "adapter_model.safetensors")
    understood = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    kept = {key for key in written if not key.endswith("embed_tokens.base_layer.weight")}
    assert kept == set(understood)
    return model


def put_into(base: Any, adapter: Adapter) -> Any:
    """A copy of a transformers model with the adapter merged into its weights."""
    model = copy.deepcopy(base)
    source = ModuleSource(model)
    adapter = completed(adapter, source)
    for target in adapter.targets:
        module = model.get_submodule(target)
        replaced = [p for p in adapter.parts if p.target == target and p.site == "override" and p.kind == "full"]
        for part in replaced:
            for name, value in part.tensors.items():
                getattr(module, name).data.copy_(value)
        host = source.host(target) if target in source.shape.hosts else None
        for part in adapter.parts:
            if part.target != target or part.kind == "full" or host is None:
                continue
            weight, bias = method_of(adapter, part).merged(complete(adapter, part), host)
            stored = weight.t() if host.shape.kind in ("conv1d", "embedding") else weight
            module.weight.data.copy_(stored)
            if bias is not None:
                module.bias = torch.nn.Parameter(bias.clone())
    return model


def both_ways(base: Any, model: Any, folder: Path) -> Adapter:
    """peft -> veneer -> peft, the same function at every stop."""
    expected = logits(model)
    assert not torch.allclose(expected, logits(copy.deepcopy(base)), atol=1e-3), "the adapter must do something"
    model.save_pretrained(folder / "theirs")
    adapter = Adapter.load(folder / "theirs")
    torch.testing.assert_close(logits(put_into(base, adapter)), expected, rtol=1e-4, atol=1e-4)
    adapter.save(folder / "ours")
    assert Adapter.load(folder / "ours").digest == adapter.digest
    torch.testing.assert_close(logits(reloaded(copy.deepcopy(base), folder / "ours")), expected, rtol=1e-5, atol=1e-5)
    return adapter


@pytest.mark.parametrize("name", list(LORA))
def test_lora_on_a_llama(name: str, tmp_path: Path) -> None:
    base = llama()
    both_ways(base, wrapped(copy.deepcopy(base), lora_config(LORA[name])), tmp_path)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica", False])
def test_starts_that_leave_the_base_alone(start: str | bool, tmp_path: Path) -> None:
    base = llama()
    fields = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": start}
    both_ways(base, wrapped(copy.deepcopy(base), lora_config(fields)), tmp_path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_factors_for_a_changed_base_are_refused_and_their_conversion_is_read(start: str, tmp_path: Path) -> None:
    """PEFT took B A out of the base at the start, so the trained factors alone are another function of the plain base."""
    base = llama()
    config = lora_config({"target_modules": ["q_proj", "down_proj"], "init_lora_weights": start})
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    stir(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "unconverted")
    with pytest.raises(FormatError, match=f"init_lora_weights '{start}'") as refused:
        Adapter.load(tmp_path / "unconverted")
    assert "path_initial_model_for_weight_conversion" in str(refused.value.help)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    found = logits(put_into(base, Adapter.load(tmp_path / "converted")))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq"])
def test_starts_that_peft_prepares_apart_are_refused_too(start: str, tmp_path: Path) -> None:
    base = llama()
    wrapped(copy.deepcopy(base), lora_config({"target_modules": ["q_proj"]})).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, "init_lora_weights": start}))
    with pytest.raises(FormatError, match=f"init_lora_weights '{start}'"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize(
    "fields", [{"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_fc"], "use_dora": True}]
)
def test_lora_on_conv1d(fields: dict[str, Any], tmp_path: Path) -> None:
    base = gpt2()
    adapter = both_ways(base, wrapped(copy.deepcopy(base), lora_config({"fan_in_fan_out": True, **fields})), tmp_path)
    assert {part.host for part in adapter.parts} == {"conv1d"}


def test_biases_trained_beside_lora(tmp_path: Path) -> None:
    base = gpt2()
    fields = {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}
    adapter = both_ways(base, wrapped(copy.deepcopy(base), lora_config(fields)), tmp_path)
    assert sorted(part.kind for part in adapter.parts) == ["full", "full", "lora", "lora"]


def saved_embeddings(folder: Path, base: Any, target: str, grown: int = 0) -> Any:
    """PEFT's model over a copy of `base` with other embeddings, `grown` rows longer; folder holds its adapter and them."""
    model = copy.deepcopy(base)
    if grown:
        model.resize_token_embeddings(64 + grown, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.05)
    made = wrapped(model, lora_config({"target_modules": [target]}))
    made.save_pretrained(folder, save_embedding_layers=True)
    return made


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_peft_saves_beside_the_adapter(
    tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They take the place of the base's own, a tied head's too, so there is nothing to warn of."""
    base = llama(tie_word_embeddings=tied)
    for target in ("q_proj", "embed_tokens"):
        model = saved_embeddings(tmp_path / target, base, target)
        adapter = Adapter.load(tmp_path / target)
        assert "PEFT leaves the head alone" not in caplog.text
        if target == "q_proj" or not tied:  # an update of a tied embedding can't be merged for one side
            torch.testing.assert_close(logits(put_into(base, adapter)), logits(model), rtol=1e-4, atol=1e-4)


def test_modules_that_peft_saves_whole_and_once_more_as_embeddings(tmp_path: Path) -> None:
    """With grown embeddings in modules_to_save its file has each table three times: trained, trained, and as it was."""
    base = llama(tie_word_embeddings=False)
    model = copy.deepcopy(base)
    model.resize_token_embeddings(66, mean_resizing=False)
    made = wrapped(model, lora_config({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}))
    made.save_pretrained(tmp_path, save_embedding_layers=True)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("original_module" in key for key in stored) == 2
    wide = copy.deepcopy(base)
    wide.resize_token_embeddings(66, mean_resizing=False)
    torch.testing.assert_close(logits(put_into(wide, Adapter.load(tmp_path))), logits(made), rtol=1e-4, atol=1e-4)
    torn = {key: t + 1 if key == "base_model.model.lm_head.weight" else t for key, t in stored.items()}
    save_file(torn, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="lm_head"):
        Adapter.load(tmp_path)


def test_grown_embeddings_come_back_and_fit_no_smaller_base(tmp_path: Path) -> None:
    base = llama()
    model = saved_embeddings(tmp_path / "theirs", base, "q_proj", grown=2)
    adapter = Adapter.load(tmp_path / "theirs")
    adapter.save(tmp_path / "ours")
    wide = copy.deepcopy(base)
    wide.resize_token_embeddings(66, mean_resizing=False)
    again = peft.PeftModel.from_pretrained(wide, tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(TargetError, match=r"lm_head: weight is \[66, 32\], the layer has \[64, 32\]"):
        attach(base, adapter)


def test_ia3_both_sides(tmp_path: Path) -> None:
    base = llama()
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    adapter = both_ways(base, wrapped(copy.deepcopy(base), config), tmp_path)
    assert adapter.spec.kind == "ia3"


def test_ia3_on_conv1d_scales_the_bias(tmp_path: Path) -> None:
    base = gpt2()
    config = peft.IA3Config(
        target_modules=["c_attn", "mlp.c_proj"],
        feedforward_modules=["mlp.c_proj"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    both_ways(base, wrapped(copy.deepcopy(base), config), tmp_path)


def test_vera(tmp_path: Path) -> None:
    base = llama()
    config = peft.VeraConfig(r=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    both_ways(base, wrapped(copy.deepcopy(base), config), tmp_path)


SECOND: dict[str, Any] = {
    "lora_bias": lambda: lora_config({"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "vera without its projections": lambda: peft.VeraConfig(
        r=8, target_modules=["q_proj", "up_proj"], save_projection=False, projection_prng_key=11, task_type="CAUSAL_LM"
    ),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "shira": lambda: peft.ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "oft": lambda: peft.OFTConfig(
        oft_block_size=8, target_modules=["q_proj", "down_proj"], use_cayley_neumann=False, task_type="CAUSAL_LM"
    ),
    "oft, the series": lambda: peft.OFTConfig(
        r=4, oft_block_size=0, target_modules=["q_proj", "down_proj"], block_share=True, task_type="CAUSAL_LM"
    ),
    "oft, a block that PEFT changes": lambda: peft.OFTConfig(
        oft_block_size=7, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("name", list(SECOND))
@pytest.mark.filterwarnings("ignore:.*oft_block_size.*Adjusted:UserWarning")
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias:peft.utils.warning.PeftWarning")
def test_more_methods(name: str, tmp_path: Path) -> None:
    base = llama()
    both_ways(base, wrapped(copy.deepcopy(base), SECOND[name]()), tmp_path)


def test_trainable_tokens_alone(tmp_path: Path) -> None:
    base = llama()
    config = peft.TrainableTokensConfig(token_indices=[2, 5, 8], target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    model = wrapped(copy.deepcopy(base), config)
    ids = torch.tensor([[2, 5, 8, 1]])
    adapter = both_ways(base, model, tmp_path) if bool(torch.isin(IDS, ids).any()) else None
    assert adapter is not None and adapter.spec.kind == "token_rows"


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=12, task_type="CAUSAL_LM"
        ),
    ],
    ids=["prompt", "p-tuning", "prefix", "prefix with projection"],
)
def test_virtual_tokens(config: Any, tmp_path: Path) -> None:
    base = llama()
    model = wrapped(copy.deepcopy(base), config())
    expected = logits(model)
    model.save_pretrained(tmp_path / "theirs")
    adapter = Adapter.load(tmp_path / "theirs")
    adapter.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


def test_a_prefix_is_laid_out_as_the_cache_wants_it(tmp_path: Path) -> None:
    base = llama()
    model = wrapped(copy.deepcopy(base), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    tensors = Adapter.load(tmp_path).parts[0].tensors
    assert tensors["key"].shape == tensors["value"].shape == (2, 3, 2, 8)
    cache = model.get_prompt(batch_size=1)
    for layer in range(2):
        torch.testing.assert_close(cache.layers[layer].keys[0], tensors["key"][layer].transpose(0, 1))
        torch.testing.assert_close(cache.layers[layer].values[0], tensors["value"][layer].transpose(0, 1))


def test_an_invocation_survives(tmp_path: Path) -> None:
    config = lora_config({"target_modules": ["q_proj"], "alora_invocation_tokens": [7, 8]})
    wrapped(llama(), config).save_pretrained(tmp_path / "theirs")
    adapter = Adapter.load(tmp_path / "theirs")
    assert adapter.spec.model_dump()["invocation"] == (7, 8)
    adapter.save(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["alora_invocation_tokens"] == [7, 8]


GRADIENTS: dict[str, tuple[dict[str, Any], Any]] = {
    "lora": ({"rank": 4, "alpha": 6, "targets": ["q_proj", "down_proj"]}, lambda: lora_config(LORA["linear"])),
    "dora": ({"rank": 4, "alpha": 3, "targets": ["q_proj", "down_proj"]}, lambda: lora_config(LORA["dora"])),
    "ia3": (
        {"targets": ["k_proj", "v_proj", "down_proj"]},
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    ),
}


GRADIENTS |= {
    kind: ({}, SECOND[name])
    for kind, name in {"shira": "shira", "oft": "oft", "vera": "vera without its projections"}.items()
}
GRADIENTS["adalora"] = (
    {},
    lambda: peft.AdaLoraConfig(  # the penalty is the training loop's part, and has a test of its own
        init_r=4,
        target_r=2,
        total_step=10,
        target_modules=["q_proj", "down_proj"],
        orth_reg_weight=0.0,
        task_type="CAUSAL_LM",
    ),
)


@pytest.mark.parametrize("kind", list(GRADIENTS))
def test_gradients_are_the_same(kind: str, tmp_path: Path) -> None:
    """One backward pass through each: theirs, and ours on the same base through `attach`."""
    fields, config = GRADIENTS[kind]
    base = llama()
    theirs = wrapped(copy.deepcopy(base), config()).train()
    theirs(IDS, labels=IDS).loss.backward()
    theirs.save_pretrained(tmp_path / "weights")
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    expected = Adapter.load(tmp_path / "gradients")
    adapter = Adapter.load(tmp_path / "weights")
    handle = attach(base, adapter)
    base(IDS, labels=IDS).loss.backward()
    count = 0
    for part in expected.parts:
        if part.target is None:
            continue
        layer = handle.layers[part.target]
        [live] = layer.parts()
        for name, gradient in part.tensors.items():
            if name not in method_of(adapter, part).frozen():
                torch.testing.assert_close(live.tensors[name].grad, gradient, rtol=1e-4, atol=1e-6)
            count += 1
    assert count == sum(len(part.tensors) for part in adapter.parts if part.target is not None) > 0
    assert parse({"kind": kind, **fields}).kind == adapter.spec.kind


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "lora", "rank": 3, "alpha": 0.1, "targets": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"kind": "lora", "rank": 4, "targets": ["embed_tokens", "down_proj"], "scaling": "alpha/sqrt(r)"},
        {"kind": "lora", "rank": 2, "targets": ["re:.*1\\.mlp\\..*"], "trainable_tokens": [1, 2], "init": "pissa"},
        {"kind": "lora", "rank": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1.7}, "init": "olora"},
        {"kind": "dora", "rank": 4, "targets": ["all-linear"]},
        {"kind": "ia3"},
        {"kind": "vera", "rank": 8, "targets": ["q_proj", "up_proj"]},
        {"kind": "vera", "rank": 8, "targets": ["q_proj", "up_proj"], "projection_key": 5},
        {"kind": "lora", "rank": 2, "targets": ["q_proj"], "lora_bias": True, "init": "pissa"},
        {"kind": "adalora", "rank": 4, "target_rank": 2},
        {"kind": "shira", "rank": 2, "mask": "magnitude"},
        {"kind": "oft", "block": 16, "cayley": "neumann"},
        {"kind": "oft", "block": 0, "blocks": 4},
    ],
    ids=lambda f: f"{f['kind']} {f.get('init', '')}",
)
def test_made_here_read_there(fields: dict[str, Any], tmp_path: Path) -> None:
    base = llama()
    adapter = create(ModuleSource(base), parse(fields), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    adapter = adapter.map_tensors(
        lambda t: t + 0.1 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
    )
    expected = logits(put_into(base, folded(adapter)))
    adapter.save(tmp_path / "ours")
    model = reloaded(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    theirs = {
        name: module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and adapter.spec.kind in ("lora", "dora")
    }
    for name, scale in theirs.items():
        target = name.removeprefix("base_model.model.")
        assert scale == pytest.approx(folded(adapter).scale(target), rel=1e-14)


def test_a_method_without_a_peft_name_is_refused_there(tmp_path: Path) -> None:
    fresh(method("bottleneck"), world()).save(tmp_path)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)
