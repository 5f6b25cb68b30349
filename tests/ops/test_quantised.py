"""NF4 and int8: tables, hand vectors, error figures, byte counts, and bytes equal to bitsandbytes."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from veneer.ops import int8, nf4
from veneer.ops.nf4 import DoubleQuantised
from veneer.ops.scratch import Scratch


def gaussian(rows: int = 256, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def back(stored: nf4.NF4 | int8.Int8Rows, dtype: torch.dtype = torch.float32) -> Tensor:
    return stored.dequantise(torch.empty(stored.shape, dtype=dtype))


def relative_error(w: Tensor, stored: nf4.NF4 | int8.Int8Rows) -> float:
    return float((back(stored) - w).norm() / w.norm())


def test_levels_are_gaussian_quantiles() -> None:
    delta, quantile = 929 / 960, NormalDist().inv_cdf
    positive = [quantile(delta + (0.5 - delta) * i / 8) for i in range(8)]
    negative = [-quantile(delta + (0.5 - delta) * i / 7) for i in range(7)]
    derived = [value / quantile(delta) for value in sorted((*positive, *negative, 0.0))]
    assert nf4.levels().tolist() == pytest.approx(derived, abs=2e-7)


def test_hand_vector() -> None:
    stored = nf4.quantise(torch.tensor([[1.0, -0.5, 0.1, 0.0]]), block=4)
    assert isinstance(stored.absmax, Tensor) and stored.absmax.tolist() == [1.0]
    assert stored.packed.tolist() == [0xF2, 0x87]
    assert back(stored).tolist() == [[1.0, pytest.approx(-0.5250730514526367), pytest.approx(0.07958029955625534), 0.0]]


def test_double_quantisation_hand_vector() -> None:
    stored = nf4._double(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert stored.offset.item() == 2.5 and stored.absmax.tolist() == [1.5]
    assert stored.codes.tolist() == [0, 47, 207, 255]
    assert nf4.dynamic_code()[127].item() == 0
    assert nf4.dynamic_code()[stored.codes.int()].tolist() == pytest.approx([-0.99296875, -0.33203125, 0.33203125, 1.0])
    assert nf4._undouble(stored).tolist() == pytest.approx([1.01054688, 2.00195312, 2.99804688, 4.0])


def test_dynamic_code() -> None:
    code = nf4.dynamic_code()
    assert len(code) == 256 and bool((code[1:] > code[:-1]).all())
    assert code[0].item() == pytest.approx(-0.99296875) and code[-1].item() == 1.0
    assert code[code > 0][0].item() == pytest.approx(5.5e-7)


@pytest.mark.parametrize("absmax", [1e-6, 0.37, 1.0, 12345.0])
def test_every_level_survives(absmax: float) -> None:
    w = (nf4.levels() * absmax).repeat(4).view(1, 64)
    assert torch.equal(back(nf4.quantise(w)), w)


def test_quantising_twice_changes_nothing_without_dq() -> None:
    once = back(nf4.quantise(gaussian()))
    assert torch.equal(back(nf4.quantise(once)), once)


def test_block_maximum_and_bound() -> None:
    w = gaussian()
    stored = nf4.quantise(w)
    blocks, found = w.view(-1, 64), back(stored).view(-1, 64)
    top = blocks.abs().argmax(1, keepdim=True)
    assert torch.equal(found.gather(1, top), blocks.gather(1, top))
    widest = float((nf4.levels()[1:] - nf4.levels()[:-1]).max()) / 2
    assert widest == pytest.approx(0.152, abs=1e-3)
    assert bool(((found - blocks).abs() <= widest * 1.0001 * blocks.abs().amax(1, keepdim=True)).all())


@pytest.mark.parametrize("block, wanted", [(32, 0.0873), (64, 0.0920), (128, 0.0956), (256, 0.0986), (4096, 0.1099)])
def test_error_on_gaussian_data(block: int, wanted: float) -> None:
    w = gaussian(1024, 1024)
    assert relative_error(w, nf4.quantise(w, block=block)) == pytest.approx(wanted, abs=3e-4)


def test_double_quantisation_costs_almost_nothing() -> None:
    w = gaussian(1024, 1024)
    plain, double = nf4.quantise(w), nf4.quantise(w, double=True)
    assert relative_error(w, double) == pytest.approx(relative_error(w, plain), abs=1e-4)
    rms = ((double.scales() - plain.scales()) / plain.scales()).square().mean().sqrt()
    assert float(rms) < 3e-3


def test_byte_counts() -> None:
    w = gaussian(1024, 1024)
    bits = [8 * q.nbytes / w.numel() for q in (nf4.quantise(w), nf4.quantise(w, double=True), int8.quantise(w))]
    assert bits == [pytest.approx(4.5), pytest.approx(4.126953, abs=1e-4), pytest.approx(8 + 32 / 1024)]


@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (5, 64), (2, 33), (700, 96)])
@pytest.mark.parametrize("double", [False, True])
def test_odd_shapes(shape: tuple[int, int], double: bool) -> None:
    w = gaussian(*shape)
    stored = nf4.quantise(w, double=double)
    assert len(stored.packed) == math.ceil(w.numel() / 2)
    assert relative_error(w, stored) < 0.2
    assert torch.equal(back(stored, torch.bfloat16), back(stored).bfloat16())


def test_zeros_stay_zeros() -> None:
    w = torch.zeros(4, 64)
    assert torch.equal(back(nf4.quantise(w)), w) and torch.equal(back(int8.quantise(w)), w)
    assert nf4.quantise(w).packed.unique().tolist() == [0x77]


def test_int8() -> None:
    w = gaussian(4096, 64)
    stored = int8.quantise(w)
    assert relative_error(w, stored) == pytest.approx(0.0059, abs=2e-4)
    assert bool((stored.codes.abs().amax(1) == 127).all())
    assert torch.equal(back(stored, torch.bfloat16), back(stored).bfloat16())


def test_scratch_is_one_buffer() -> None:
    scratch = Scratch()
    with scratch.borrow((4, 8), torch.float32) as a:
        first = a.data_ptr()
    with scratch.borrow((8, 8), torch.bfloat16) as b:
        assert b.data_ptr() == first and b.shape == (8, 8)
    assert scratch.nbytes == 128


def test_freed_memory_is_used_again() -> None:
    """In a process of its own, as it stays for good: once the heap has settled, no new pages are asked for."""
    script = (
        "import resource, torch\nfrom veneer.ops.scratch import keep_freed_memory\nassert keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def round():\n    kept = [torch.ones(1 << 22) for _ in range(8)]\n"
        "for _ in range(8):\n    before = faults(); round(); last = faults() - before\nprint(last)"
    )
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000, "128 MB are 32,768 pages"


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(64, 96), (576, 192), (33, 70)])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_equal_bitsandbytes(shape: tuple[int, int], double: bool, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = gaussian(*shape).to(dtype)
    theirs, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=double, quant_type="nf4")
    ours = nf4.quantise(w, double=double)
    assert torch.equal(ours.packed, theirs.view(-1))
    if isinstance(ours.absmax, DoubleQuantised):
        # Theirs is now and then one step off the nearest code; ours never is.
        steps = (ours.absmax.codes.int() - state.absmax.int()).abs()
        assert int(steps.max()) <= 1 and float((steps > 0).float().mean()) < 0.01
        torch.testing.assert_close(ours.absmax.absmax, state.state2.absmax, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.absmax.offset, state.offset, rtol=1e-6, atol=0)
        torch.testing.assert_close(nf4.dynamic_code(), state.state2.code, rtol=0, atol=0)
    else:
        assert torch.equal(ours.absmax, state.absmax)
    if shape[1] % 64 == 0:  # their CPU kernel restarts blocks at each row, which differs from their own bytes otherwise
        theirs_back = functional.dequantize_4bit(theirs, state).float()
        torch.testing.assert_close(back(ours, dtype).float(), theirs_back, rtol=2e-2 if double else 8e-3, atol=1e-6)


@pytest.mark.parity
def test_int8_equals_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = gaussian(64, 96).half()
    codes, absmax, _ = functional.int8_vectorwise_quant(w.clone())
    ours = int8.quantise(w)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.absmax, absmax)
