"""A method, an init, a scale rule, a base format and an optimiser are one file each: dropped in, they work end to end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tinylm
from tests.laws.world import carried_out, fresh, inputs, stirred, world
from veneer import inits, methods
from veneer.adapter import Adapter
from veneer.base import formats
from veneer.base.formats import QUANTISATIONS
from veneer.errors import ConfigError
from veneer.inits import INITS
from veneer.inject.attach import ModuleSource, attach
from veneer.inject.create import create
from veneer.inject.targets import select
from veneer.methods import METHODS, lower, merged, parse
from veneer.methods.lora import LoRA
from veneer.models.load import load_base
from veneer.plan import Work, estimate
from veneer.train import optimizers, train
from veneer.train.optim import OPTIMIZERS
from veneer.types import SCALE_RULES

TOY_METHOD = '''
"""A shift of the weight along one outer product of trained vectors: W + u v^T."""
from typing import ClassVar, final
import torch
from pydantic import Field
from veneer.methods._abstract import Method
from veneer.methods._lowrank import Names
from veneer.types import LowRank, Site


@final
class Outer(Method):
    kind: ClassVar[str] = "outer"
    site: ClassVar[Site] = "weight"
    targets: Names = Field(("all-linear",))
    exclude: Names = Field(())
    layers: str | tuple[int, ...] | None = None

    def tensor_shapes(self, target, shape):
        return {"u": (shape.out_features,), "v": (shape.in_features,)}

    def start(self, target, host, factors, generator):
        return {"u": torch.zeros(host.shape.out_features), "v": torch.randn(host.shape.in_features, generator=generator)}

    def forward(self, x, part, host):
        return host.apply(x) + (x @ part.tensors["v"])[:, None] * part.tensors["u"]

    def lower(self, part, host):
        return (LowRank(part.tensors["v"][None], part.tensors["u"][:, None]),)

    def direct_delta(self, part):
        return torch.outer(part.tensors["u"], part.tensors["v"])

    def merged(self, part, host):
        return host.weight().float() + self.direct_delta(part), host.bias
'''
TOY_INIT = '''
"""Every row of A the same."""
import torch
from veneer.inits._abstract import init
from veneer.types import Factors


@init("flat")
def flat(host, rank, scale, stats, generator):
    return Factors(torch.full((rank, host.shape.in_features), 0.5), torch.zeros(host.shape.out_features, rank))
'''
TOY_RULE = '''
"""A scale that leaves the rank out."""
from veneer.types import SCALE_RULES

SCALE_RULES["alpha"] = lambda alpha, rank: alpha
'''


TOY_FORMAT = '''
"""Signs: each row is its mean size and a sign a number."""
import torch
from dataclasses import dataclass
from veneer.base.formats._abstract import QUANTISATIONS, Format


@dataclass(frozen=True, eq=False)
class Signs:
    positive: torch.Tensor
    size: torch.Tensor

    @property
    def shape(self):
        return tuple(self.positive.shape)

    @property
    def nbytes(self):
        return self.positive.numel() + 4 * len(self.size)

    def tensors(self):
        return {"positive": self.positive, "size": self.size}

    def dequantise(self, out):
        return out.copy_((2.0 * self.positive - 1) * self.size[:, None])

    def few_rows(self, x):
        return None


def quantise(weight):
    return Signs((weight >= 0).to(torch.uint8), weight.float().abs().mean(1))


QUANTISATIONS["toy-signs"] = Format(
    quantise, lambda tensors, shape: Signs(**tensors), lambda rows, columns: rows * columns + 4 * rows, "a sign a number"
)
'''
TOY_OPTIMIZER = '''
"""Steps of one size, whatever the gradient's."""
import torch
from veneer.train.optim import groups_of, optimizer


class Sign(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for buffer in group["params"]:
                buffer.sub_(group["lr"] * buffer.grad.sign())


@optimizer("toy_sign", state=lambda trained: 0)
def toy_sign(parameters, config, folder):
    """Descent by the sign."""
    return Sign(groups_of(parameters, config), {"lr": config.lr})
'''


LATER = ((QUANTISATIONS, "toy-signs"), (OPTIMIZERS, "toy_sign"))


@pytest.fixture
def dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Five files in temporary folders that the packages look into."""
    for package, name, text in (
        (methods, "toy_outer", TOY_METHOD),
        (inits, "toy_flat", TOY_INIT),
        (inits, "toy_rule", TOY_RULE),
        (formats, "toy_signs", TOY_FORMAT),
        (optimizers, "toy_sign", TOY_OPTIMIZER),
    ):
        folder = tmp_path / package.__name__.rpartition(".")[2]
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
    for package in (methods, inits, formats, optimizers):
        monkeypatch.setattr(
            package, "__path__", [*package.__path__, str(tmp_path / package.__name__.rpartition(".")[2])]
        )
        package.load_all.cache_clear()
        package.load_all()
    yield
    for registry, name in ((METHODS, "outer"), (INITS, "flat"), (SCALE_RULES, "alpha"), *LATER):
        del registry[name]
    for module in (
        "methods.toy_outer",
        "inits.toy_flat",
        "inits.toy_rule",
        "base.formats.toy_signs",
        "train.optimizers.toy_sign",
    ):
        del sys.modules[f"veneer.{module}"]
    for package in (methods, inits, formats, optimizers):
        package.load_all.cache_clear()


@pytest.mark.usefixtures("dropped")
def test_a_method_in_one_file(tmp_path: Path) -> None:
    base = world("biased")
    adapter = stirred(fresh(parse({"kind": "outer", "targets": ["q_proj"]}), base))
    adapter.save(tmp_path / "adapter")
    adapter = Adapter.load(tmp_path / "adapter")
    lowered = lower(adapter, base)
    assert adapter.num_parameters == 2 * (16 + 16)
    for target in adapter.targets:
        host = base.host(target)
        x = inputs(host)
        weight, bias = merged(adapter, target, host)
        dense = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(adapter.spec.forward(x, adapter.part(target), host), dense)
        torch.testing.assert_close(carried_out(lowered.weights[target], x, host), dense)


@pytest.mark.usefixtures("dropped")
def test_a_method_in_one_file_trains_on_any_module() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    spec = parse({"kind": "outer", "targets": ["0", "2"]})
    handle = attach(model, create(ModuleSource(model), spec, torch.Generator().manual_seed(0)))
    x = torch.randn(32, 4)
    y = x[:, :1] * x[:, 1:2]
    optimiser = torch.optim.SGD(handle.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.usefixtures("dropped")
def test_an_init_and_a_rule_in_one_file_each(tmp_path: Path) -> None:
    spec = parse({"kind": "lora", "rank": 2, "alpha": 3.0, "init": "flat", "scaling": "alpha", "targets": ["q_proj"]})
    adapter = fresh(spec, world())
    target = adapter.targets[0]
    assert adapter.scale(target) == 3.0
    assert torch.equal(adapter.part(target).tensors["A"], torch.full((2, 16), 0.5))
    adapter = stirred(adapter)
    adapter.save(tmp_path / "adapter")
    assert Adapter.load(tmp_path / "adapter").digest == adapter.digest
    (tmp_path / "adapter" / "veneer.json").unlink()
    as_peft_reads_it = Adapter.load(tmp_path / "adapter")
    torch.testing.assert_close(as_peft_reads_it.delta(target), adapter.delta(target), rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("dropped")
def test_a_base_format_and_an_optimiser_in_one_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded, planned, trained on from a run file's own words, and loaded again from the cache of converted bases."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    folder = tinylm.folder(tmp_path / "base")
    rows = tinylm.chat_rows(tmp_path / "rows.jsonl", 12)
    base = load_base(str(folder), dtype="float32", quantize="toy-signs")
    weight = base.host("model.layers.0.self_attn.q_proj").weight()
    assert len(weight[0].abs().unique()) == 1
    adapter = train(
        base,
        rows,
        method=LoRA(rank=2),
        out=tmp_path / "run",
        epochs=3,
        optimizer="toy_sign",
        lr=1e-3,
        schedule="constant",
    )
    assert float(adapter.part("model.layers.0.self_attn.q_proj").tensors["B"].abs().max()) == pytest.approx(
        3e-3, rel=1e-4
    )
    assert adapter.provenance.trained_on == "float32, toy-signs"
    work = Work(dtype="float32", quantize="toy-signs", state=OPTIMIZERS["toy_sign"].state)
    planned = estimate(base.config, base.layout, LoRA(rank=2), select(base.shape, LoRA(rank=2)).targets, work).bytes
    assert planned["base"] == base.nbytes and planned["optimizer"] == 0
    again = load_base(str(folder), dtype="float32", quantize="toy-signs")
    assert torch.equal(again.host("model.layers.0.self_attn.q_proj").weight(), weight)
    with pytest.raises(ConfigError, match="toy-signs"):
        load_base(str(folder), dtype="float32", quantize="toy-sign")
