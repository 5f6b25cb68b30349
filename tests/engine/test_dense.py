"""Quantised bases in the engine: 4 bits are dequantised once and answer as before, int8 and bf12 are read as they lie."""

from __future__ import annotations

import logging
from typing import Any

import psutil
import pytest
import torch

from tests.engine.small import ids, lora, lowered_of, plain_greedy, plain_logits, small_base
from veneer.base.formats import load_all
from veneer.base.quantized import QuantizedFrozen
from veneer.engine import Engine, Request
from veneer.engine.dense import servable
from veneer.errors import ResourceError, Unsupported
from veneer.models.base import Base
from veneer.models.decoder import Decoder
from veneer.models.packed import pack, unpack
from veneer.ops.low_rank import DenseFrozen
from veneer.ops.native import build, few

MB = 1 << 20
needs_kernels = pytest.mark.skipif(build.library() is None, reason="no native kernels on this machine")


def quantised(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Base:
    """The small base with its projections held in `kind`, as `load_base` holds them."""
    plain = small_base(dtype=dtype, hidden_size=64, intermediate_size=64, **changes)
    tensors = pack(plain.layout, plain.decoder.tensors, kind)
    held = unpack(plain.layout, tensors, dtype, kind)
    return Base("small", Decoder(plain.config, plain.layout, held), identity="0" * 64, quantize=kind)


def engine(base: Base) -> Engine:
    return Engine(base, kv_bytes=16 * MB, adapter_bytes=16 * MB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(set(load_all()) - {"int8", "bf12"}))
def test_four_bits_are_unpacked_once_and_give_the_same_bits(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = quantised(kind, dtype)
    expected = {rows: plain_logits(base, ids(1, rows), None) for rows in (5, 40)}
    with caplog.at_level(logging.INFO, logger="veneer.engine.dense"):
        running = engine(base)
    packed = {n: g.frozen for n, g in base.decoder.groups.items() if isinstance(g.frozen, QuantizedFrozen)}
    size = sum(f.out_features * f.in_features * dtype.itemsize for f in packed.values())
    assert running.dequantised_bytes == size > 0
    assert f"{size:,} bytes" in caplog.text
    for storage in {type(part) for frozen in packed.values() for part in frozen.parts}:
        monkeypatch.setattr(storage, "dequantise", lambda self, out: pytest.fail("unpacked again"))
    twin = Base("twin", running._runner.decoder, base.identity)
    for rows, logits in expected.items():
        assert torch.equal(plain_logits(twin, ids(1, rows), None), logits)
    running.complete([Request(ids(1, 9), max_tokens=5)])


def test_adapters_and_merging_work_on_a_dequantised_base() -> None:
    base = quantised("nf4")
    adapter = lora(base, 1)
    running = engine(base)
    running.add("a", adapter)
    wanted = plain_greedy(base, ids(2, 12), lowered_of(base, adapter), 10)
    request = Request(ids(2, 12), adapter="a", max_tokens=10)
    assert list(running.complete([request])[0][0].tokens) == wanted
    running.heat("a")
    assert running.settle().state == "hot"
    assert list(running.complete([request])[0][0].tokens) == wanted


@pytest.mark.parametrize("kind", ["int8", pytest.param("bf12", marks=needs_kernels)])
def test_bases_whose_products_read_the_codes_are_served_as_they_are(kind: str) -> None:
    base = quantised(kind, torch.bfloat16)
    assert servable(base) == (base.decoder, 0)
    running = engine(base)
    adapter = lora(base, 1)
    running.add("a", adapter)
    wanted = plain_greedy(base, ids(2, 12), lowered_of(base, adapter), 10)
    assert list(running.complete([Request(ids(2, 12), adapter="a", max_tokens=10)])[0][0].tokens) == wanted
    with pytest.raises(Unsupported, match=kind):
        running.heat("a")


def test_a_dense_base_is_served_as_it_is() -> None:
    base = small_base()
    assert servable(base) == (base.decoder, 0)


def test_bf12_without_kernels_is_unpacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantised("bf12", torch.bfloat16)
    monkeypatch.setattr(few, "library", lambda: None)
    assert servable(base)[1] > 0


def test_without_room_the_refusal_says_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantised("nf4")
    little = type("Memory", (), {"available": 1000})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    with pytest.raises(ResourceError, match="1,000 are free"):
        servable(base)


def test_the_rest_of_the_base_is_shared() -> None:
    base = quantised("nf4")
    decoder, _ = servable(base)
    assert decoder.embed.data_ptr() == base.decoder.embed.data_ptr()
    assert all(isinstance(group.frozen, DenseFrozen) for group in decoder.groups.values())
