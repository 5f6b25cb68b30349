"""NF4, FP4, BOF4-S and int8: tables, hand vectors, error figures, byte counts, and bytes equal to bitsandbytes."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from veneer.base.formats import load_all as load_formats
from veneer.base.formats.bof4 import TABLE as BOF4
from veneer.base.formats.fp4 import TABLE as FP4
from veneer.base.formats.nf4 import TABLE as NF4
from veneer.ops import four_bit, int8
from veneer.ops.four_bit import DoubleQuantised, FourBit
from veneer.ops.scratch import Scratch


def gaussian(rows: int = 256, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def back(stored: FourBit | int8.Int8Rows, dtype: torch.dtype = torch.float32) -> Tensor:
    return stored.dequantise(torch.empty(stored.shape, dtype=dtype))


def relative_error(w: Tensor, stored: FourBit | int8.Int8Rows) -> float:
    return float((back(stored) - w).norm() / w.norm())


def test_levels_are_gaussian_quantiles() -> None:
    delta, quantile = 929 / 960, NormalDist().inv_cdf
    positive = [quantile(delta + (0.5 - delta) * i / 8) for i in range(8)]
    negative = [-quantile(delta + (0.5 - delta) * i / 7) for i in range(7)]
    derived = [value / quantile(delta) for value in sorted((*positive, *negative, 0.0))]
    assert NF4.values.tolist() == pytest.approx(derived, abs=2e-7)


def test_hand_vector() -> None:
    stored = four_bit.quantise(torch.tensor([[1.0, -0.5, 0.1, 0.0]]), NF4, block=4)
    assert isinstance(stored.absmax, Tensor) and stored.absmax.tolist() == [1.0]
    assert stored.packed.tolist() == [0xF2, 0x87]
    assert back(stored).tolist() == [[1.0, pytest.approx(-0.5250730514526367), pytest.approx(0.07958029955625534), 0.0]]


def test_double_quantisation_hand_vector() -> None:
    stored = four_bit.doubled(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert stored.offset.item() == 2.5 and stored.absmax.tolist() == [1.5]
    assert stored.codes.tolist() == [0, 47, 207, 255]
    assert four_bit.dynamic_code()[127].item() == 0
    assert four_bit.dynamic_code()[stored.codes.int()].tolist() == pytest.approx(
        [-0.99296875, -0.33203125, 0.33203125, 1.0]
    )
    assert four_bit.undouble(stored).tolist() == pytest.approx([1.01054688, 2.00195312, 2.99804688, 4.0])


def test_dynamic_code() -> None:
    code = four_bit.dynamic_code()
    assert len(code) == 256 and bool((code[1:] > code[:-1]).all())
    assert code[0].item() == pytest.approx(-0.99296875) and code[-1].item() == 1.0
    assert code[code > 0][0].item() == pytest.approx(5.5e-7)


TABLES = {"nf4": NF4, "fp4": FP4, "bof4-s": BOF4}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("absmax", [1e-6, 0.37, 1.0, 12345.0])
def test_every_level_survives(name: str, absmax: float) -> None:
    w = (TABLES[name].values * absmax).repeat(4).view(1, 64)
    assert torch.equal(back(four_bit.quantise(w, TABLES[name])), w)


@pytest.mark.parametrize("name", TABLES)
def test_quantising_twice_changes_nothing_without_dq(name: str) -> None:
    once = back(four_bit.quantise(gaussian(), TABLES[name]))
    assert torch.equal(back(four_bit.quantise(once, TABLES[name])), once)


@pytest.mark.parametrize("name", TABLES)
def test_every_number_goes_to_its_nearest_level(name: str) -> None:
    """The definition in fp64: of all 16 levels times the block's scale, the nearest."""
    w, table = gaussian(), TABLES[name]
    blocks = w.double().view(-1, 64)
    top = blocks.abs().argmax(1, keepdim=True)
    scale = blocks.gather(1, top) if table.signed else blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[:, :, None] - scale[:, :, None] * table.values.double()).abs().amin(2)
    found = back(four_bit.quantise(w, table)).double().view(-1, 64)
    torch.testing.assert_close((found - blocks).abs(), nearest, rtol=1e-4, atol=1e-6)


def test_fp4_levels_and_codes() -> None:
    """Science 5.5: 0, 0.00520833, 2/3, 1, 1/3, 1/2, 1/6, 1/4 by code, the sign in bit 8; zero is written as code 0."""
    w = torch.tensor([[1.0, 2 / 3, -0.5, 1 / 3, -0.25, 1 / 6, 0.00520833, 0.0, -1.0, -0.0]])
    stored = four_bit.quantise(w, FP4, block=16)
    codes = torch.stack([stored.packed >> 4, stored.packed & 15], dim=1).flatten().tolist()
    assert codes == [3, 2, 8 | 5, 4, 8 | 7, 6, 1, 0, 8 | 3, 0]
    torch.testing.assert_close(back(stored), w, rtol=1e-6, atol=1e-9)


def test_bof4_s_is_the_lloyd_max_table_of_signed_blocks() -> None:
    """The density of y = x / t for the 63 numbers beside a block's extreme t, weighted with t^2, by quadrature in fp64."""
    y = torch.linspace(-1, 1, 16001, dtype=torch.float64)
    t = (torch.arange(600, dtype=torch.float64) + 0.5) * (9 / 600)
    phi = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    inside = torch.erf(t / math.sqrt(2))
    weight = 64 * inside**62 * 2 * phi * t**3 * (9 / 600)
    density = (weight[:, None] * torch.exp(-(t[:, None] * y).square() / 2)).sum(0) / math.sqrt(2 * math.pi)
    moments = [torch.cumulative_trapezoid(density * y**k, y) for k in range(3)]
    total = [torch.cat([m.new_zeros(1), m]) for m in moments]
    levels = BOF4.values.double()
    edges = torch.cat(
        [-torch.ones(1, dtype=torch.float64), (levels[1:] + levels[:-1]) / 2, torch.ones(1, dtype=torch.float64)]
    )
    at = ((edges + 1) * 8000).clamp(0, 15999)
    low = at.long()
    cells = [torch.diff(v[low] + (at - low) * (v[low + 1] - v[low])) for v in total]
    centroids = cells[1] / cells[0]
    free = [i for i, level in enumerate(BOF4.levels) if level not in (0.0, 1.0)]
    assert len(free) == 14
    torch.testing.assert_close(centroids[free], levels[free], rtol=0, atol=2e-6)
    squared = (cells[2] - 2 * levels * cells[1] + levels.square() * cells[0]).sum()
    assert math.sqrt(63 / 64 * float(squared)) == pytest.approx(0.0857, abs=1e-4)


def test_the_extreme_of_a_signed_block_is_exact() -> None:
    w = gaussian()
    stored = four_bit.quantise(w, BOF4)
    blocks, found = w.view(-1, 64), back(stored).view(-1, 64)
    top = blocks.abs().argmax(1, keepdim=True)
    assert torch.equal(found.gather(1, top), blocks.gather(1, top))
    assert bool((stored.scales() < 0).any() and (stored.scales() > 0).any())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("nf4", 0.0920), ("nf4-dq", 0.0920), ("fp4", 0.1220), ("bof4-s", 0.0857), ("bof4-s-dq", 0.0860)],
)
def test_error_of_a_format_on_gaussian_data(name: str, wanted: float) -> None:
    """Science 5.5, +- 0.0005. BOF4-S: 10 % less squared error than NF4 at the same size, and more (science says 0.0870)."""
    w = gaussian(1024, 1024)
    assert relative_error(w, load_formats()[name](w)) == pytest.approx(wanted, abs=5e-4)


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "fp4-dq", "bof4-s", "bof4-s-dq", "int8"])
def test_a_format_comes_back_from_its_tensors(name: str) -> None:
    form = load_formats()[name]
    stored = form(gaussian(33, 70))
    again = form.restore(stored.tensors(), stored.shape)
    assert torch.equal(back(stored), back(again)) and stored.nbytes == form.nbytes(33, 70)


def test_block_maximum_and_bound() -> None:
    w = gaussian()
    stored = four_bit.quantise(w, NF4)
    blocks, found = w.view(-1, 64), back(stored).view(-1, 64)
    top = blocks.abs().argmax(1, keepdim=True)
    assert torch.equal(found.gather(1, top), blocks.gather(1, top))
    widest = float((NF4.values[1:] - NF4.values[:-1]).max()) / 2
    assert widest == pytest.approx(0.152, abs=1e-3)
    assert bool(((found - blocks).abs() <= widest * 1.0001 * blocks.abs().amax(1, keepdim=True)).all())


@pytest.mark.parametrize("block, wanted", [(32, 0.0873), (64, 0.0920), (128, 0.0956), (256, 0.0986), (4096, 0.1099)])
def test_error_on_gaussian_data(block: int, wanted: float) -> None:
    w = gaussian(1024, 1024)
    assert relative_error(w, four_bit.quantise(w, NF4, block=block)) == pytest.approx(wanted, abs=3e-4)


def test_double_quantisation_costs_almost_nothing() -> None:
    w = gaussian(1024, 1024)
    plain, double = four_bit.quantise(w, NF4), four_bit.quantise(w, NF4, double=True)
    assert relative_error(w, double) == pytest.approx(relative_error(w, plain), abs=1e-4)
    rms = ((double.scales() - plain.scales()) / plain.scales()).square().mean().sqrt()
    assert float(rms) < 3e-3


def test_byte_counts() -> None:
    w = gaussian(1024, 1024)
    bits = [
        8 * q.nbytes / w.numel()
        for q in (four_bit.quantise(w, NF4), four_bit.quantise(w, NF4, double=True), int8.quantise(w))
    ]
    assert bits == [pytest.approx(4.5), pytest.approx(4.126953, abs=1e-4), pytest.approx(8 + 32 / 1024)]


@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (5, 64), (2, 33), (700, 96)])
@pytest.mark.parametrize("double", [False, True])
def test_odd_shapes(shape: tuple[int, int], double: bool) -> None:
    w = gaussian(*shape)
    stored = four_bit.quantise(w, NF4, double=double)
    assert len(stored.packed) == math.ceil(w.numel() / 2)
    assert relative_error(w, stored) < 0.2
    assert torch.equal(back(stored, torch.bfloat16), back(stored).bfloat16())


def test_zeros_stay_zeros() -> None:
    w = torch.zeros(4, 64)
    assert torch.equal(back(four_bit.quantise(w, NF4)), w) and torch.equal(back(int8.quantise(w)), w)
    assert four_bit.quantise(w, NF4).packed.unique().tolist() == [0x77]


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


@pytest.mark.parametrize("size, count", [(1 << 22, 8), (1 << 25, 1)])  # 16 MB each, and one that glibc would map anew
def test_freed_memory_is_used_again(size: int, count: int) -> None:
    """In a process of its own, as it stays for good: once the heap has settled, no new pages are asked for."""
    script = (
        "import resource, torch\nfrom veneer.ops.scratch import keep_freed_memory\nassert keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        f"def round():\n    kept = [torch.ones({size}) for _ in range({count})]\n"
        "for _ in range(24):\n    before = faults(); round(); last = faults() - before\nprint(last)"
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
    ours = four_bit.quantise(w, NF4, double=double)
    assert torch.equal(ours.packed, theirs.view(-1))
    if isinstance(ours.absmax, DoubleQuantised):
        # Theirs is now and then one step off the nearest code; ours never is.
        steps = (ours.absmax.codes.int() - state.absmax.int()).abs()
        assert int(steps.max()) <= 1 and float((steps > 0).float().mean()) < 0.01
        torch.testing.assert_close(ours.absmax.absmax, state.state2.absmax, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.absmax.offset, state.offset, rtol=1e-6, atol=0)
        torch.testing.assert_close(four_bit.dynamic_code(), state.state2.code, rtol=0, atol=0)
    else:
        assert torch.equal(ours.absmax, state.absmax)
    if shape[1] % 64 == 0:  # their CPU kernel restarts blocks at each row, which differs from their own bytes otherwise
        theirs_back = functional.dequantize_4bit(theirs, state).float()
        torch.testing.assert_close(back(ours, dtype).float(), theirs_back, rtol=2e-2 if double else 8e-3, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(64, 96), (576, 192), (33, 70)])
def test_fp4_codes_equal_bitsandbytes(shape: tuple[int, int]) -> None:
    """Byte for byte up to two things: they have two codes for zero, and their table on the CPU is rounded to four digits."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = gaussian(*shape)
    theirs, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=False, quant_type="fp4")
    ours = four_bit.quantise(w, FP4)
    torch.testing.assert_close(FP4.values, state.code.abs() * FP4.values.sign(), rtol=1e-2, atol=0)
    found, wanted = (torch.stack([p >> 4, p & 15], dim=1).flatten() for p in (ours.packed, theirs.view(-1)))
    wanted = torch.where(wanted == 8, 0, wanted)
    assert float((found != wanted).float().mean()) < 2e-3
    differs = found != wanted
    near = (FP4.values[found.int()] - FP4.values[wanted.int()]).abs()[differs]
    assert bool((near < 0.34).all()), "a neighbour at most"
    assert isinstance(ours.absmax, Tensor) and torch.equal(ours.absmax, state.absmax)
    torch.testing.assert_close(
        back(ours)[0], functional.dequantize_4bit(ours.packed.view(-1, 1), state).float()[0], rtol=1e-2, atol=1e-4
    )


@pytest.mark.parity
def test_int8_equals_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = gaussian(64, 96).half()
    codes, absmax, _ = functional.int8_vectorwise_quant(w.clone())
    ours = int8.quantise(w)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.absmax, absmax)
