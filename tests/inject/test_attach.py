"""Adapters on modules outside the native table: identical at the start, trainable, detachable, mergeable, and saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, Part
from veneer.errors import Conflict, TargetError, Unsupported
from veneer.inject import ModuleSource, attach, create
from veneer.methods import merged, parse
from veneer.methods.lora import LoRA


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


def opt() -> nn.Module:
    """A decoder that the native table does not list."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=53,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
        dropout=0.0,
    )
    return OPTForCausalLM(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return ViTForImageClassification(config)


def run(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, nn.Sequential):
        output: Tensor = model(torch.randn(5, 6, generator=generator))
        return output
    inputs: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if type(model).__name__ == "OPTForCausalLM":
        inputs = {"input_ids": torch.randint(0, 53, (2, 7), generator=generator)}
    logits: Tensor = model(**inputs).logits
    return logits


MODELS = {"mlp": mlp, "opt": opt, "vit": vit}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    built: nn.Module = MODELS[request.param]().eval()
    return built


def fresh(model: nn.Module, **fields: Any) -> Adapter:
    return create(ModuleSource(model), LoRA(rank=2, alpha=4, **fields), torch.Generator().manual_seed(3))


def test_a_fresh_adapter_changes_no_bit(model: nn.Module) -> None:
    before = run(model)
    handle = attach(model, fresh(model))
    assert torch.equal(run(model), before)
    handle.detach()
    assert torch.equal(run(model), before)


def test_twenty_steps_save_reload_merge(model: nn.Module, tmp_path: Path) -> None:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = run(model)
    handle = attach(model, fresh(model))
    target = before.detach().roll(1, dims=-1)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=5e-2)
    losses = []
    for _ in range(20):
        loss = (run(model) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    trained = run(model).detach()
    with handle.disabled():
        assert torch.equal(run(model), before)
    adapter = handle.adapter()
    handle.detach()
    assert torch.equal(run(model), before)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]) and parameter.requires_grad

    adapter.save(tmp_path / "adapter")
    again = attach(model, Adapter.load(tmp_path / "adapter"))
    assert torch.equal(run(model), trained)
    again.detach()

    source = ModuleSource(model)
    with torch.no_grad():
        for path in adapter.targets:
            weight, _ = merged(adapter, path, source.host(path))
            model.get_submodule(path).weight.copy_(weight)
    assert torch.allclose(run(model), trained, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_adapter_only(model: nn.Module) -> None:
    handle = attach(model, fresh(model))
    run(model).square().sum().backward()
    own = {id(p) for p in handle.parameters()}
    for parameter in model.parameters():
        assert (parameter.grad is not None) <= (id(parameter) in own)
    assert any(p.grad is not None and bool(p.grad.any()) for p in handle.parameters())
    handle.detach()


def lora_on(model: nn.Module, *targets: str, **fields: Any) -> Adapter:
    made = create(
        ModuleSource(model), LoRA(rank=2, alpha=4, targets=targets, **fields), torch.Generator().manual_seed(3)
    )
    return made.map_tensors(lambda tensor: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7)))


def test_dropout_follows_the_layer_it_is_put_around() -> None:
    model = mlp().eval()
    handle = attach(model, lora_on(model, "0", dropout=0.5))
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.equal(run(model), run(model))
    handle.detach()


@pytest.mark.parametrize("first", [0, 1])
def test_two_adapters_on_one_module_come_and_go_in_any_order(first: int) -> None:
    model = mlp()
    model[0].bias.requires_grad_(False)
    flags, before = [p.requires_grad for p in model.parameters()], run(model)
    handles = [attach(model, lora_on(model, "0")), attach(model, lora_on(model, "2"))]
    run(model).sum().backward()
    assert all(len(h.parameters()) == 2 and all(p.grad is not None for p in h.parameters()) for h in handles)
    handles[first].detach()
    left = {id(p) for p in handles[1 - first].parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == left
    handles[1 - first].detach()
    handles[first].detach()  # once more does nothing
    assert [p.requires_grad for p in model.parameters()] == flags and torch.equal(run(model), before)


def test_the_bare_base_stays_bare_within_nested_blocks() -> None:
    model = mlp()
    before = run(model)
    handle = attach(model, lora_on(model, "0"))
    with handle.disabled():
        with handle.disabled():
            assert torch.equal(run(model), before)
        assert torch.equal(run(model), before)
    assert not torch.equal(run(model), before)


def test_a_shared_layer_is_adapted_under_all_its_names() -> None:
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"encoder": nn.Sequential(shared), "decoder": nn.Sequential(shared, shared)})
    x = torch.ones(1, 6)
    before = model["decoder"](x)
    adapter = lora_on(model, "encoder.0")
    handle = attach(model, adapter)
    part = adapter.part("encoder.0")
    weight = shared.weight + adapter.scale("encoder.0") * part.tensors["B"] @ part.tensors["A"]
    once = nn.functional.linear(x, weight, shared.bias)
    assert torch.allclose(model["encoder"](x), once, atol=1e-5)
    assert torch.allclose(model["decoder"](x), nn.functional.linear(once, weight, shared.bias), rtol=1e-4)
    handle.detach()
    assert torch.equal(model["decoder"](x), before)


@pytest.mark.parametrize(
    ("tokens", "rows", "word"),
    [
        ([3, 53], (2, 16), "has 53 rows, the adapter replaces 3 to 53"),
        ([-1], (1, 16), "-1 to -1"),
        ([3], (2, 16), "rows is"),
    ],
)
def test_token_rows_that_an_embedding_does_not_have(tokens: list[int], rows: tuple[int, int], word: str) -> None:
    model, target = opt(), "model.decoder.embed_tokens"
    tensors = {"tokens": torch.tensor(tokens), "rows": torch.zeros(rows)}
    adapter = fresh(model)
    part = Part("token_rows", "override", target, tensors, "embedding")
    with pytest.raises(TargetError, match=word):
        attach(model, replace(adapter, parts=(*adapter.parts, part)))


def test_all_linear_leaves_out_the_head_of_a_transformers_model() -> None:
    model = opt()
    assert not any("lm_head" in target for target in fresh(model).targets)


def test_conv1d_and_embeddings_are_hosts_too() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=53, bos_token_id=0, eos_token_id=0))
    adapter = fresh(model, targets=("c_attn", "wte"))
    assert {p.tensors["A"].shape for p in adapter.parts} == {torch.Size([2, 16]), torch.Size([2, 53])}
    ids = torch.arange(6)[None]
    before = model.eval()(ids).logits
    handle = attach(model, adapter)
    assert torch.equal(model(ids).logits, before)
    handle.detach()


def test_a_layer_that_is_not_there_is_named() -> None:
    adapter = fresh(mlp())
    with pytest.raises(TargetError, match="'0' is not a layer"):
        attach(nn.Sequential(nn.ReLU(), nn.Linear(16, 4), nn.Linear(16, 4)), adapter)


def test_a_wrong_shape_is_named_and_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    with pytest.raises(TargetError, match=r"A is \[2, 6\].*takes 5"):
        attach(model, fresh(mlp()))
    assert type(model[0]) is nn.Linear


def test_two_adapters_on_one_layer_are_refused() -> None:
    model = mlp()
    handle = attach(model, fresh(model))
    with pytest.raises((Conflict, TargetError)):
        attach(model, handle.adapter())
    handle.detach()


def test_sites_that_a_plain_module_lacks_are_refused_with_the_way_out() -> None:
    from veneer.adapter import Part

    adapter = Adapter(LoRA(), (Part("prompt", "tokens", None, {"rows": torch.zeros(2, 4)}),))
    with pytest.raises((Unsupported, TargetError)):
        attach(mlp(), adapter)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "vera", "shira", "bitfit", "lora_xs", "full"])
def test_a_model_may_be_cast_and_loaded_after_it_was_adapted(kind: str) -> None:
    """As `.to(device)` does: the layers' tensors are others then."""
    model = mlp()
    spec = parse({"kind": kind, "targets": ["0"], **({} if kind in ("ia3", "bitfit", "full") else {"rank": 2})})
    made = create(ModuleSource(model), spec, torch.Generator().manual_seed(3))
    noise = torch.Generator().manual_seed(4)
    adapter = made.map_tensors(
        lambda t: t + 0.1 * torch.randn(t.shape, generator=noise) if t.is_floating_point() else t
    )
    attach(model, adapter)
    before = run(model)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double()
    assert torch.allclose(model.to(torch.float64)(x), before.double(), atol=1e-5)
    model.to(torch.float32)
    other = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(model[0].layer, name).copy_(getattr(other[0], name))
            getattr(model[2], name).copy_(getattr(other[2], name))
    attach(other, adapter)
    assert torch.allclose(run(model), run(other), atol=1e-6)
