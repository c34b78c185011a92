"""The triton backend's primitives, called directly in Triton's interpreter: every way through the kernels.

The suites of the ops run on this backend too (the `backend` fixture); their shapes seldom reach the tables'
tiles, split sums or the way over a dequantized W.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import bounds
import pytest
import torch
from bounds import U32, Approx
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import peftkern
from peftkern import QuantizedWeight, reference
from peftkern.backends import Call, triton

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


@pytest.fixture
def interpreted() -> Iterator[None]:
    """The backend on CPU tensors, forced: bounds.compute_dtype asks who runs."""
    if not triton.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1, set before the start (make test-triton)")
    with peftkern.use_backend("triton"):
        yield


def expected(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    transposed: bool,
    dtype: torch.dtype,
    alpha: float = 1.0,
    t: Tensor | None = None,
    u: Tensor | None = None,
    bias: Tensor | None = None,
    spread: tuple[Tensor, bool, int] | None = None,
) -> Approx:
    compute = bounds.compute_dtype(x.dtype)
    W = bounds.operand(weight, compute)
    T, U = (
        (None, None) if t is None or u is None else (bounds.operand(t, compute), bounds.operand(u, compute))
    )
    b = None if bias is None else bounds.exact(bias)
    # unrounded: the spread addend comes before the one rounding
    core = bounds.matmul(
        bounds.operand(x, compute), W.t() if transposed else W, torch.float64, alpha, T, U, b
    )
    if spread is None:
        return core.rounded(dtype)
    values, grouped, length = spread
    outputs = core.value.shape[1]
    added = reference.spread_out(values.double(), outputs, grouped, length)
    # each sum of up to length / outputs + 1 numbers, and the one onto the product, in fp32
    size = (
        reference.spread_out(values.double().abs(), outputs, grouped, length) + core.value.abs() + core.error
    )
    slack = (length / outputs + 3) * U32 * size
    total = Approx(core.value + added, core.error + slack, (core.typical.square() + slack.square()).sqrt())
    return total.rounded(dtype)


def quantized(
    N: int, K: int, quant_type: str = "nf4", blocksize: int = 64, nested: bool = False
) -> QuantizedWeight:
    with peftkern.use_backend("reference"):
        return peftkern.quantize_4bit(torch.randn(N, K), quant_type, blocksize, nested)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("M", "N", "K", "quant_type", "blocksize", "nested"),
    [
        (5, 128, 192, "nf4", 64, True),  # the smallest tile; columns past the end of the last one
        (20, 64, 128, "fp4", 128, False),  # blocks that begin inside a row of the other
        (50, 192, 64, "nf4", 4096, False),  # one block holds many rows
        (70, 64, 320, "fp4", 64, True),  # the largest tile
        (3, 96, 160, "nf4", 32, True),  # blocks of half a step
    ],
)
def test_words(
    M: int,
    N: int,
    K: int,
    quant_type: str,
    blocksize: int,
    nested: bool,
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    """W read in words, with every addend, at the tiles that the table gives."""
    from peftkern.triton_kernels.matmul import words_problem

    weight = quantized(N, K, quant_type, blocksize, nested)
    inner, outputs = (N, K) if transposed else (K, N)
    x, out = torch.randn(M, inner).to(dtype), torch.full((M, outputs), torch.nan, dtype=dtype)
    assert words_problem(x.dtype, weight.kernel_args, transposed) is None
    t, u, bias = torch.randn(M, 20).to(dtype), torch.randn(outputs, 20), torch.randn(outputs)
    triton.matmul(out, x, weight.kernel_args, transposed, 0.5, t, u, bias)
    bounds.check("out", out, expected(x, weight, transposed, dtype, 0.5, t, u, bias))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_any_address(dtype: torch.dtype, transposed: bool) -> None:
    """W at an odd address, with an odd row length: each weight reads its own byte."""
    weight = quantized(33, 75, blocksize=32, nested=True)
    packed = torch.empty(weight.packed.numel() + 3, dtype=torch.uint8)[3:].copy_(weight.packed)
    moved = (packed, *weight.kernel_args[1:])
    inner, outputs = weight.shape if transposed else weight.shape[::-1]
    x, out = torch.randn(6, inner).to(dtype), torch.full((6, outputs), torch.nan, dtype=dtype)
    triton.matmul(out, x, moved, transposed)
    bounds.check("out", out, expected(x, weight, transposed, dtype))


SPREADS = [(False, 0), (False, 5), (False, 64), (False, 70), (False, 500), (True, 0)]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("grouped", "length"), SPREADS)
@pytest.mark.parametrize("P", [1, 7, 64, 100])
def test_spread(grouped: bool, length: int, P: int) -> None:
    """The addend of few columns that many outputs share: beside a product, split or not, and alone."""
    bias = torch.randn(64)
    for M, K in ((33, 64), (3, 1024)):  # the second is split
        weight, x = quantized(64, K), torch.randn(M, K).bfloat16()
        spread = (torch.randn(M, 2 * P)[:, :P], grouped, length)
        out = torch.full((M, 64), torch.nan, dtype=torch.bfloat16)
        triton.matmul(out, x, weight.kernel_args, False, 0.5, None, None, bias, spread)
        bounds.check("out", out, expected(x, weight, False, out.dtype, 0.5, bias=bias, spread=spread))
        triton.matmul(out, x[:, :0], weight.packed.new_empty(64, 0, dtype=x.dtype), spread=spread)
        alone = reference.spread_out(spread[0].double(), 64, grouped, length)
        size = reference.spread_out(spread[0].double().abs(), 64, grouped, length)
        slack = (length / 64 + 1) * U32 * size
        bounds.check("alone", out, Approx(alone, slack, slack).rounded(out.dtype))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_split_sums(dtype: torch.dtype, transposed: bool) -> None:
    """A long sum of few outputs is cut into parts that fill the machine; a machine of one tile is full."""
    from peftkern.triton_kernels import launch, matmul

    weight = quantized(1024, 64) if transposed else quantized(64, 1024)
    x, bias = torch.randn(2, 1024).to(dtype), torch.randn(64)
    t, u = torch.randn(2, 3).to(dtype), torch.randn(64, 3)  # in one part alone
    for processors, split in ((132, True), (1, False)):
        out = torch.full((2, 64), torch.nan, dtype=dtype)
        machine = launch.Machine(90, processors)
        launches = matmul.plan(machine, out, x, weight.kernel_args, transposed, 0.5, t, u, bias, None)
        assert (launches[-1].kernel is matmul.finish_split) == split
        for each in launches:
            each.run()
        bounds.check("out", out, expected(x, weight, transposed, dtype, 0.5, t, u, bias))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("addend", ["lora", "spread", "bias", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_for_a_vendors_product(
    dtype: torch.dtype, addend: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the crossover on: W dequantized into a scratch buffer, the product added onto the addend."""
    from peftkern.triton_kernels import choices

    monkeypatch.setattr(choices, "CROSSOVER", {80: 8, 90: 8})
    monkeypatch.setattr(choices, "CROSSOVER_FLOAT32", 8)
    weight = quantized(48, 96, nested=True)
    inner, outputs = (48, 96) if transposed else (96, 48)
    x, out = torch.randn(9, inner).to(dtype), torch.full((9, outputs), torch.nan, dtype=dtype)
    t, u = (torch.randn(9, 4).to(dtype), torch.randn(outputs, 4)) if addend == "lora" else (None, None)
    bias = None if addend == "none" else torch.randn(outputs)
    spread = (torch.randn(9, 7), False, outputs) if addend == "spread" else None
    triton.matmul(out, x, weight.kernel_args, transposed, 1.0, t, u, bias, spread)
    # the addend is rounded to x's dtype before the product is added to it
    bound = expected(x, weight, transposed, dtype, 1.0, t, u, bias, spread)
    only = expected(x[:, :0], torch.zeros(outputs, 0), False, dtype, 1.0, t, u, bias, spread)
    error = bound.error + only.error + bounds.UNIT[dtype] * only.value.abs()
    typical = (bound.typical.square() + (bounds.UNIT[dtype] * only.value).square()).sqrt()
    bounds.check("out", out, Approx(bound.value, error, typical))


def test_fp32_products_are_as_precise_as_torchs() -> None:
    """However a caller asked for TF32: by the old switch or by the new one, after which the old raises."""
    pytest.importorskip("triton", reason="the kernels import triton")
    from peftkern.triton_kernels.matmul import precision

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        assert precision() == "ieee"
        matmul.allow_tf32 = True
        assert precision() == "tf32"
        matmul.allow_tf32 = False
        assert precision() == "ieee"
        matmul.fp32_precision = "tf32"
        assert precision() == "tf32"
    finally:
        matmul.fp32_precision = before


def test_plans_keep_numbers_and_no_tensors() -> None:
    """A plan of sizes that were seen takes its numbers from a bounded cache, and nothing of its tensors."""
    pytest.importorskip("triton", reason="plans come with the kernels, which import triton")
    from peftkern.triton_kernels import launch, matmul, output_grads

    machine = launch.Machine(90, 132)
    weight = quantized(64, 1024)

    def tensors(M: int) -> list[Tensor]:
        return [torch.randn(M, 64), torch.randn(M, 1024), torch.randn(M, 8), torch.randn(64, 8)]

    def plans(y: Tensor, x: Tensor, t: Tensor, u: Tensor) -> list[launch.Launch]:
        return [
            *matmul.plan(machine, y, x, weight.kernel_args, False, 1.0, t, u, None, None),
            *matmul.plan(machine, t, x, torch.randn(8, 1024), False, 1.0, None, None, None, None),
            *output_grads.plan(machine, t, u, None, y, u.clone(), t.clone(), 1.0),
        ]

    def numbers(launches: list[launch.Launch]) -> list[dict[str, object]]:
        return [
            {
                name: value.shape if isinstance(value, Tensor) else value
                for name, value in each.arguments.items()
            }
            for each in launches
        ]

    caches = (matmul._fixed, output_grads._fixed)
    assert all(cache.cache_info().maxsize for cache in caches)
    for cache in caches:
        cache.cache_clear()
    first, second, other = tensors(3), tensors(3), tensors(4)
    told = plans(*first)
    misses = [cache.cache_info().misses for cache in caches]
    again = plans(*second)
    assert [cache.cache_info().misses for cache in caches] == misses
    assert numbers(again) == numbers(told)
    assert again[0].arguments["x"] is second[1]
    assert numbers(plans(*other)) != numbers(told)
    gone = [weakref.ref(tensor) for tensor in first]
    del first, told
    assert not any(reference() for reference in gone)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("capability", "processors"), [(90, 132), (90, 1), (80, 6), (120, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "R"), [(300, 600, 16), (129, 257, 33)])
def test_output_grads_in_parts(
    M: int, N: int, R: int, dtype: torch.dtype, capability: int, processors: int
) -> None:
    """Sums cut into parts of rows and tiles of columns, or not, by either way of taking dY, and the same bits
    again: no atomics."""
    from peftkern.triton_kernels import launch, output_grads

    dY, B, T = torch.randn(M, N).to(dtype), torch.randn(N, R), torch.randn(M, R).to(dtype)
    compute = bounds.compute_dtype(dtype)
    D = bounds.operand(dY, compute)
    expected = (
        bounds.matmul(D, bounds.operand(B, compute).t(), dtype, 0.5),
        bounds.matmul(D.t(), bounds.operand(T, compute).t(), torch.float32),
        bounds.column_sums(dY, torch.float32),
    )
    before: list[Tensor] = []
    for _ in range(2):
        G = torch.full((M, R), torch.nan, dtype=dtype)
        dB, dbias = torch.full((N, R), torch.nan), torch.full((N,), torch.nan)
        machine = launch.Machine(capability, processors)
        launches = output_grads.plan(machine, G, dB, dbias, dY, B, T, 0.5)
        if M == 300 and dtype != torch.float32:
            columns, parts = {132: (5, 3), 1: (3, 1), 6: (5, 2), 2: (5, 1)}[processors]
            assert launches[0].grid == (columns, parts)
        for each in launches:
            each.run()
        for name, out, bound in zip(("G", "dB", "dbias"), (G, dB, dbias), expected, strict=True):
            bounds.check(name, out, bound)
        if before:
            assert all(torch.equal(a, b) for a, b in zip(before, (G, dB, dbias), strict=True))
        before = [G, dB, dbias]


def test_output_grads_parts_are_bounded() -> None:
    """The scratch of one pass beside dY, and the machine that it fills, at the sizes of models."""
    pytest.importorskip("triton", reason="the table of tiles comes with the kernels, which import triton")
    from peftkern.triton_kernels import choices
    from peftkern.triton_kernels.launch import Machine

    machine = Machine(90, 132)
    for M in (512, 2048, 8192):
        for N in (4096, 11008, 14336):
            for R in (8, 16, 32, 64):
                tile, rows, parts = choices.output_grads_tile(M, N, R, False, machine)
                columns = -(-N // tile.columns)
                assert rows % tile.rows == 0
                assert (parts - 1) * rows < M <= parts * rows
                written = 4 * R * (columns * M + parts * N) / (2 * M * N)
                # 2 R / columns and 2 R / rows of 16-bit dY; the last tile and part may be cut
                assert written <= 2.1 * R * (1 / tile.columns + 1 / choices.PART_ROWS)
                if R <= 32:
                    assert columns * parts >= 0.75 * machine.processors, (M, N, R)
                for full in (False, True):
                    same = choices.output_grads_tile(M, N, 1, full, machine)
                    assert same[1:] == (rows, parts), "parts depend on the rank"


# words at each tile of the table, a sum in parts, bytes; M, N, K
MASKED_SIZES = [(5, 128, 192), (50, 192, 64), (70, 64, 320), (2, 512, 64), (6, 33, 75), (1, 1, 1)]


def dropped(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """x with 0 where it is not kept, and with what must not be read there."""
    worse = x.clone()
    for start, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        worse[start::3] = torch.where(keep[start::3], x[start::3], value)
    return torch.where(keep, x, 0.0), worse


@pytest.fixture
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whether few elements, too, have the index of 64 bits that only very many need."""
    if not request.param:
        yield
        return
    matmul = pytest.importorskip("peftkern.triton_kernels.matmul")
    monkeypatch.setattr(matmul, "SHORT_INDICES", 0)
    matmul._fixed.cache_clear()
    yield
    matmul._fixed.cache_clear()


P_WIDE = [(0.0, False), (0.3, False), (0.3, True), (1.0, False)]


@pytest.mark.usefixtures("interpreted", "wide")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "wide"), P_WIDE, indirect=["wide"])
@pytest.mark.parametrize(
    ("M", "K", "R"), [(5, 64, 3), (70, 200, 16), (33, 130, 40), (3, 512, 20), (64, 80, 64), (1, 1, 1)]
)
def test_masked_where_it_is_loaded(M: int, K: int, R: int, p: float, dtype: torch.dtype) -> None:
    """A dropped x has the bits of a product of zeros in its place, either side, whatever was there."""
    seed = torch.tensor(-7 << 40)
    keep = reference.dropout_mask(seed, (M, K), p)
    for x in (torch.randn(M, K), torch.randn(M, 2 * K)[:, ::2], torch.randn(K, M).t()):
        x = x.to(dtype)
        clean, worse = dropped(x, keep)
        A, G = torch.randn(K, R).t(), torch.randn(M, R).to(dtype)
        T, dA = (torch.full((2, M, R), torch.nan, dtype=dtype), torch.full((2, R, K), torch.nan))
        triton.matmul(T[0], worse, A, False, 0.5, mask=("x", p, seed))
        triton.matmul(T[1], clean, A, False, 0.5)
        assert torch.equal(*T)
        triton.matmul(dA[0], G.t(), worse, True, 0.5, mask=("weight", p, seed))
        triton.matmul(dA[1], G.t(), clean, True, 0.5)
        assert torch.equal(*dA)


@pytest.mark.usefixtures("interpreted", "wide")
@pytest.mark.parametrize("way", ["4 bits", "dequantized"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "wide"), P_WIDE, indirect=["wide"])
@pytest.mark.parametrize(("M", "N", "K"), MASKED_SIZES)
def test_masked_addend(
    M: int, N: int, K: int, p: float, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dX has the bits of the one with the whole addend where that is kept, else of the one without, into any
    strides, and whatever the dropped addend is."""
    from peftkern.triton_kernels import choices

    monkeypatch.setattr(choices, "crossover", lambda *_: 0 if way == "dequantized" else choices.ANY)
    seed = torch.tensor(1 << 62)
    keep = reference.dropout_mask(seed, (M, K), p)
    weight = quantized(N, K).kernel_args
    dY, A, B = torch.randn(M, N).to(dtype), torch.randn(20, K), torch.randn(N, 20)
    A[0, K // 2] = torch.inf  # so is a column of G A

    def gradient(A: Tensor, dropout: tuple[float, Tensor]) -> Tensor:
        dx = torch.full((K, M), torch.nan, dtype=dtype).t()
        row = triton.BACKEND.rows["linear_grad"]
        row(dx, None, None, None, dY, None, weight, A, B, None, 0.5, dropout)
        return dx

    found = gradient(A, (p, seed))
    expected = torch.where(keep, gradient(A, (0.0, seed)), gradient(torch.zeros_like(A), (1.0, seed)))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)
    assert found[~keep].isfinite().all()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("rank", [4, 70])
@pytest.mark.parametrize("way", ["4 bits", "dequantized", "dense"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_layer(dtype: torch.dtype, way: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """linear and linear_grad with dropout, within their bounds, without a second tensor of x's size."""
    from peftkern.triton_kernels import choices, launch

    run = launch.Launch.run

    def unwatched(each: launch.Launch) -> None:  # the interpreter copies what it is given
        with _disable_current_modes():
            run(each)

    monkeypatch.setattr(launch.Launch, "run", unwatched)
    monkeypatch.setattr(choices, "crossover", lambda *_: 0 if way == "dequantized" else choices.ANY)
    M, N, K, p, seed = 300, 128, 192, 0.4, torch.tensor(3)
    keep = reference.dropout_mask(seed, (M, K), p)
    weight = torch.randn(N, K).to(dtype) if way == "dense" else quantized(N, K)
    args = weight if isinstance(weight, Tensor) else weight.kernel_args
    x, dY = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    A, B, bias = torch.randn(rank, K), torch.randn(N, rank), torch.randn(N)
    y, T, dx = torch.empty_like(dY), x.new_empty(M, rank), torch.empty_like(x)
    dA, dB, dbias = torch.empty_like(A), torch.empty_like(B), torch.empty_like(bias)
    alpha = 0.5 / (1.0 - p)
    with Fresh() as fresh:
        triton.BACKEND.rows["linear"](y, T, x, args, A, B, alpha, (p, seed), bias)
        grads = triton.BACKEND.rows["linear_grad"]
        grads(dx, dA, dB, dbias, dY, x, args, A, B, T, alpha, (p, seed))
    assert fresh.largest < x.nbytes
    if way == "dequantized":  # the addend is rounded before the vendor's product is added, as for a dense W
        weight = peftkern.dequantize_4bit(weight, dtype)
    expected = bounds.linear(x, weight, bias, dY, A, B, 0.5, p, keep)
    for name, out in {"y": y, "x": dx, "lora_A": dA, "lora_B": dB, "bias": dbias}.items():
        bounds.check(name, out, expected[name])


class Fresh(TorchDispatchMode):
    """The bytes of the largest tensor that torch makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("seed", [0, 42, -1, 1 << 40, -(1 << 63)])
@pytest.mark.parametrize("p", [2.0**-32, 0.3, 0.5, 0.9, 1.0 - 2.0**-32, 1.0])
def test_hash_of_any_element(p: float, seed: int) -> None:
    """The mask is reference.dropout_mask's, with 32 and with 64 bits of the index; beyond 2^32 elements it is
    that of the formula in unlimited integers."""
    from hashed import hashed

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    def kept(index: int) -> bool:
        k0 = mix((seed + mix(((seed >> 32) + 0x9E3779B9) % 2**32)) % 2**32)
        k1 = mix((k0 + (index >> 32) + 0x85EBCA6B) % 2**32)
        return mix((mix(index % 2**32 ^ k0) + k1) % 2**32) < threshold

    threshold = reference.keep_threshold(p)
    number = threshold - 2**32 if threshold >= 2**31 else threshold
    for first, columns, wide in (
        (0, 16, False),
        (0, 16, True),
        (2**28 - 2, 16, True),
        (2**40, 1000003, True),
    ):
        out = torch.full((4, 16), 2, dtype=torch.int8)
        hashed[(1,)](out, torch.tensor(seed), first, columns, number, WIDE=wide)
        assert out.tolist() == [[kept((first + m) * columns + k) for k in range(16)] for m in range(4)]
        if first == 0:
            assert torch.equal(out.bool(), reference.dropout_mask(seed, (4, 16), p))


def test_which_masks_take_wide_indices() -> None:
    """More than 2^32 elements of what is masked, and no more than those; p = 0 is no mask."""
    pytest.importorskip("triton", reason="plans come with the kernels, which import triton")
    from peftkern.triton_kernels import launch, matmul

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    machine, seed = launch.Machine(90, 132), empty(dtype=torch.int64)
    K, nothing = 1 << 16, (None, None, None, None)
    for M, wide in ((1 << 16, False), ((1 << 16) + 1, True)):
        x, T = empty(M, K), empty(M, 8)
        for threshold in (1 << 30, 1 << 31, (1 << 32) - 1):
            masked = [
                matmul.plan(machine, T, x, empty(8, K), False, 1.0, *nothing, mask=("x", threshold, seed)),
                matmul.plan(
                    machine, empty(8, K), T.t(), x, True, 1.0, *nothing, mask=("weight", threshold, seed)
                ),
                matmul.plan(
                    machine, x, T[:, :0], empty(K, 0), False, 1.0, T, empty(K, 8), None, None,
                    mask=("addend", threshold, seed),
                ),
            ]  # fmt: skip
            for where, launches in zip(("x", "weight", "addend"), masked, strict=True):
                arguments = launches[0].arguments
                assert (arguments["MASK"], arguments["WIDE"]) == (where, wide)
                assert -(1 << 31) <= arguments["threshold"] < 1 << 31
        for mask in (("addend", 1 << 32, seed), None):
            whole = matmul.plan(machine, x, T, empty(K, 8), False, 1.0, *nothing, mask=mask)[0].arguments
            assert [whole[name] for name in ("MASK", "WIDE", "seed", "threshold")] == ["", False, None, 0]


COMPRESSIONS = [
    (96, 32, False, 96),
    (96, 40, False, 120),
    (100, 257, False, 257),
    (31, 7, False, 31),
    (3, 17, False, 17),
    (64, 16, False, 5),
    (1, 5, False, 23),
    (100, 32, True, 0),
    (5, 9, True, 0),
    (600, 202, True, 0),
]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("I", "P", "grouped", "length"), COMPRESSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compress(I: int, P: int, grouped: bool, length: int, dtype: torch.dtype) -> None:  # noqa: E741
    x = torch.randn(I, 9).to(dtype).t()
    out = torch.full((9, P), torch.nan, dtype=dtype)
    triton.compress(out, x, grouped, length)
    value = reference.compress(x.double(), P, grouped, length)
    # no sum has more terms than x has columns or the walk has rounds
    terms = I // P + length / P + 2
    slack = terms * U32 * reference.compress(x.double().abs(), P, grouped, length)
    bounds.check("out", out, Approx(value, slack, slack).rounded(dtype))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("n", "h"), [(1, 1), (3, 5), (7, 50)])
def test_compress_turns_blocks(n: int, h: int, inverse: bool) -> None:
    P = 2 * n * h
    table = reference.rotation_table(2 * h, n, torch.device("cpu"), torch.float32)
    x = torch.randn(6, P - 1).bfloat16()
    out = torch.full((6, P), torch.nan, dtype=torch.float32)
    triton.compress(out, x, False, P, table, inverse)
    value = reference.compress(x.double(), P, False, P, table.double(), inverse)
    # two products and their sum, of one or two numbers each: 5 roundings of no more than the sum of both
    slack = 5 * U32 * 2 * x.double().abs().amax(1, keepdim=True).expand(6, P)
    bounds.check("out", out, Approx(value, slack, slack))


@pytest.mark.parametrize("kind", ["rotation", "decoupling"])
@pytest.mark.parametrize(
    ("base", "dtype"),
    [
        ("4 bits", torch.bfloat16),
        ("4 bits", torch.float32),
        ("dequantized", torch.bfloat16),
        ("dense", torch.float16),
        ("none", torch.bfloat16),
    ],
)
@pytest.mark.parametrize(
    ("M", "K", "N", "r"),
    [
        (5, 128, 128, 32),  # a tile in several blocks, each step neighbours of its source, both ways
        (3, 128, 192, 40),  # x repeated onto 160 columns, dY summed onto them, dX over 32 of them twice
        (70, 64, 128, 48),  # steps at multiples of 16, but x repeated within a block
        (2, 192, 64, 16),  # blocks without outputs
        (3, 1024, 64, 64),  # W's sum in parts, of which one has the addend
        (3, 64, 1024, 16),  # the same for dX
        (2, 2, 3, 1),
    ],
)
def test_mora_of_several_blocks(
    M: int,
    K: int,
    N: int,
    r: int,
    dtype: torch.dtype,
    base: str,
    kind: str,
    interpreted: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peftkern.triton_kernels import choices

    if kind == "rotation" and r % 2:
        r, K = 2, 5
    monkeypatch.setattr(choices, "crossover", lambda *_: 0 if base == "dequantized" else choices.ANY)
    W = torch.randn(N, K)
    weight = None if base == "none" else W.to(dtype) if base == "dense" else peftkern.quantize_4bit(W)
    x = torch.randn(M, K).to(dtype).requires_grad_()
    matrix, grad = torch.randn(r, r).requires_grad_(), torch.randn(M, N).to(dtype)
    if weight is None:
        scaling, y = 1.0, peftkern.mora(x, matrix, N, kind)
    else:
        scaling, y = 0.75, peftkern.mora_linear(x, weight, matrix, kind, 0.75)
    dx, dM = torch.autograd.grad(y, (x, matrix), grad)
    if base == "dequantized":  # the addend is rounded before the vendor's product is added, as for a dense W
        weight = peftkern.dequantize_4bit(weight, dtype)
    expected = bounds.mora(x.detach(), matrix.detach(), kind, N, weight, scaling, None, grad)
    for name, found in (("y", y.detach()), ("x", dx), ("matrix", dM)):
        bounds.check(name, found, expected[name])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_block(value: float, interpreted: None) -> None:
    """A tile of outputs lies in several blocks here, of which one reads such a number."""
    x, matrix = torch.randn(3, 96), torch.randn(24, 24)
    clean = peftkern.mora(x, matrix, 96, "decoupling")
    x[1, 30] = value
    y = peftkern.mora(x, matrix, 96, "decoupling")
    touched = torch.zeros(3, 96, dtype=torch.bool)
    touched[1, 24:48] = True
    assert not y[touched].isfinite().any()
    assert torch.equal(y[~touched], clean[~touched])


def test_who_is_refused_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(triton, "INTERPRETED", True)
    assert triton.supports(Call("linear", cpu, torch.float32)) is None
    told = triton.supports(Call("linear", cuda, torch.float32))
    assert told == "TRITON_INTERPRET=1: it runs tensors on cpu, these are on cuda:0"
    told = triton.supports(Call("linear", cpu, torch.float64))
    assert told == "it takes float32, bfloat16 and float16, this is float64"
    monkeypatch.setattr(triton, "INTERPRETED", False)
    assert triton.supports(Call("linear", cpu, torch.float32)) == "it runs tensors on cuda, these are on cpu"


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("3.5.1", "it needs triton 3.6 or newer, this is 3.5.1"),
        ("3.6.0", None),
        ("3.10.0+git1234", None),
        ("3.7rc1", None),
        ("main", "it needs triton 3.6 or newer, this is main"),
        (None, "triton is not installed (pip install peftkern[triton])"),
    ],
)
def test_which_triton_will_do(
    version: str | None, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if version is None else object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    triton.missing.cache_clear()
    try:
        assert triton.missing() == problem
    finally:
        triton.missing.cache_clear()


@pytest.mark.skipif(
    not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1, set before the start (make test-triton)"
)
def test_explain_says_which_path_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is the path that runs: a dequantized copy is made, or none."""
    x = torch.randn(2, 3, 64)
    made: list[Any] = []
    dequantize = triton.dequantize
    monkeypatch.setattr(triton, "dequantize", lambda out, w: (made.append(out), dequantize(out, w)))

    def told(x: Tensor, K: int = 64) -> str:
        made.clear()
        weight = peftkern.quantize_4bit(torch.randn(8, K))
        with peftkern.use_backend("triton"):
            peftkern.linear_4bit(x, weight)
            (choice,) = peftkern.explain("linear_4bit", x, weight).choices
        return choice.detail

    wide = torch.randn(200, 64)
    assert told(x.bfloat16()) == "Triton's interpreter; fused, as x has 6 rows, fewer than 2048"
    assert not made
    assert told(wide).endswith("W dequantized for cuBLAS, as x has 200 rows, 128 or more")
    assert made
    assert told(wide[:3]).endswith("fewer than 128, W byte by byte: fp32 takes no tensor cores")
    odd = told(torch.randn(3, 65).bfloat16(), 65)
    assert odd.endswith("fewer than 2048, W byte by byte: K = 65 is no positive multiple of 64")
    with peftkern.use_backend("triton"):
        (dense,) = peftkern.explain("lora_linear", x, torch.randn(8, 64), x[0, :1], torch.ones(8, 1)).choices
        (alone,) = peftkern.explain("mora", x, torch.ones(4, 4), 8).choices
    assert dense.detail == "cuBLAS, the adapter by Triton's interpreter"
    assert alone.detail == "Triton's interpreter"


def test_triton_of_another_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch-triton and the like: the module is there, a distribution of its name is not."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    for found, problem in (("3.6.0", None), ("3.5.0", "it needs triton 3.6 or newer, this is 3.5.0")):
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=found, __spec__=object()))
        triton.missing.cache_clear()
        try:
            assert triton.missing() == problem
        finally:
            triton.missing.cache_clear()


def test_nobody_imports_triton_for_a_cpu_tensor() -> None:
    """A machine without a GPU pays nothing for the backend."""
    program = """
        import sys, torch, peftkern
        weight = peftkern.quantize_4bit(torch.randn(8, 64))
        peftkern.linear_4bit(torch.randn(2, 64), weight)
        print(peftkern.explain("linear_4bit", torch.randn(2, 64), weight))
        sys.exit("triton" in sys.modules)
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "not triton: " in result.stdout


@pytest.mark.usefixtures("interpreted")
def test_dispatch_prefers_the_compiled_kernels() -> None:
    """Interpreted Triton runs a call on CPU tensors only when it is forced."""
    with peftkern.use_backend(None):
        told = peftkern.explain("linear_4bit", torch.randn(2, 64), quantized(8, 64))
    assert told.backend != "triton"
    assert "it could, but" in told.choices[0].others["triton"]
