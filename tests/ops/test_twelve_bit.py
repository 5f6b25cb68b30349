"""bf16 in twelve bits: every number comes back, and products read the bytes as if they were the bf16 weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.base.formats import load_all
from veneer.ops import twelve_bit
from veneer.ops.native import build, few

needs_kernels = pytest.mark.skipif(build.library() is None, reason="no native kernels on this machine")


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def with_rare(rows: int, columns: int) -> Tensor:
    """Zeros of both signs, and in a few rows weights far below the others."""
    weight = gaussian(rows, columns)
    weight[::2, 3], weight[::2, 4:20:2] = 0.0, -0.0
    for row in {0, rows // 2, rows - 1}:
        weight[row, 5], weight[row, columns - 1], weight[row, 9] = 1e-20, -1e-30, 2e-39
    return weight


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


def back(stored: twelve_bit.TwelveBit, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return stored.dequantise(torch.empty(stored.shape, dtype=dtype))


@pytest.fixture(params=["kernels", "plain"])
def forms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways back to bf16."""
    if request.param == "plain":
        monkeypatch.setattr(few, "library", lambda: None)
    elif build.library() is None:
        pytest.skip("no native kernels on this machine")


def test_hand_vector() -> None:
    """1 is 0x3f80, -0.75 is 0xbf40, 2^-14 is 0x3880, 2^-16 is 0x3780; the row has zeros, so it counts from 0x3f - 7 = 0x38."""
    weight = torch.zeros(1, 64, dtype=torch.bfloat16)
    weight[0, 0], weight[0, 1], weight[0, 32], weight[0, 33] = 1.0, -0.75, 2.0**-12, 2.0**-16
    stored = twelve_bit.quantise(weight)
    fours, low = stored.codes[0, :32].tolist(), stored.codes[0, 32:].tolist()
    assert stored.high.tolist() == [0x80 | 0x38]
    assert fours == [7 | (8 | 7) << 4, 0, 0, 0, 1] + [0] * 27  # weights 32 to 39 lie behind 0 to 7
    assert low == [0x80, 0x40] + [0] * 6 + [0x80, 0x80] + [0] * 54
    assert stored.places.tolist() == [33] and stored.values.tolist() == [2.0**-16]


def test_every_number_comes_back(forms: None) -> None:
    """All of bf16: numbers too small to be normal, infinities, everything that is not a number."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for weight in (every.view(256, 256), every.view(256, 256).t().contiguous(), every.view(1024, 64)):
        assert torch.equal(bits(back(twelve_bit.quantise(weight))), bits(weight))


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (7, 64), (5, 100), (33, 576)])
def test_any_shape_comes_back(shape: tuple[int, int], forms: None) -> None:
    weight = with_rare(*shape) if shape[1] > 9 else gaussian(*shape)
    stored = twelve_bit.quantise(weight)
    assert stored.shape == shape and torch.equal(bits(back(stored)), bits(weight))
    assert torch.equal(back(stored, torch.float32), weight.float())


def test_long_weights_are_taken_in_pieces(forms: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twelve_bit, "CHUNK", 200)
    weight = with_rare(11, 64)
    assert torch.equal(bits(back(twelve_bit.quantise(weight))), bits(weight))


def test_other_floats_are_rounded_once() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    weight[1, 2] = 1e-12
    assert torch.equal(back(twelve_bit.quantise(weight)), weight.bfloat16())


@pytest.mark.parametrize("rare", [True, False])
def test_a_file_keeps_everything(rare: bool) -> None:
    weight = with_rare(6, 128) if rare else gaussian(6, 128)
    stored = twelve_bit.quantise(weight)
    assert bool(len(stored.places)) == rare
    again = load_all()["bf12"].restore(stored.tensors(), stored.shape)
    assert torch.equal(bits(again.dequantise(torch.empty(6, 128, dtype=torch.bfloat16))), bits(weight))


def test_trained_weights_take_twelve_bits() -> None:
    stored = twelve_bit.quantise(gaussian(512, 1024))
    assert 8 * stored.nbytes / (512 * 1024) < 12.05
    assert twelve_bit.bytes_of(512, 1024) <= stored.nbytes


@needs_kernels
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 17, 32])
@pytest.mark.parametrize(("m", "k"), [(1, 64), (2, 128), (33, 576), (70, 192)])
def test_products_are_those_of_the_plain_weight_to_the_bit(n: int, m: int, k: int) -> None:
    weight, x = with_rare(m, k), gaussian(n, k + 32, seed=1)[:, 32:]
    found, wanted = twelve_bit.quantise(weight).few_rows(x), few.product(x, weight)
    assert found is not None and wanted is not None
    assert torch.equal(found, wanted)


@needs_kernels
def test_what_the_kernel_does_not_cover_is_left_to_others() -> None:
    stored = twelve_bit.quantise(gaussian(4, 64))
    assert stored.few_rows(gaussian(33, 64)) is None and stored.few_rows(gaussian(2, 64).float()) is None
    assert twelve_bit.quantise(gaussian(4, 96)).few_rows(gaussian(2, 96)) is None
    assert stored.few_rows(gaussian(2, 128)) is None
    assert not few.unpack_twelve(stored.rows, torch.empty(2, 64, dtype=torch.bfloat16))
    assert not few.unpack_twelve(stored.rows, torch.empty(64, 4, dtype=torch.bfloat16).t())
