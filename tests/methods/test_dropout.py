"""Dropout on what an adapter adds, never on the base: natively against the definition, on any module against PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.formats.tiny import llama, stir
from tests.laws.world import stirred
from tests.models import tiny
from veneer import methods
from veneer.adapter import Adapter
from veneer.inject import ModuleSource, attach
from veneer.inject.create import create
from veneer.methods import parse
from veneer.methods.dora import DoRA, row_norms
from veneer.models.bank import Dropout
from veneer.models.project import project
from veneer.types import Span

IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("base_name", ["llama", "qwen2"])
def test_dora_drops_its_own_input_and_nothing_else(base_name: str) -> None:
    """x W^T + b + (m/c - 1) d(x) W^T + m/c s d(x) A^T B^T, and the gradients of that."""
    base, _ = tiny.base(base_name)
    group = next(g for n, g in base.decoder.groups.items() if n.endswith("qkv"))
    adapter = stirred(
        create(base, parse({"kind": "dora", "rank": 2, "targets": ["q_proj", "v_proj"]}), torch.Generator())
    )
    adapter = adapter.map_tensors(lambda t: t.requires_grad_())
    x = torch.randn(6, base.config.hidden, generator=torch.Generator().manual_seed(0))
    dropout = Dropout(0.4, torch.Generator().manual_seed(7))
    bank = base.bank([methods.lower(adapter, base)], dropout=dropout)
    found = project(group, x, [Span(0, 6, 0)], bank)
    keep = torch.empty(x.shape).bernoulli_(0.6, generator=torch.Generator().manual_seed(7)) / 0.6
    d = x * keep
    columns = []
    for part in group.parts:
        host = base.host(part.path)
        y = host.apply(x)
        if part.path in adapter.targets:
            own = adapter.part(part.path)
            assert isinstance(adapter.spec, DoRA)
            a, b = adapter.spec.factors(own)
            scale = own.tensors["magnitude"] / row_norms(a, b, host)
            y = y + (scale - 1) * (d @ host.weight().t()) + scale * (d @ a.t() @ b.t())
        columns.append(y)
    expected = torch.cat(columns, dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    leaves = [t for p in adapter.parts if p.target in {g.path for g in group.parts} for t in p.tensors.values()]
    ours = torch.autograd.grad(found.sin().sum(), leaves, retain_graph=True)
    for one, other in zip(ours, torch.autograd.grad(expected.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("dora", [False, True])
def test_on_any_module_it_is_pefts(dora: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        lora_dropout=0.4,
        target_modules=["q_proj", "down_proj"],
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(llama(), config)
    stir(theirs)
    theirs.save_pretrained(tmp_path)

    def by_place(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """The same mask for the same shape, so that both sides drop the same numbers."""
        if not training or not p:
            return x
        return (
            x * torch.empty(x.shape).bernoulli_(1 - p, generator=torch.Generator().manual_seed(x.shape[-1])) / (1 - p)
        )

    monkeypatch.setattr(torch.nn.functional, "dropout", by_place)
    base = llama()
    handle = attach(base, Adapter.load(tmp_path))
    quiet = base.eval()(IDS).logits
    ours, expected = base.train()(IDS).logits, theirs.train()(IDS).logits
    assert not torch.allclose(ours, quiet, atol=1e-3)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    handle.detach()


def test_a_fresh_adapter_in_training_is_the_base_up_to_rounding() -> None:
    base = llama()
    with torch.no_grad():
        before = base(IDS).logits
        spec = parse({"kind": "dora", "rank": 2, "dropout": 0.5, "targets": ["q_proj", "embed_tokens"]})
        attach(base, create(ModuleSource(base), spec, torch.Generator()))
        torch.testing.assert_close(base.train()(IDS).logits, before, rtol=1e-5, atol=1e-5)
