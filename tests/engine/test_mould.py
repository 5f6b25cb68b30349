"""An adapter that is cast is the adapter that is prepared, to the bit; and one that may not run is refused in the same words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.small import ids, lora, small_base
from tests.engine.test_engine import METHODS, shaken
from veneer.adapter import Adapter
from veneer.engine import mould
from veneer.engine.batch import Resident, prepare
from veneer.engine.mould import MOST, Moulds
from veneer.errors import BaseMismatch, FormatError
from veneer.methods import parse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests of the adapters that were prepared and not cast."""
    found: list[str] = []
    usual = prepare

    def noting(parts: Any, base: Any) -> Resident:
        found.append(parts[0][0].digest)
        return usual(parts, base)

    monkeypatch.setattr(mould, "prepare", noting)
    return found


def same(one: Resident, other: Resident) -> None:
    assert (one.digest, one.invocation, one.bytes) == (other.digest, other.invocation, other.bytes)
    assert list(one.bank.groups) == list(other.bank.groups)
    for name, packed in one.bank.groups.items():
        assert packed.slot == other.bank.groups[name].slot
        for pack, wanted in zip(packed.packs, other.bank.groups[name].packs, strict=True):
            assert pack.columns == wanted.columns
            for mine, theirs in zip(pack.tensors(), wanted.tensors(), strict=True):
                if mine is None or theirs is None:
                    assert mine is theirs
                    continue
                assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()
            if wanted.A is None:
                continue
            assert (pack.factors is None) == (wanted.factors is None)
            if pack.factors is not None and wanted.factors is not None:
                places = [t.data_ptr() for t in _pairs(pack)]
                assert pack.factors.pointers.flatten().tolist() == places
                assert pack.factors.shape == wanted.factors.shape and pack.factors.width == wanted.factors.width


def _pairs(pack: Any) -> list[torch.Tensor]:
    return [t for (first, last), b in zip(pack.ranks(), pack.B, strict=True) for t in (pack.A[first:last], b)]


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"alpha": 7.0},
        {"scaling": "alpha/sqrt(r)", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3.0}},
        {"targets": ["k_proj", "v_proj", "up_proj"]},
    ],
    ids=["plain", "scaled", "patterns", "parts of groups"],
)
def test_what_is_cast_is_what_is_prepared(
    fields: dict[str, Any], dtype: torch.dtype, stored: torch.dtype, prepared: list[str]
) -> None:
    base = small_base(dtype=dtype)
    first, second = (_shaken(base, seed, stored, **fields) for seed in (1, 2))
    moulds = Moulds(base)
    moulds.prepared(first, allow=None)
    cast = moulds.prepared(second, allow=None)
    assert prepared == [first.digest]
    same(cast, prepare([(second, 1.0)], base))


def _shaken(base: Any, seed: int, stored: torch.dtype, **fields: Any) -> Adapter:
    from veneer.inject import create

    made = create(base, parse({"kind": "lora", "rank": 3, **fields}), torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    return made.map_tensors(lambda t: (t + 0.3 * torch.randn(t.shape, generator=generator)).to(stored))


@pytest.mark.parametrize("kind", METHODS)
def test_the_second_of_any_method_is_as_if_it_were_the_first(kind: str, prepared: list[str]) -> None:
    base = small_base()
    first, second = (shaken(base, kind, seed) for seed in (1, 2))
    moulds = Moulds(base)
    moulds.prepared(first, allow=None)
    same(moulds.prepared(second, allow=None), prepare([(second, 1.0)], base))
    assert (len(prepared) == 1) == (kind == "lora")


@pytest.mark.parametrize(
    "fields",
    [{"lora_bias": True}, {"invocation": (5, 6)}, {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["bias", "invoked", "saved whole"],
)
def test_what_is_more_than_factors_is_prepared(fields: dict[str, Any], prepared: list[str]) -> None:
    base = small_base()
    first, second = (_shaken(base, seed, torch.float32, **fields) for seed in (1, 2))
    moulds = Moulds(base)
    moulds.prepared(first, allow=None)
    same(moulds.prepared(second, allow=None), prepare([(second, 1.0)], base))
    assert len(prepared) == 2


def _with(adapter: Adapter, change: Callable[[torch.Tensor], object]) -> Adapter:
    copied = adapter.map_tensors(torch.clone)
    change(copied.parts[3].tensors["B"])
    return copied


def test_numbers_that_may_not_run_are_refused_in_the_usual_words() -> None:
    base = small_base(dtype=torch.bfloat16)
    moulds = Moulds(base)
    moulds.prepared(lora(base, 1), allow=None)
    spoilt = _with(lora(base, 2), lambda b: b.view(-1)[5].fill_(float("nan")))
    with pytest.raises(FormatError, match=r"B at .* not finite"):
        moulds.prepared(spoilt, allow=None)
    large = _with(lora(base, 2), lambda b: b.view(-1)[5].fill_(3.4e38))
    with pytest.raises(FormatError, match="too large for bfloat16"):
        moulds.prepared(large, allow=None)


def test_every_adapter_has_to_belong_to_the_base() -> None:
    base = small_base()
    moulds = Moulds(base)
    moulds.prepared(lora(base, 1), allow=None)
    other = lora(base, 2)
    other = replace(other, provenance=replace(other.provenance, base="f" * 64))
    with pytest.raises(BaseMismatch):
        moulds.prepared(other, allow=None)
    assert moulds.prepared(other, allow="on purpose").digest == other.digest


def test_a_tensor_that_lies_apart_is_read_as_well(prepared: list[str]) -> None:
    base = small_base()
    moulds = Moulds(base)
    moulds.prepared(lora(base, 1), allow=None)
    second = lora(base, 2)
    odd = second.map_tensors(lambda t: t.t().contiguous().t())
    same(moulds.prepared(odd, allow=None), prepare([(second, 1.0)], base))
    assert len(prepared) == 2


def test_the_first_adapter_of_a_mould_is_not_kept_by_it() -> None:
    import gc
    import weakref

    base = small_base()
    moulds = Moulds(base)
    resident = moulds.prepared(lora(base, 1), allow=None)
    room = weakref.ref(next(resident.bank.tensors()))
    del resident
    gc.collect()
    assert room() is None


def test_only_so_many_moulds_are_kept() -> None:
    base = small_base()
    moulds = Moulds(base)
    for rank in range(1, MOST + 4):
        moulds.prepared(lora(base, 1, rank=rank, targets=["q_proj"]), allow=None)
    assert len(moulds._known) == MOST


def test_loads_of_an_engine_go_through_moulds(prepared: list[str]) -> None:
    from veneer.engine import Engine, Found, Request

    base = small_base()
    adapters = {f"a{i}": lora(base, i) for i in range(3)}

    class Shelf:
        def resolve(self, name: str) -> Found:
            adapter = adapters[name]
            return Found(name, adapter.digest, 1 << 16, lambda: adapter)

    def answers(source: Any) -> list[Any]:
        engine = Engine(base, source=source, kv_bytes=1 << 24, adapter_bytes=1 << 22)
        if source is None:
            for name, adapter in adapters.items():
                engine.add(name, adapter)
        requests = [Request(ids(i, 9), adapter=f"a{i}", max_tokens=8) for i in range(3)]
        return [choices[0].tokens for choices in engine.complete(requests)]

    assert answers(Shelf()) == answers(None)
    assert len(prepared) == 1
