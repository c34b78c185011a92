"""The instructions of AMX: TDPBF16PS by its definition, addresses, and what the CPU refuses.

On a CPU without AMX this tests what stands in for it there, amx_trap.cpp; on one that has it, the CPU itself.

Definition (Intel SDM, TDPBF16PS), for each element of C: two sums over the pairs from 0, of the even and of
the odd products, each step one FMA; then even + odd, then that onto C. Every operation rounds to nearest
even, takes subnormal inputs as zeros and makes zeros of subnormal results.
"""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SMALLEST = 2.0**-126


@pytest.fixture(scope="module")
def flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError as error:
        pytest.skip(f"no /proc/cpuinfo: {error}")


@pytest.fixture(scope="module")
def calls(flags: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = [str(ROOT / "tests/amx_calls.cpp")]
    if "amx_bf16" in flags:
        _cpu = pytest.importorskip("peftkern._cpu", reason="peftkern._cpu is not built", exc_type=ImportError)
        if "amx" not in _cpu.isa_levels():  # which asks for the process's permission
            pytest.skip("this build has no AMX, or the kernel does not let the process use it")
    elif "avx512bw" in flags:
        sources.append(str(ROOT / "tests/amx_trap.cpp"))
    else:
        pytest.skip("amx_trap.cpp needs AVX-512")
    library = tmp_path_factory.mktemp("amx") / "calls.so"
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O3",
            "-ffp-contract=off",
            *["-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl"],
            *["-shared", "-fPIC", f"-I{ROOT}/csrc"],
            *sources,
            "-o",
            str(library),
        ],
        check=True,
    )
    return library


def rounded(x: np.ndarray) -> np.ndarray:
    """fp64 to fp32: nearest even; tiny, judged at 24 bits of any exponent, to zero of the same sign."""
    small = np.abs(x) < SMALLEST
    with np.errstate(over="ignore", invalid="ignore"):
        at_24_bits = (np.where(small, x, 0) * 2.0**100).astype(np.float32)
        tiny = np.where(np.abs(at_24_bits) < 2.0**-26, 0.0, SMALLEST)
        return np.where(small, np.copysign(tiny, x), x.astype(np.float32)).astype(np.float32)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x).astype(np.float32)


def value(bits: np.ndarray) -> np.ndarray:
    return flushed((bits.astype(np.uint32) << 16).view(np.float32))


def definition(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c [m, n] fp32, a [m, k, 2] and b [k, n, 2] bf16 bits.

    A product of bf16 is exact in fp64, and fp64 has more than twice fp32's bits: rounding a sum to fp64 first
    changes nothing.
    """
    sums = np.zeros((2, *c.shape), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(b.shape[0]):
            for half in range(2):
                product = value(a[:, k, half])[:, None].astype(np.float64) * value(b[k, :, half])[None]
                sums[half] = rounded(sums[half].astype(np.float64) + product)
        pair = rounded(sums[0].astype(np.float64) + sums[1])
        return rounded(flushed(c).astype(np.float64) + pair)


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def small(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Magnitudes around 2^-63, whose products lie on both sides of the smallest normal number."""
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-68, -58, shape)
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def any_bits(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Every pattern: subnormals, infinities, NaN."""
    return rng.integers(0, 1 << 16, shape, dtype=np.uint16)


def no_nan(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    bits = any_bits(rng, shape)
    return np.where(bits & 0x7F80 == 0x7F80, bits & 0x8000, bits).astype(np.uint16)


@pytest.mark.parametrize("values", [normal, small, no_nan, any_bits], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("rows", "pairs", "columns"), [(16, 16, 16), (3, 16, 16), (16, 5, 7), (1, 1, 1)])
def test_product_is_the_definition_bit_by_bit(
    calls: Path,
    values: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray],
    rows: int,
    pairs: int,
    columns: int,
) -> None:
    library = ctypes.CDLL(str(calls))
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = np.zeros((16, 16, 2), np.uint16), np.zeros((16, 16, 2), np.uint16)
        a[:rows, :pairs], b[:pairs, :columns] = (
            values(rng, (rows, pairs, 2)),
            values(rng, (pairs, columns, 2)),
        )
        before = (values(rng, (16, 16)).astype(np.uint32) << 16 | any_bits(rng, (16, 16))).view(np.float32)
        c = before.copy()
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (c, a, b)]
        library.product(*pointers, rows, pairs, columns)
        expected = before.copy()
        expected[:rows, :columns] = definition(before[:rows, :columns], a[:rows, :pairs], b[:pairs, :columns])
        inside = np.zeros((16, 16), bool)
        inside[:rows, :columns] = True
        same = (c.view(np.uint32) == expected.view(np.uint32)) | (inside & np.isnan(c) & np.isnan(expected))
        assert same.all(), f"{(~same).sum()} elements differ, the first at {np.argwhere(~same)[0]}"


def test_mxcsr_is_left_alone(calls: Path) -> None:
    """Tiles take subnormals as zeros; the caller's arithmetic goes on without."""
    library = ctypes.CDLL(str(calls))
    tiles = [np.zeros((16, 16), np.float32) for _ in range(3)]
    library.product(*[ctypes.c_void_p(t.ctypes.data) for t in tiles], 16, 16, 16)
    assert np.float32(SMALLEST) * np.float32(0.5) != 0


@pytest.mark.parametrize("registers", ["low", "high"])
@pytest.mark.parametrize("quarter", [16, 17, 33])
def test_addresses(calls: Path, registers: str, quarter: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, (16, 4 * quarter), dtype=np.uint8)
    copied = np.zeros_like(source)
    copy = ctypes.CDLL(str(calls))[f"copy_by_{registers}_registers"]
    copy(ctypes.c_void_p(source.ctypes.data), ctypes.c_void_p(copied.ctypes.data), ctypes.c_int64(quarter))
    assert (copied[:, :64] == source[:, :64]).all()
    assert not copied[:, 64:].any()


FAULTS = [
    "no configuration is loaded",
    "more than 16 rows",
    "more than 64 bytes in a row",
    "a reserved byte is set",
    "palette is not 1",
    "rows without bytes or bytes without rows",
    "a tile beyond the eighth has a shape",
    "C and A differ in rows",
    "C and B differ in columns",
    "the columns of A are not the rows of B",
    "no configuration is loaded",
    "the tile has no shape",
]


def stops(library: Path, call: str) -> subprocess.CompletedProcess[str]:
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).{call}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("which", range(len(FAULTS)))
def test_what_the_cpu_refuses_stops_the_process(flags: str, calls: Path, which: int) -> None:
    if "amx_bf16" in flags:
        pytest.skip("the CPU's own faults need no test")
    run = stops(calls, f"fault({which})")
    assert run.returncode == -signal.SIGABRT
    assert FAULTS[which] in run.stderr


def test_other_instructions_stay_illegal(calls: Path) -> None:
    assert stops(calls, "undefined()").returncode == -signal.SIGILL
