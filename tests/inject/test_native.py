"""Adapters on a native base: bound to a context, composed where order does not matter, gone afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from tests import tinylm
from veneer.adapter import Adapter
from veneer.errors import Unsupported
from veneer.inject import attached, create, disabled
from veneer.methods.lora import LoRA
from veneer.models.base import Base
from veneer.models.load import load_base

IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(tinylm.folder(tmp_path_factory.mktemp("base"))), dtype="float32")


def adapter(base: Base, seed: int, targets: str = "all-linear") -> Adapter:
    """An adapter that does something: B is random too."""
    generator = torch.Generator().manual_seed(seed)
    fresh = create(base, LoRA(rank=2, alpha=4, targets=(targets,)), generator)
    return fresh.map_tensors(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator))


def logits(base: Base) -> Tensor:
    return base.logits(IDS)


def test_a_fresh_adapter_changes_no_bit(base: Base) -> None:
    fresh = create(base, LoRA(rank=2), torch.Generator().manual_seed(0))
    before = logits(base)
    with attached(base, fresh):
        assert torch.equal(logits(base), before)


def test_outside_and_disabled_are_the_bare_base_bitwise(base: Base) -> None:
    before = logits(base)
    with attached(base, adapter(base, 1)):
        assert not torch.equal(logits(base), before)
        with disabled(base):
            assert torch.equal(logits(base), before)
    assert torch.equal(logits(base), before)


def test_other_threads_see_the_bare_base(base: Base) -> None:
    before, seen = logits(base), []
    with attached(base, adapter(base, 1)):
        thread = threading.Thread(target=lambda: seen.append(logits(base)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], before)


def test_the_adapter_equals_dense_weights_with_its_delta(base: Base) -> None:
    one = adapter(base, 1)
    with attached(base, one):
        expected = logits(base)
    saved = {name: group.frozen.weight.clone() for name, group in base.decoder.groups.items()}
    from veneer.models.decoder import Decoder

    tensors = dict(base.decoder.tensors)
    for spec in base.layout.groups:
        changed = saved[spec.name].clone()
        for part in spec.parts:
            if part.path in one.targets:
                changed[part.start : part.stop] += one.delta(part.path)
        tensors[spec.name] = changed
    merged = Base("merged", Decoder(base.config, base.layout, tensors))
    assert torch.allclose(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(base.decoder.groups[name].frozen.weight, w) for name, w in saved.items())


def test_two_low_rank_adapters_add(base: Base) -> None:
    one, two = adapter(base, 1), adapter(base, 2, "q_proj")
    with attached(base, one, two):
        first = logits(base)
    with attached(base, two, one):
        assert torch.allclose(logits(base), first, rtol=1e-4, atol=1e-5)
    with attached(base, one):
        assert not torch.allclose(logits(base), first, rtol=1e-3, atol=1e-3)


def test_what_depends_on_an_order_is_refused(base: Base) -> None:
    from veneer.methods.dora import DoRA

    dora = create(base, DoRA(rank=2), torch.Generator().manual_seed(0))
    with pytest.raises(Unsupported, match="order"), attached(base, adapter(base, 1), dora):
        pass


@pytest.mark.parametrize("targets", ["embed_tokens", "lm_head"])
def test_embedding_and_head_carry_adapters_too(base: Base, targets: str) -> None:
    one = adapter(base, 1, targets)
    before = logits(base)
    with attached(base, one):
        assert not torch.equal(logits(base), before)


def test_an_invoked_adapter_leaves_everything_before_its_last_invocation_bitwise(base: Base) -> None:
    invocation = (40, 41)
    spec = LoRA(rank=2, alpha=4, invocation=invocation)
    generator = torch.Generator().manual_seed(0)
    one = create(base, spec, generator).map_tensors(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator))
    ids = [[5, 40, 41, 8, 9, 40, 41, 12]]
    before = base.logits(ids)
    with attached(base, one):
        after = base.logits(ids)
        assert torch.equal(base.logits([[5, 6, 7, 8]]), _bare(base, [[5, 6, 7, 8]]))
    assert torch.equal(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:], atol=1e-4)


def _bare(base: Base, ids: list[list[int]]) -> Tensor:
    with disabled(base):
        return base.logits(ids)
