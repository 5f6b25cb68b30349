"""LoRA and its kin on convolutions of 1 to 3 dimensions: the definition is a convolution with the merged kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.formats.tiny import stir
from tests.laws.world import stirred
from veneer.adapter import Adapter
from veneer.errors import TargetError
from veneer.inject import ModuleSource, attach, create
from veneer.methods import METHODS, delta, load_all, merged, parse

load_all()
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), bias=False), (2, 4, 7, 8)),
    "2d, dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (2, 4, 7, 8)),
    "2d, reflecting": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 8)),
    "2d, one cell": (lambda: nn.Conv2d(4, 6, 1), (4, 5, 5)),
    "3d": (lambda: nn.Conv3d(4, 6, (2, 3, 1), padding=(0, 1, 0)), (2, 4, 5, 6, 3)),
}
KINDS = ("lora", "dora", "bitfit", "full")


class Small(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = layer
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        result: Tensor = self.head(y.flatten(-y.dim() + 2 if y.dim() > 3 or x.dim() == 3 else 1).mean(-1))
        return result


def module(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, size = LAYERS[name]
    return make(), torch.randn(size)


def adapter_on(layer: nn.Module, kind: str, **fields: Any) -> Adapter:
    """A stirred adapter on a model whose only layer is called `conv`."""
    given = {"rank": 3} if "rank" in METHODS[kind].model_fields else {}
    spec = parse({"kind": kind, "targets": ["conv"], **given, **fields})
    return create(ModuleSource(nn.ModuleDict({"conv": layer})), spec, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("kind", KINDS)
def test_attached_is_the_merged_kernel_and_starts_as_the_base(kind: str, name: str, tmp_path: Path) -> None:
    layer, x = module(name)
    model = nn.ModuleDict({"conv": layer})
    before = layer(x)
    fresh = adapter_on(layer, kind)
    handle = attach(model, fresh)
    assert torch.allclose(model["conv"](x), before, atol=1e-6)
    handle.detach()
    assert model["conv"] is layer and torch.equal(layer(x), before)
    adapter = stirred(fresh)
    adapter.save(tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    weight, bias = merged(adapter, "conv", ModuleSource(model).host("conv"))
    tensors = {"weight": weight.view_as(layer.weight), "bias": torch.zeros(6) if bias is None else bias}
    dense = torch.func.functional_call(_with_bias(layer), tensors, (x,))
    attach(model, adapter)
    found = model["conv"](x)
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)


def _with_bias(layer: Any) -> Any:
    """A copy that takes a bias, whatever the layer has."""
    twin = type(layer)(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        padding_mode=layer.padding_mode,
    )  # fmt: skip
    return twin


@pytest.mark.parametrize("name", list(LAYERS))
def test_the_update_is_the_published_sum_over_ranks(name: str) -> None:
    """dW[o, i, cell] = s sum_p B[o, p] A[p, i, cell], and of rank r as a matrix."""
    layer, _ = module(name)
    adapter = stirred(adapter_on(layer, "lora"))
    a, b = (adapter.part("conv").tensors[n].double() for n in "AB")
    assert a.shape[1:] == layer.weight.shape[1:]
    expected = 32 / 3 * torch.einsum("op,pi...->oi...", b, a)
    found = delta(adapter, "conv", None)
    torch.testing.assert_close(found.double(), expected.flatten(1), rtol=1e-5, atol=1e-6)
    assert int(torch.linalg.matrix_rank(found)) == 3


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora"])
def test_every_start_from_the_weight_leaves_a_convolution_as_it_is(init: str) -> None:
    layer, x = module("2d, dilated")
    model = nn.ModuleDict({"conv": layer})
    attach(model, adapter_on(layer, "lora", init=init))
    torch.testing.assert_close(model["conv"](x), layer(x), rtol=1e-5, atol=1e-5)


def test_gradients_in_fp64_are_the_numerical_ones() -> None:
    layer, x = module("2d, reflecting")
    layer, x = layer.double(), x.double()[:1]
    host = ModuleSource(nn.ModuleDict({"conv": layer})).host("conv")
    adapter = stirred(adapter_on(layer, "lora", lora_bias=True)).map_tensors(lambda t: t.double())
    part = adapter.part("conv")
    names = list(part.tensors)

    def output(*values: Tensor) -> Tensor:
        tensors = dict(zip(names, values, strict=True))
        moved = type(part)(part.kind, part.site, part.target, tensors, part.host)
        return adapter.spec.forward(x, moved, host).sin().sum()

    assert torch.autograd.gradcheck(output, [part.tensors[n].clone().requires_grad_() for n in names])


def test_one_trains_beside_a_linear_layer() -> None:
    model = Small(nn.Conv2d(4, 6, 3))
    generator = torch.Generator().manual_seed(0)
    x, goal = torch.randn(8, 4, 6, 6, generator=generator), torch.randn(8, 3, generator=generator)
    spec = parse({"kind": "lora", "rank": 2, "targets": ["first", "head"]})
    handle = attach(model, create(ModuleSource(model), spec, generator))
    optimiser = torch.optim.Adam(handle.parameters(), lr=2e-2)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(model(x), goal)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert {p.host for p in handle.adapter().parts} == {"conv", "linear"}


def test_all_linear_leaves_convolutions_alone() -> None:
    model = Small(nn.Conv2d(4, 6, 3))
    adapter = create(ModuleSource(model), parse({"kind": "lora", "rank": 2}), torch.Generator())
    assert adapter.targets == ("head",)


@pytest.mark.parametrize(
    ("layer", "kind", "why"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), "lora", "a convolution in 2 groups"),
        (nn.Conv2d(4, 6, 3, groups=2), "dora", "a convolution in 2 groups"),
        (nn.Conv2d(4, 6, 3), "vera", "conv layers take no VeRA"),
        (nn.Conv2d(4, 6, 3), "ia3", "conv layers"),
        (nn.Conv2d(4, 6, 3), "oft", "conv layers take no OFT"),
        (nn.Conv2d(4, 6, 3), "shira", "conv layers take no SHiRA"),
        (nn.Conv2d(4, 6, 3), "adalora", "conv layers take no AdaLoRA"),
        (nn.Conv2d(4, 6, 3), "lora_xs", "conv layers take no LoRA-XS"),
    ],
)
def test_what_a_convolution_does_not_carry_says_so(layer: nn.Module, kind: str, why: str) -> None:
    with pytest.raises(TargetError, match=why):
        small = {name: 2 for name in ("rank", "target_rank") if name in METHODS[kind].model_fields}
        spec = parse({"kind": kind, "targets": ["conv"], **small})
        create(ModuleSource(nn.ModuleDict({"conv": layer})), spec, torch.Generator())


def test_an_adapter_of_another_kernel_is_refused() -> None:
    adapter = adapter_on(nn.Conv2d(4, 6, 3), "lora")
    with pytest.raises(TargetError, match=r"A is \[3, 4, 3, 3\], the layer takes \[4, 1, 9\] patches"):
        attach(nn.ModuleDict({"conv": nn.Conv2d(4, 6, (1, 9))}), adapter)


@pytest.mark.parity
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["1d", "2d", "2d, one cell", "3d"])
def test_files_and_outputs_are_pefts(name: str, dora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    layer, x = module(name)
    x = x if x.dim() > layer.weight.dim() - 1 else x[None]
    base = nn.Sequential(layer, nn.Flatten())
    bias = not dora and layer.bias is not None
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=dora, lora_bias=bias)
    theirs = peft.get_peft_model(nn.Sequential(layer, nn.Flatten()), config)
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs.eval()(x)
    expected.sin().sum().backward()
    adapter = Adapter.load(tmp_path / "theirs")
    assert adapter.parts[0].host == "conv" and adapter.spec.kind == ("dora" if dora else "lora")
    adapter.save(tmp_path / "ours")
    assert Adapter.load(tmp_path / "ours").digest == adapter.digest
    again = peft.PeftModel.from_pretrained(nn.Sequential(layer, nn.Flatten()), tmp_path / "ours")
    assert torch.equal(again.eval()(x), expected)
    handle = attach(base, adapter)
    ours = base(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    ours.sin().sum().backward()
    live = handle.layers["0"].parts()[0].tensors
    theirs_by_name = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(live) == len(theirs_by_name)
    for ours_name, suffix in {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}.items():
        [gradient] = [g for n, g in theirs_by_name.items() if n.endswith(suffix)]
        torch.testing.assert_close(live[ours_name].grad.reshape(gradient.shape), gradient, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_with_convolutions_is_merged(tmp_path: Path) -> None:
    """A model outside the table: its file's kernel is the merged one, and the rest is as it was."""
    import json

    from safetensors.torch import load_file, save_file

    from veneer.merge import merge

    layers = {"first": module("2d")[0], "second": module("1d")[0]}
    model = nn.ModuleDict(layers)
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "small_vision"}))
    spec = parse({"kind": "lora", "rank": 3, "targets": ["first", "second"]})
    adapter = stirred(create(ModuleSource(model), spec, torch.Generator().manual_seed(0)))
    merge(tmp_path / "base", adapter, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in layers.items():
        weight, _ = merged(adapter, name, ModuleSource(model).host(name))
        torch.testing.assert_close(found[f"{name}.weight"], weight.view_as(layer.weight), rtol=1e-6, atol=1e-6)
    assert torch.equal(found["second.bias"], layers["second"].bias)


def test_two_adapters_of_a_convolution_add_up(tmp_path: Path) -> None:
    from veneer.algebra import combine

    layer, _ = module("2d")
    one, two = (stirred(adapter_on(layer, "lora"), seed=seed) for seed in (1, 2))
    both = combine({"one": (one, 0.7), "two": (two, 0.3)}, "cat")
    expected = 0.7 * delta(one, "conv", None) + 0.3 * delta(two, "conv", None)
    torch.testing.assert_close(delta(both, "conv", None), expected, rtol=1e-5, atol=1e-5)
    both.save(tmp_path / "a")
    attach(nn.ModuleDict({"conv": layer}), Adapter.load(tmp_path / "a"))
