"""quantize_4bit, dequantize_4bit: bitsandbytes' bytes, equal bits everywhere, accuracy, arguments."""

from __future__ import annotations

import ctypes
import inspect
import math
import mmap
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes.functional as F
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import peftkern
from peftkern import (
    QuantizedWeight,
    dequantize_4bit,
    explain,
    quantize_4bit,
    reference,
    use_backend,
)
from peftkern.backends import cpu
from peftkern.dispatch import find
from peftkern.formats import BLOCKSIZES, CODES, DYNAMIC_CODE, code_table, double_quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANT_TYPES = sorted(CODES)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same_bits(a: QuantizedWeight, b: QuantizedWeight) -> None:
    for one, other in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        assert one.shape == other.shape
        assert torch.equal(bits(one.cpu()), bits(other.cpu()))


def here(tensor: Tensor) -> Tensor:
    """On the device of the backend under test."""
    return tensor.to(torch.get_default_device())


def theirs(dense: Tensor, quant_type: str, blocksize: int, nested: bool = False) -> QuantizedWeight:
    """What bitsandbytes makes of it on the CPU, whichever device the test is for."""
    packed, state = F.quantize_4bit(
        dense.cpu(), quant_type=quant_type, blocksize=blocksize, compress_statistics=nested
    )
    return QuantizedWeight.from_bitsandbytes(packed, state)


def nibbles(weight: QuantizedWeight) -> list[int]:
    found: list[int] = torch.stack((weight.packed >> 4, weight.packed & 15), 1).flatten().tolist()
    return found


def ties(quant_type: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every threshold with its neighbours on both sides, in a block whose absmax is 1."""
    values = code_table(quant_type).sort().values
    thresholds = (values[:-1] + values[1:]) / 2
    near = [thresholds, thresholds.nextafter(torch.tensor(9.0)), thresholds.nextafter(torch.tensor(-9.0))]
    return torch.cat([torch.ones(1), *near, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 5e-39, -1.0])]).to(dtype)


# ---- the bytes


@settings(max_examples=60)
@given(
    rows=st.integers(0, 70),
    columns=st.integers(1, 150),
    quant_type=st.sampled_from(QUANT_TYPES),
    blocksize=st.sampled_from(BLOCKSIZES),
    dtype=st.sampled_from(DTYPES),
    nested=st.booleans(),
    kind=st.sampled_from(["normal", "grid", "sparse", "huge", "tiny", "ties"]),
    seed=st.integers(0, 2**32),
)
def test_bytes_are_those_of_bitsandbytes(
    rows: int,
    columns: int,
    quant_type: str,
    blocksize: int,
    dtype: torch.dtype,
    nested: bool,
    kind: str,
    seed: int,
    isa: str,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator)
    if kind == "grid":  # many exact ties and equal quotients
        dense = (dense * 6).round()
    elif kind == "sparse":  # blocks of zeros
        dense = dense * (torch.rand(rows, columns, generator=generator) < 0.02)
    elif kind == "huge":
        dense = dense * (1e4 if dtype == torch.float16 else 1e38)
    elif kind == "tiny":
        dense = dense * (1e-6 if dtype == torch.float16 else 1e-38)
    elif kind == "ties":
        values = ties(quant_type)
        dense = values[torch.randint(len(values), (rows, columns), generator=generator)]
    dense = dense.to(dtype)
    if not dense.isfinite().all():
        dense = dense.nan_to_num(1.0, 1.0, 1.0)
    nested = nested and rows > 0  # bitsandbytes' offset of no blocks is NaN, ours 0
    weight = quantize_4bit(dense, quant_type, blocksize, nested)
    assert_same_bits(weight, theirs(dense, quant_type, blocksize, nested))
    assert (weight.shape, weight.dtype, weight.blocksize) == ((rows, columns), dtype, blocksize)


@cache
def at_size(dtype: torch.dtype) -> tuple[Tensor, dict[tuple[str, int], QuantizedWeight]]:
    dense = torch.randn(129, 515, generator=torch.Generator().manual_seed(0), device="cpu").to(dtype)
    settings = [(quant_type, blocksize) for quant_type in QUANT_TYPES for blocksize in BLOCKSIZES]
    return dense, {setting: theirs(dense, *setting) for setting in settings}


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_at_size(dtype: torch.dtype, backend: str) -> None:
    """Every setting on an odd count of weights: blocks straddle rows, the last is short."""
    dense, expected = at_size(dtype)
    for (quant_type, blocksize), weight in expected.items():
        assert_same_bits(quantize_4bit(here(dense), quant_type, blocksize), weight)


@cache
def every_number(dtype: torch.dtype, quant_type: str) -> tuple[Tensor, QuantizedWeight]:
    """All numbers up to ±absmax, for absmax of four mantissas, shuffled into blocks."""
    with torch.device("cpu"):
        if dtype == torch.float32:
            source = ties(quant_type)[:, None] * torch.tensor([1.0, 3.0, 0.7, 1e-3, 1e30])
        else:
            every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
            source = torch.cat([every[every.abs() <= m] for m in (1.0, 1.5, 1.75, 1.1640625)])
            source = source[torch.randperm(len(source), generator=torch.Generator().manual_seed(1))]
    dense = source.flatten()[None].to(dtype)
    return dense, theirs(dense, quant_type, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bytes_of_every_number(quant_type: str, dtype: torch.dtype, backend: str) -> None:
    dense, expected = every_number(dtype, quant_type)
    assert_same_bits(quantize_4bit(here(dense), quant_type, 64), expected)


def test_nested_bytes_at_size(one_thread: None) -> None:
    """Where torch splits a sum over threads, bitsandbytes' offset depends on their number, ours not."""
    dense = torch.randn(1500, 2048, generator=torch.Generator().manual_seed(3), dtype=torch.bfloat16)
    expected = theirs(dense, "nf4", 64, nested=True)
    assert expected.absmax.numel() > 32768
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(quantize_4bit(dense, "nf4", 64, double_quant=True), expected)


def test_nested_bytes_do_not_depend_on_how_a_device_divides() -> None:
    """torch's CUDA kernels take x / 65535 as x · (1 / 65535), an ulp apart for 191 of the 65536 bins."""
    code = torch.tensor(DYNAMIC_CODE)
    midpoints = (code[:-1] + code[1:]) * 0.5
    twice = 2.0 * torch.arange(65536.0)
    divided, multiplied = twice / 65535.0 - 1.0, twice * torch.tensor(65535.0).reciprocal() - 1.0
    assert not torch.equal(divided, multiplied)
    assert torch.equal(torch.bucketize(divided, midpoints), torch.bucketize(multiplied, midpoints))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nested_bytes_do_not_depend_on_the_device() -> None:
    for blocks in (1, 255, 300, 40000):
        absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)) + 2.0
        codes, nested = double_quantize(absmax)
        there, other = double_quantize(absmax.cuda())
        assert torch.equal(there.cpu(), codes)
        assert torch.equal(bits(other.absmax.cpu()), bits(nested.absmax))
        assert torch.equal(bits(other.offset.cpu()), bits(nested.offset))


def test_nested_statistics_of_equal_blocks() -> None:
    """absmax - mean is zero in every group, or in one of them."""
    for absmax in (torch.ones(3), torch.full((600,), 0.1), torch.cat([torch.ones(256), torch.arange(300.0)])):
        centred = absmax - absmax.mean()
        codes, state = F.quantize_blockwise(centred, blocksize=256)
        ours, nested = double_quantize(absmax)
        assert torch.equal(ours, codes)
        assert torch.equal(bits(nested.absmax), bits(state.absmax))
        assert torch.equal(nested.offset, absmax.mean())


def folded(dtype: torch.dtype, head: int, tail: int) -> Tensor:
    """[head + tail] of dtype whose head is one 64 MiB piece of memory, mapped over and over."""
    size, piece = dtype.itemsize, 1 << 26
    assert head * size % piece == 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    shared, fixed = mmap.MAP_SHARED, 0x10
    descriptor = os.memfd_create("folded")
    os.ftruncate(descriptor, 2 * piece)
    assert tail * size <= piece
    start = libc.mmap(None, head * size + piece, mmap.PROT_READ | mmap.PROT_WRITE, shared, descriptor, 0)
    for offset in range(0, head * size + piece, piece):
        place = piece if offset == head * size else 0
        assert start + offset == libc.mmap(
            start + offset, piece, mmap.PROT_READ | mmap.PROT_WRITE, shared | fixed, descriptor, place
        )
    os.close(descriptor)  # the mapping lives on: address space alone, until the process ends
    raw = (ctypes.c_uint8 * ((head + tail) * size)).from_address(start)
    return torch.frombuffer(raw, dtype=dtype)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memfd_create (Linux)")
def test_beyond_2_to_the_32_weights() -> None:
    """An index that wraps at 31 or 32 bits would miss the tail. The head is 2^32 zeros, folded."""
    if cpu.missing() is not None:
        pytest.skip(f"minutes in plain PyTorch: {cpu.missing()}")
    head, tail = 1 << 32, 5 * 1024
    end = torch.randn(5, 1024, dtype=torch.bfloat16)
    dense, packed = folded(torch.bfloat16, head, tail), folded(torch.uint8, head // 2, tail // 2)
    dense[head:] = end.view(-1)
    absmax = torch.full((-(-(head + tail) // 4096),), math.nan)
    find("quantize", dense.device, dense.dtype)(dense, packed, absmax, "nf4", 4096)
    expected = quantize_4bit(end, "nf4", 4096)
    assert torch.equal(packed[head // 2 :], expected.packed)
    assert torch.equal(absmax[head // 4096 :], expected.absmax)
    assert torch.count_nonzero(absmax[: head // 4096]) == 0
    dense[head:] = 0
    args = (packed, absmax, None, "nf4", 4096, (head + tail) // 1024, 1024)
    find("dequantize", dense.device, dense.dtype)(dense.view(-1, 1024), args)
    assert torch.equal(dense[head:].view(5, 1024), dequantize_4bit(expected))
    assert torch.count_nonzero(dense[: 1 << 20]) == 0


def test_thread_count_does_not_change_the_bytes(one_thread: None, isa: str) -> None:
    dense = torch.randn(333, 1025, dtype=torch.bfloat16)
    expected = quantize_4bit(dense, "fp4", 32)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_same_bits(quantize_4bit(dense, "fp4", 32), expected)
        assert torch.equal(bits(dequantize_4bit(expected)), bits(reference.dequantize_4bit(expected)))


# ---- the rule where bitsandbytes' backends disagree, stated once more, independent of it


@pytest.mark.parametrize(
    ("quant_type", "zero", "nan", "up", "down"), [("nf4", 7, 15, 7, 7), ("fp4", 0, 3, 8, 0)]
)
def test_zeros_ties_nan_and_inf(quant_type: str, zero: int, nan: int, up: int, down: int, isa: str) -> None:
    dense = torch.zeros(6, 32)
    dense[1, :4] = torch.tensor([1.0, 1e-3, -1e-3, -0.0])
    dense[2, :3] = torch.tensor([math.nan, 5.0, -5.0])
    dense[3, :4] = torch.tensor([math.inf, -math.inf, 5.0, 0.0])
    dense[4] = torch.linspace(-1, 1, 32)
    for source in (dense, dense.bfloat16(), dense.half()):
        weight = quantize_4bit(source, quant_type, 32)
        codes = [nibbles(weight)[32 * row : 32 * row + 32] for row in range(6)]
        assert codes[0] == [zero] * 32
        assert codes[1][:5] == [CODES[quant_type].index(1.0), up, down, zero, zero]
        assert codes[2] == [nan] * 32
        assert codes[3][:5] == [nan, nan, zero, zero, zero]
        assert weight.absmax.tolist()[:2] == [0.0, 1.0]
        assert math.isnan(weight.absmax[2])
        assert weight.absmax[3] == math.inf
        # NaN and Inf stay in their block
        rest = [0, 1, 4, 5]
        alone = quantize_4bit(source[rest].contiguous(), quant_type, 32)
        assert torch.equal(dequantize_4bit(weight)[rest], dequantize_4bit(alone))
        assert dequantize_4bit(weight)[2].isnan().all()
        assert dequantize_4bit(weight)[3, :2].tolist() == [math.inf, math.inf]
        assert dequantize_4bit(weight)[3, 2:].isnan().all()
    # the short last block stores 1e-38 for zeros and divides instead of multiplying by the reciprocal
    tail = quantize_4bit(torch.zeros(3, 5), quant_type)
    assert nibbles(tail) == [zero] * 16
    assert tail.absmax.tolist() == torch.tensor([1e-38]).tolist()
    assert dequantize_4bit(tail).abs().max() == 0
    # an odd number of weights: the last nibble is that of 0
    assert nibbles(quantize_4bit(torch.ones(1, 3), quant_type))[3] == zero


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_double_quant_refuses_what_would_spread(value: float) -> None:
    dense = torch.ones(8, 64)
    dense[3, 3] = value
    for op in (quantize_4bit, reference.quantize_4bit):
        with pytest.raises(
            ValueError, match=r"weight: expected finite values .* got NaN or Inf in 1 of 8 blocks"
        ):
            op(dense, double_quant=True)


def test_ties_go_to_the_lower_value(isa: str) -> None:
    for quant_type in QUANT_TYPES:
        order = sorted(range(16), key=lambda code: (CODES[quant_type][code], code))
        values = code_table(quant_type).sort().values
        thresholds = (values[:-1] + values[1:]) / 2
        dense = torch.cat(
            [torch.ones(1), thresholds, thresholds.nextafter(torch.tensor(9.0)), torch.zeros(1)]
        )
        codes = nibbles(quantize_4bit(dense[None], quant_type, 32))
        assert codes[1:16] == order[:15], quant_type
        assert codes[16:31] == order[1:], quant_type


# ---- dequantize


@settings(max_examples=60)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 150),
    quant_type=st.sampled_from(QUANT_TYPES),
    blocksize=st.sampled_from(BLOCKSIZES),
    dtype=st.sampled_from(DTYPES),
    nested=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_dequantize_is_bit_identical_to_the_reference(
    rows: int,
    columns: int,
    quant_type: str,
    blocksize: int,
    dtype: torch.dtype,
    nested: bool,
    seed: int,
    isa: str,
) -> None:
    """Any bytes and any scales are valid, not those of a quantizer alone."""
    generator = torch.Generator().manual_seed(seed)
    made = quantize_4bit(torch.randn(rows, columns, generator=generator), quant_type, blocksize, nested)
    made.packed.random_(generator=generator)
    if nested:
        made.absmax.random_(generator=generator)
    weight = made
    for source in (dequantize_4bit(weight, dtype), dequantize_4bit(weight)):
        assert source.shape == (rows, columns)
        assert source.is_contiguous()
        assert torch.equal(bits(source), bits(reference.dequantize_4bit(weight, source.dtype)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_dequantize_is_that_of_bitsandbytes(quant_type: str, nested: bool, isa: str) -> None:
    """Its library, where that is right: K a multiple of the blocksize."""
    for shape, blocksize in (((64, 128), 64), ((1, 512), 32), ((48, 256), 256)):
        for dtype in DTYPES:
            weight = quantize_4bit(torch.randn(shape).to(dtype), quant_type, blocksize, nested)
            expected = F.dequantize_4bit(*weight.to_bitsandbytes())
            assert torch.equal(bits(expected), bits(dequantize_4bit(weight)))


@pytest.mark.parametrize(
    ("rows", "columns", "blocksize"), [(300, 400, 64), (33, 71, 64), (9, 80, 128), (4, 2064, 2048)]
)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_dequantize_where_bitsandbytes_library_is_wrong(
    quant_type: str, rows: int, columns: int, blocksize: int, isa: str
) -> None:
    """K a multiple of 16 but not of the blocksize (with AVX-512), or odd: its own formula in PyTorch."""
    weight = quantize_4bit(torch.randn(rows, columns), quant_type, blocksize)
    code = F.get_4bit_type(quant_type, device="cpu")
    formula = inspect.unwrap(_dequantize_4bit_compute)
    for dtype in DTYPES:
        right = formula(weight.packed, weight.absmax, code, blocksize, (rows, columns), dtype)
        assert torch.equal(bits(dequantize_4bit(weight, dtype)), bits(right))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_requantizing_what_was_decoded_changes_nothing(quant_type: str, isa: str) -> None:
    """In fp32 a decoded block has its absmax and its codes exactly, but for FP4's two zeros."""
    weight = quantize_4bit(torch.randn(61, 130), quant_type, 64)
    decoded = dequantize_4bit(weight)
    again = quantize_4bit(decoded, quant_type, 64)
    assert torch.equal(again.absmax, weight.absmax)
    assert torch.equal(dequantize_4bit(again), decoded)


# Mean absolute and relative error on 1024² standard normals, and the standard deviations σ of those means, as
# bitsandbytes' own tests have them: the limits are the mean ± 7 σ, one run in 10^11. Where no σ is known
# it is that of blocksize 64 times √(blocksize / 64): it comes from the scales, of which there are fewer.
ACCURACY = [
    ("nf4", 32, 0.067746, 0.189726),
    ("nf4", 64, 0.072798, 0.203339),
    ("nf4", 128, 0.076831, 0.215237),
    ("nf4", 256, 0.080337, 0.226105),
    ("nf4", 1024, 0.086610, 0.245370),
    ("nf4", 4096, 0.092547, 0.262473),
    ("fp4", 64, 0.096543, 0.260125),
]
SIGMA = {"nf4": (0.000074, 0.000340), "fp4": (0.000111, 0.000379)}


@pytest.mark.parametrize(("quant_type", "blocksize", "absolute", "relative"), ACCURACY)
def test_accuracy(quant_type: str, blocksize: int, absolute: float, relative: float) -> None:
    dense = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(7))
    error = (dequantize_4bit(quantize_4bit(dense, quant_type, blocksize)) - dense).abs()
    spread = 7.0 * max(1.0, math.sqrt(blocksize / 64))
    for found, mean, sigma in (
        (error.mean().item(), absolute, SIGMA[quant_type][0]),
        ((error / (dense.abs() + 1e-8)).mean().item(), relative, SIGMA[quant_type][1]),
    ):
        assert mean - spread * sigma <= found <= mean + spread * sigma


def test_double_quantization_costs_little_accuracy() -> None:
    """A scale moves by at most half the dynamic map's widest gap, .0071, of its group's max |d|."""
    dense = torch.randn(512, 1024, generator=torch.Generator().manual_seed(8))
    plain, nested = quantize_4bit(dense), quantize_4bit(dense, double_quant=True)
    assert torch.equal(plain.packed, nested.packed)
    assert nested.nested is not None
    widest = 0.0071 * nested.nested.absmax.repeat_interleave(256)
    assert ((reference.absmax_values(nested) - plain.absmax).abs() <= widest + 1e-6).all()
    error = (dequantize_4bit(nested) - dense).abs().mean()
    assert error <= 1.005 * (dequantize_4bit(plain) - dense).abs().mean()


# ---- views, traced calls, arguments


def test_strides_do_not_matter_and_the_input_stays(isa: str) -> None:
    base = torch.randn(70, 90, dtype=torch.bfloat16)
    for view in (base.t(), base[::2, 1::3], base[:, 5:64], base[3:4].expand(20, 90), base[:, :0]):
        before = view.clone()
        assert_same_bits(quantize_4bit(view, "fp4", 32), quantize_4bit(before.contiguous(), "fp4", 32))
        assert torch.equal(view, before)
    weight = quantize_4bit(torch.nn.Parameter(base.float()))
    assert not weight.absmax.requires_grad
    assert not dequantize_4bit(weight).requires_grad


def test_backends_agree(isa: str) -> None:
    dense = torch.randn(37, 129)
    found = {}
    for name in ("cpu", "reference"):
        with use_backend(name):
            assert explain("quantize_4bit", dense).backend == name
            found[name] = quantize_4bit(dense, "fp4", 64, True)
            assert explain(dequantize_4bit, found[name]).backend == name
            assert torch.equal(dequantize_4bit(found[name]), reference.dequantize_4bit(found[name]))
    assert_same_bits(found["cpu"], found["reference"])


@pytest.mark.parametrize("nested", [False, True])
def test_compiled(nested: bool) -> None:
    def both(dense: Tensor) -> Tensor:
        return dequantize_4bit(quantize_4bit(dense, "nf4", 32, nested), torch.bfloat16)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for shape in ((24, 33), (7, 65)):
        dense = torch.randn(shape)
        assert torch.equal(bits(compiled(dense)), bits(both(dense)))


def test_library_ops() -> None:
    dense = torch.randn(19, 33)
    weight = quantize_4bit(dense, "nf4", 32, True)
    assert weight.nested is not None
    for source in (dense, dense.t(), dense[:, ::2]):
        torch.library.opcheck(torch.ops.peftkern.quantize_4bit.default, (source, "nf4", 32))
    inner = weight.nested
    tensors = (weight.packed, weight.absmax, inner.absmax, inner.code, inner.offset)
    torch.library.opcheck(
        torch.ops.peftkern.dequantize_4bit.default, (*tensors, "nf4", 32, 256, 19, 33, torch.bfloat16)
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "weight: expected a tensor, got list"),
        ((torch.zeros(4, 4, dtype=torch.int32),), TypeError, "weight: expected dtype .*, got int32"),
        ((torch.zeros(4, 4, dtype=torch.float64),), TypeError, "weight: expected dtype .*, got float64"),
        ((torch.zeros(16),), ValueError, r"weight: expected shape \[N, K\], got shape \[16\]"),
        ((torch.zeros(2, 4, 4),), ValueError, r"weight: expected shape \[N, K\], got shape \[2, 4, 4\]"),
        ((torch.zeros(4, 4).to_sparse(),), TypeError, "weight: expected a strided tensor"),
        (
            (torch.zeros(4, 4), "int4"),
            ValueError,
            r"quant_type: expected one of \('fp4', 'nf4'\)|quant_type: expected",
        ),
        ((torch.zeros(4, 4), None), ValueError, "quant_type: expected one of"),
        ((torch.zeros(4, 4), "nf4", 48), ValueError, "blocksize: expected one of .*, got 48"),
        ((torch.zeros(4, 4), "nf4", -64), ValueError, "blocksize: expected one of .*, got -64"),
        ((torch.zeros(4, 4), "nf4", 64.0), TypeError, "blocksize: expected an integer, got 64.0"),
        ((torch.zeros(4, 4), "nf4", True), TypeError, "blocksize: expected an integer, got True"),
        ((torch.zeros(4, 4), "nf4", 64, 1), TypeError, "double_quant: expected True or False, got 1"),
    ],
)
def test_bad_arguments_of_quantize(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_4bit(*arguments)
    with pytest.raises(error, match=message):
        explain("quantize_4bit", *arguments)


def test_bad_arguments_of_dequantize() -> None:
    weight = quantize_4bit(torch.randn(4, 4))
    with pytest.raises(TypeError, match="weight: expected a QuantizedWeight, got Tensor"):
        dequantize_4bit(torch.zeros(4, 4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16 or float16, got float64"):
        dequantize_4bit(weight, torch.float64)
    with pytest.raises(TypeError, match=r"dtype: expected a torch.dtype or None, got str"):
        dequantize_4bit(weight, "bfloat16")  # type: ignore[arg-type]


def test_meta_device_computes_shapes() -> None:
    weight = quantize_4bit(torch.empty(3, 5, device="meta", dtype=torch.bfloat16))
    assert weight.device.type == "meta"
    assert (weight.packed.shape, weight.absmax.shape) == ((8,), (1,))
    assert dequantize_4bit(weight).shape == (3, 5)


def asks_for_huge_pages(tensor: Tensor) -> bool:
    """Whether the middle of a tensor lies in memory that was advised so: "hg" in its VmFlags."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError as error:
        pytest.skip(f"no /proc/self/smaps: {error}")
    if not any(line.startswith("VmFlags:") for line in lines):
        pytest.skip("this kernel's smaps has no VmFlags")
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in lines:
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the tensor lies in no mapping")


@pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
def test_large_results_ask_for_huge_pages() -> None:
    with peftkern.use_backend("cpu"):
        assert asks_for_huge_pages(peftkern.quantize_4bit(torch.randn(4096, 4096)).packed)


@pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
def test_a_loaded_weight_gets_huge_pages_by_a_copy() -> None:
    """A mapping of its own for what a loader leaves, as one for a tensor may be a recycled, advised one."""
    shape = (4096, 4096)
    weight = peftkern.quantize_4bit(torch.randn(shape), double_quant=True)
    raw = mmap.mmap(-1, weight.packed.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw.write(weight.packed.numpy().tobytes())
    state = weight.state_dict("weight") | {"weight": torch.frombuffer(raw, dtype=torch.uint8)}
    loaded = QuantizedWeight.from_state_dict(state, "weight")
    assert not asks_for_huge_pages(loaded.packed)
    made = loaded.to("cpu", copy=True)
    layer = peftkern.nn.LoRALinear(*shape, weight=peftkern.quantize_4bit(torch.zeros(shape)))
    layer.load_state_dict(state, strict=False)
    for copied in (made, layer.weight):
        assert isinstance(copied, QuantizedWeight)
        assert asks_for_huge_pages(copied.packed)
        for one, other in zip(pytree.tree_leaves(copied), pytree.tree_leaves(weight), strict=True):
            assert torch.equal(one, other)
    layer.load_state_dict(state, strict=False, assign=True)
    assert isinstance(layer.weight, QuantizedWeight)
    assert layer.weight.packed.data_ptr() == loaded.packed.data_ptr()
