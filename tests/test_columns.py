"""The primitives that pair wide columns with narrow ones, matmul's spread and compress, called directly.

The pairs come from loops over the columns that follow the two definitions of csrc/params.h word by word.
"""

from __future__ import annotations

import pytest
import torch
from bounds import SMALLEST, UNIT
from guarded import guarded
from torch import Tensor

from peftkern import quantize_4bit

_cpu = pytest.importorskip("peftkern._cpu", reason="peftkern._cpu is not built", exc_type=ImportError)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
U32 = UNIT[torch.float32]
# wide, narrow, grouped, length: with more narrow columns than wide ones, several cycles, one cut short;
# groups of two sizes and of none
WALKS = [
    (96, 32, False, 96),
    (96, 40, False, 120),
    (96, 40, False, 96),
    (300, 64, False, 300),
    (257, 100, False, 300),
    (100, 257, False, 257),
    (31, 7, False, 31),
    (3, 17, False, 17),
    (64, 16, False, 5),
    (64, 16, False, 0),
    (64, 1, False, 64),
    (1, 5, False, 23),
    (5, 3, False, 64),
    (2100, 700, False, 2100),
    (96, 32, True, 0),
    (100, 32, True, 0),
    (257, 16, True, 0),
    (50, 1, True, 0),
    (5, 9, True, 0),
    (1, 1, True, 0),
    (1030, 202, True, 0),
]
_IDS = [f"{w}-{n}-{'grouped' if g else length}" for w, n, g, length in WALKS]


def pairs(wide: int, narrow: int, grouped: bool, length: int) -> tuple[list[int], list[int]]:
    """The wide and the narrow column of each pair, in the order in which they are added."""
    if not grouped:
        return [p % wide for p in range(length)], [p % narrow for p in range(length)]
    groups: list[int] = []
    for g in range(narrow):
        groups += [g] * (wide // narrow + (g < wide % narrow))
    return list(range(wide)), groups


def summed(x: Tensor, columns: int, sources: list[int], targets: list[int]) -> tuple[Tensor, Tensor]:
    """out[:, targets[i]] += x[:, sources[i]] in fp64, and how far the same sums in fp32 may be from that.

    n terms in any order cost at most n roundings of Σ|x|.
    """
    source, target = torch.tensor(sources, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
    taken = x.double()[:, source]
    out, size = (torch.zeros(len(x), columns, dtype=torch.float64) for _ in range(2))
    terms = torch.bincount(target, minlength=columns)
    return out.index_add_(1, target, taken), terms * U32 * size.index_add_(1, target, taken.abs())


def layouts(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "contiguous": torch.full((rows, columns), torch.nan, dtype=dtype),
        "rows apart": torch.full((rows, columns + 5), torch.nan, dtype=dtype)[:, 3 : 3 + columns],
        "columns apart": torch.full((columns, rows), torch.nan, dtype=dtype).t(),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "columns", "grouped", "length"), WALKS, ids=_IDS)
def test_spread_alone(
    outputs: int, columns: int, grouped: bool, length: int, dtype: torch.dtype, isa: str
) -> None:
    """Without a contraction the matmul is bias and spread, whatever the layout of out."""
    wide, narrow = pairs(outputs, columns, grouped, length)
    for rows in (1, 5, 33):
        values = torch.randn(rows, columns + 3)[:, :columns]
        bias = torch.randn(outputs).to(dtype)
        added, error = summed(values, outputs, narrow, wide)
        for b in (None, bias):
            expected = added if b is None else added + b.double()
            for layout, out in layouts(rows, outputs, dtype).items():
                x, w = torch.empty(rows, 0, dtype=dtype), torch.empty(outputs, 0)
                _cpu.matmul(out, x, w, False, 1.0, None, None, b, (values, grouped, length), 2)
                # bias + spread and out's own rounding
                bound = error + (U32 + UNIT[dtype]) * (expected.abs() + error) + SMALLEST[dtype]
                assert ((out.double() - expected).abs() <= bound).all(), (rows, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(("outputs", "columns", "grouped", "length"), WALKS, ids=_IDS)
def test_spread_is_one_more_addend(
    outputs: int, columns: int, grouped: bool, length: int, transposed: bool, dtype: torch.dtype, isa: str
) -> None:
    """Every kernel, few rows and many, 4-bit and dense.

    The weight's codes are 1 and -1 (NF4's last and first), the rest small integers and quarters, so that
    every sum is exact in fp32 and only the result is rounded.
    """
    inner, rank = 64, 4
    wide, narrow = pairs(outputs, columns, grouped, length)
    shape = (inner, outputs) if transposed else (outputs, inner)
    packed = torch.randint(0, 2, ((shape[0] * shape[1] + 1) // 2, 2)) * 15
    signs = torch.where(packed > 0, 1.0, -1.0).flatten()[: shape[0] * shape[1]].view(shape)
    absmax = torch.ones(-(-signs.numel() // 64))
    weight4 = ((packed[:, 0] * 16 + packed[:, 1]).byte(), absmax, None, "nf4", 64, *shape)
    for rows in (1, 3, 40):
        x = (torch.rand(rows, inner) < 0.1).to(dtype)
        t, u = torch.randint(-1, 2, (rows, rank)).to(dtype), torch.randint(-1, 2, (outputs, rank)).to(dtype)
        values = torch.randint(-3, 4, (rows, columns)) / 4
        bias = torch.randint(-3, 4, (outputs,)) / 4
        added, _ = summed(values, outputs, narrow, wide)
        w = signs.double() if transposed else signs.double().t()
        expected = 0.5 * (x.double() @ w + t.double() @ u.double().t()) + bias.double() + added
        for weight in (weight4, signs, signs.to(dtype)):
            out = torch.full((rows, outputs), torch.nan, dtype=dtype)
            _cpu.matmul(out, x, weight, transposed, 0.5, t, u, bias, (values, grouped, length), 2)
            assert torch.equal(out, expected.to(dtype)), rows


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spread_touches_nothing_else(dtype: torch.dtype, at: str, isa: str) -> None:
    """A forbidden page behind, or before, out and values: runs end inside a vector."""
    for outputs, columns, grouped, length in WALKS:
        for rows in (1, 3):
            values = guarded(torch.randn(rows, columns), at)
            out = guarded(torch.full((rows, outputs), torch.nan, dtype=dtype), at)
            x, w = torch.empty(rows, 0, dtype=dtype), torch.empty(outputs, 0)
            bias = guarded(torch.randn(outputs).to(dtype), at)
            _cpu.matmul(out, x, w, False, 1.0, None, None, bias, (values, grouped, length), 1)
            assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spread_has_the_same_bits_on_any_thread_count(dtype: torch.dtype, isa: str) -> None:
    values, bias = torch.randn(300, 202), torch.randn(1000)
    for rows, inner in ((1, 0), (300, 0), (1, 64), (300, 64)):
        x, w = torch.randn(rows, inner).to(dtype), torch.randn(1000, inner).to(dtype)
        for grouped in (False, True):
            outs = [torch.full((rows, 1000), torch.nan, dtype=dtype) for _ in range(4)]
            for threads, out in enumerate(outs, 1):
                _cpu.matmul(out, x, w, False, 1.0, None, None, bias, (values[:rows], grouped, 1000), threads)
            assert all(torch.equal(out, outs[0]) for out in outs)


def turned(z: Tensor, size: Tensor, rotation: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Each pair of columns of a block turned by its angle, in fp64, and the pair's Σ|x| for both."""
    n, _, h = rotation.shape
    cos, sin = rotation.double().unbind(1)
    sin = -sin if inverse else sin
    a, b = z.view(-1, n, 2, h).unbind(2)
    both = size.view(-1, n, 2, h).sum(2, keepdim=True).expand(-1, n, 2, h)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], 2).reshape(z.shape), both.reshape(z.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("wide", "columns", "grouped", "length"), WALKS, ids=_IDS)
def test_compress(wide: int, columns: int, grouped: bool, length: int, dtype: torch.dtype, isa: str) -> None:
    sources, targets = pairs(wide, columns, grouped, length)
    for rows in (1, 5, 33):
        values = torch.randn(rows, wide).to(dtype)
        expected, error = summed(values, columns, sources, targets)
        outs: list[Tensor] = []
        for layout, x in layouts(rows, wide, dtype).items():
            x.copy_(values)
            out = torch.full((rows, columns + 3), torch.nan, dtype=dtype)[:, 2 : 2 + columns]
            _cpu.compress(out, x, grouped, length, None, False, 2)
            bound = error + UNIT[dtype] * (expected.abs() + error) + SMALLEST[dtype]
            assert ((out.double() - expected).abs() <= bound).all(), (rows, layout)
            outs.append(out)
        assert all(torch.equal(out, outs[0]) for out in outs), "bits that depend on the layout of x"
        wider = torch.full((rows, columns), torch.nan)
        _cpu.compress(wider, values, grouped, length, None, False, 2)
        assert torch.equal(wider.to(dtype), outs[0]), "out's dtype is more than one rounding"


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("wide", "columns", "half", "grouped", "length"),
    [
        (96, 96, 16, False, 96),  # x itself, turned
        (4200, 4200, 1050, False, 4200),  # more than a tile of sums
        (100, 104, 13, False, 104),  # the last columns start over at x's first
        (300, 64, 32, False, 320),
        (5, 14, 7, False, 14),
        (64, 2, 1, False, 64),
        (100, 32, 8, True, 0),
        (0, 8, 2, False, 8),
    ],
)
def test_compress_turns(
    wide: int,
    columns: int,
    half: int,
    grouped: bool,
    length: int,
    dtype: torch.dtype,
    inverse: bool,
    isa: str,
) -> None:
    """The rotation costs two products and a sum, each rounded in fp32, of values up to Σ|x| of the pair."""
    sources, targets = pairs(wide, columns, grouped, length) if wide else ([], [])
    angles = torch.rand(columns // (2 * half), half) * 6.3
    rotation = torch.stack([angles.cos(), angles.sin()], 1)
    for rows in (1, 7):
        values = torch.randn(rows, wide).to(dtype)
        z, error = summed(values, columns, sources, targets)
        size, _ = summed(values.abs(), columns, sources, targets)
        expected, both = turned(z, size, rotation, inverse)
        _, errors = turned(z, error, rotation, inverse)
        for out_dtype in DTYPES:
            out = torch.full((rows, columns), torch.nan, dtype=out_dtype)
            for x in (values, values.t().contiguous().t()):
                _cpu.compress(out, x, grouped, length, rotation, inverse, 2)
                bound = errors + 3 * U32 * both
                bound += UNIT[out_dtype] * (expected.abs() + bound) + SMALLEST[out_dtype]
                assert ((out.double() - expected).abs() <= bound).all(), (rows, out_dtype)


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compress_touches_nothing_else(dtype: torch.dtype, at: str, isa: str) -> None:
    for wide, columns, grouped, length in WALKS:
        for rows in (1, 3):
            x = guarded(torch.randn(rows, wide).to(dtype), at)
            out = guarded(torch.full((rows, columns), torch.nan, dtype=dtype), at)
            _cpu.compress(out, x, grouped, length, None, False, 1)
            assert out.isfinite().all()
            if columns % 2 == 0:
                rotation = guarded(torch.randn(1, 2, columns // 2), at)
                out.fill_(torch.nan)
                _cpu.compress(out, x, grouped, length, rotation, True, 1)
                assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compress_has_the_same_bits_on_any_thread_count(dtype: torch.dtype, isa: str) -> None:
    x = torch.randn(300, 1000).to(dtype)
    for grouped in (False, True):
        outs = [torch.full((300, 202), torch.nan, dtype=dtype) for _ in range(4)]
        for threads, out in enumerate(outs, 1):
            _cpu.compress(
                out, x, grouped, 1010, torch.randn(1, 2, 101, generator=torch.manual_seed(1)), False, threads
            )
        assert all(torch.equal(out, outs[0]) for out in outs)


# rows, x's columns, r̂, blocks, outputs: whole tiles and none, more than a strip, more than a chunk, one
# column a block, ends wider and narrower than the middle
MIDDLES = [
    (70, 256, 64, 4, 256),
    (33, 130, 66, 2, 100),
    (5, 7, 1, 7, 9),
    (3, 700, 2, 350, 700),
    (40, 330, 330, 1, 400),
    (19, 1300, 1100, 1, 50),
    (9, 60, 17, 4, 68),
    (130, 200, 48, 1, 300),
    # at most 4 rows of the middle
    (1, 100, 37, 1, 51),
    (2, 130, 66, 2, 100),
    (3, 300, 202, 1, 260),
    (4, 700, 530, 1, 1000),
]
_MORA_IDS = ["-".join(map(str, middle)) for middle in MIDDLES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(("rows", "wide", "size", "blocks", "outputs"), MIDDLES, ids=_MORA_IDS)
def test_mora_of_whole_numbers(
    rows: int, wide: int, size: int, blocks: int, outputs: int, transposed: bool, dtype: torch.dtype, isa: str
) -> None:
    """Small ones, of which every product and sum is exact: each layout of each tensor, both ways to walk."""
    columns = size * blocks
    matrix = torch.randint(-1, 2, (size, size)).to(dtype)
    w = (matrix.t() if transposed else matrix).double()
    for grouped in [False, True][: 1 + (blocks == 1)]:
        inner, outer = (grouped, 0 if grouped else columns), (grouped, 0 if grouped else outputs)
        values = torch.zeros(rows, wide)
        values[:, torch.randperm(wide)[:8]] = torch.randint(-1, 2, (rows, min(8, wide))).float()
        middle, _ = summed(values, columns, *pairs(wide, columns, *inner))
        v = 2 * (middle.view(rows, blocks, size) @ w.t()).reshape(rows, columns)
        wide_of, narrow_of = pairs(outputs, columns, *outer)
        bias = torch.randint(-2, 3, (outputs,))
        expected = bias.double() + summed(v, outputs, narrow_of, wide_of)[0]
        assert expected.abs().max() <= 256, "beyond what bf16 counts"
        for name, out in layouts(rows, outputs, dtype).items():
            for x in (values.to(dtype), values.to(dtype).t().contiguous().t()):
                z = torch.full((rows, columns), torch.nan, dtype=dtype)
                for kept in (z, None):
                    for m in (matrix, matrix.t().contiguous().t()):
                        out.fill_(torch.nan)
                        _cpu.mora(
                            out,
                            kept,
                            x,
                            None,
                            transposed,
                            m,
                            2.0,
                            bias.float(),
                            inner,
                            outer,
                            columns,
                            None,
                            2,
                        )
                        assert torch.equal(out.double(), expected), name
                assert torch.equal(z.double(), middle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "wide", "size", "blocks", "outputs"), MIDDLES, ids=_MORA_IDS)
def test_mora_grad_of_whole_numbers(
    rows: int, wide: int, size: int, blocks: int, outputs: int, dtype: torch.dtype, isa: str
) -> None:
    columns = size * blocks
    x, grad = torch.randint(-1, 2, (rows, wide)).float(), torch.randint(-1, 2, (rows, outputs)).float()
    z, _ = summed(x, columns, *pairs(wide, columns, False, columns))
    g, _ = summed(grad, columns, *pairs(outputs, columns, False, outputs))
    expected = 0.5 * g.view(-1, size).t() @ z.view(-1, size)
    for layout in (lambda t: t, lambda t: t.t().contiguous().t()):
        out = torch.full((size, size), torch.nan)
        _cpu.mora_grad(out, layout(grad.to(dtype)), layout(x.to(dtype)), 0.5, columns, None, 2)
        assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mora_touches_nothing_else(dtype: torch.dtype, at: str, isa: str) -> None:
    for rows, wide, size, blocks, outputs in MIDDLES:
        columns = size * blocks
        ends = (False, columns), (False, outputs), columns
        table = guarded(torch.randn(blocks, 2, size // 2), at) if size % 2 == 0 else None
        x, grad = (guarded(torch.randn(rows, n).to(dtype), at) for n in (wide, outputs))
        matrix, out = guarded(torch.randn(size, size).to(dtype), at), torch.empty_like(grad)
        z, out = (guarded(torch.full((rows, n), torch.nan).to(dtype), at) for n in (columns, outputs))
        for transposed in (False, True):
            _cpu.mora(out, z, x, None, transposed, matrix, 1.0, None, *ends, table, 2)
            assert out.isfinite().all()
            assert z.isfinite().all()
        dM = guarded(torch.full((size, size), torch.nan), at)
        _cpu.mora_grad(dM, grad, x, 1.0, columns, table, 2)
        assert dM.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mora_has_the_same_bits_on_any_thread_count(dtype: torch.dtype, isa: str) -> None:
    """And whatever the other rows are."""
    table = torch.randn(5, 2, 33)
    x, grad, matrix = (torch.randn(*shape).to(dtype) for shape in ((200, 300), (200, 310), (66, 66)))
    for transposed in (False, True):
        ends = (False, 330), (False, 310), 330, table
        outs = [torch.full((200, 310), torch.nan, dtype=dtype) for _ in range(4)]
        for threads, out in enumerate(outs, 1):
            _cpu.mora(out, None, x, None, transposed, matrix, 0.7, None, *ends, threads)
        assert all(torch.equal(out, outs[0]) for out in outs)
        for m in (0, 77, 199):
            alone = torch.full((1, 310), torch.nan, dtype=dtype)
            _cpu.mora(alone, None, x[m : m + 1], None, transposed, matrix, 0.7, None, *ends, 1)
            assert torch.equal(alone, outs[0][m : m + 1])
    few, square = x[:4], torch.randn(512, 512).to(dtype)
    outs = [torch.full((4, 310), torch.nan, dtype=dtype) for _ in range(4)]
    for threads, out in enumerate(outs, 1):
        _cpu.mora(
            out, None, few, None, False, square, 0.7, None, (False, 512), (False, 310), 512, None, threads
        )
    assert all(torch.equal(out, outs[0]) for out in outs)
    sums = [torch.full((66, 66), torch.nan) for _ in range(4)]
    for threads, dM in enumerate(sums, 1):
        _cpu.mora_grad(dM, grad, x, 0.7, 330, table, threads)
    assert all(torch.equal(dM, sums[0]) for dM in sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_mora_onto_a_base_is_what_its_kernels_make(
    double_quant: bool, transposed: bool, dtype: torch.dtype, isa: str
) -> None:
    """Bit by bit, with rows in several parts too: what mora makes in fp32, spread by the product with W."""
    weight = quantize_4bit(torch.randn(128, 192), double_quant=double_quant)
    wide, outputs = weight.shape if transposed else weight.shape[::-1]
    bias = torch.randn(outputs)
    for rows, size, blocks in ((1, 40, 1), (3, 40, 5), (33, 40, 1), (4100, 24, 1), (800, 48, 4)):
        columns, grouped = size * blocks, blocks == 1 and rows > 1
        inner, outer = (grouped, 0 if grouped else columns), (grouped, 0 if grouped else outputs)
        table = torch.randn(blocks, 2, size // 2) if blocks > 1 else None
        x, matrix = torch.randn(rows, wide).to(dtype), torch.randn(size, size)
        out, kept = (torch.full((rows, n), torch.nan, dtype=dtype) for n in (outputs, columns))
        z = kept if blocks == 1 else None
        ends = inner, outer, columns, table, 2
        _cpu.mora(out, z, x, weight.kernel_args, transposed, matrix, 0.7, bias, *ends)
        parts = 1 if rows <= 384 else -(-rows // (384 if blocks > 1 else 4096))
        for part in torch.arange(rows).chunk(parts):
            some = x[part[0] : part[-1] + 1]
            values = torch.full((len(part), columns), torch.nan)
            alone = torch.full((len(part), columns), torch.nan, dtype=dtype)
            whole = inner, (False, columns), columns, table, 2
            _cpu.mora(
                values, alone if z is not None else None, some, None, transposed, matrix, 0.7, None, *whole
            )
            expected = torch.full((len(part), outputs), torch.nan, dtype=dtype)
            spread = (values, *outer)
            _cpu.matmul(expected, some, weight.kernel_args, transposed, 1.0, None, None, bias, spread, 2)
            assert torch.equal(out[part], expected)
            assert z is None or torch.equal(z[part], alone)
