"""The cpu backend's product: every side a matrix can stand on, every layout it is read in."""

from __future__ import annotations

import functools

import bounds
import pytest
import torch
from conftest import ISAS
from guarded import guarded
from torch import Tensor

import peftkern
from peftkern import reference
from peftkern.backends.cpu import _cpu, use_isa

# Rows in several blocks, pieces and strips with remainders, one chunk of the contraction and more, outputs
# that fill no vector; 64, 384 and 1664 columns are whole groups of a 4-bit weight, 330 and 1700 are not.
# On avx512_bf16 13 panels or 14 of 128 outputs, two strips, do for one thread; two share out half as wide
# ones. Then few rows, which have a way of their own: in one group or several, of few outputs and of many.
SIZES = [(25, 70, 64), (97, 130, 384), (150, 7, 330), (400, 72, 64), (60, 1664, 384), (49, 1700, 330)]
SIZES += [(1, 1030, 384), (2, 70, 64), (4, 130, 330), (9, 16, 384), (24, 7, 330)]
# In fp32 one group of rows or several, each with a part of x at a time; a W whose rows end in half a block.
SIZES += [
    (8, 20, 2112),
    (7, 20, 2784),
    (19, 20, 2112),
    (24, 20, 2112),
    (20, 20, 2112),
    (3, 20, 2784),
    (9, 20, 2784),
    (1, 20, 8224),
]
# Transposed, amx takes 512 outputs at a time, in three chunks, with nine tiles of x.
SIZES += [(140, 1024, 640)]
# Contractions that amx takes in parts, of W's rows or of x's, with an addend of two groups; 64 and 80 rows
# of x meet 16 of W.
SIZES += [(90, 40, 4224), (33, 33, 11264), (50, 40, 4224), (70, 40, 7168)]
# Groups of 64 weights in their own order, in blocks of rows and chunks, and transposed in short chunks.
SIZES += [(310, 192, 704), (16, 192, 704)]
LAYOUTS = ["rows", "apart", "odd", "columns"]


def laid_out(matrix: Tensor, layout: str, at: str) -> Tensor:
    """The same values: rows of neighbours, 2 KiB apart (on one cache set), at an odd stride, or columns."""
    rows, columns = matrix.shape
    if layout == "columns":
        return guarded(matrix.t().contiguous(), at).t()
    stride = {"rows": columns, "apart": 2048 // matrix.element_size(), "odd": columns + 1 + columns % 2}[
        layout
    ]
    wide = torch.zeros(rows, max(stride, columns), dtype=matrix.dtype)
    start = wide.shape[1] - columns if at == "end" else 0
    wide[:, start : start + columns] = matrix
    return guarded(wide, at)[:, start : start + columns]


@functools.cache
def product(
    size: tuple[int, int, int], transposed: bool, at: str
) -> tuple[list[Tensor], list[tuple[peftkern.QuantizedWeight | Tensor, torch.dtype, bounds.Approx]]]:
    """x, t, u and bias; a 4-bit weight with the addend and a dense one without, each with out's dtype and
    value. Neither the layout nor the level enters: made once for all of them."""
    rows, outputs, inner = size
    x = torch.randn(rows, inner).bfloat16()
    rank = 150 if inner > 4096 else 3
    t, u = torch.randn(rows, rank).bfloat16(), torch.randn(outputs, rank).bfloat16()
    bias = torch.randn(outputs)
    dense = torch.randn((inner, outputs) if transposed else (outputs, inner))
    four_bit = peftkern.quantize_4bit(dense, "nf4", 64 if at == "end" else 256, at == "end")

    def expected(values: Tensor, dtype: torch.dtype, addend: bool) -> bounds.Approx:
        return bounds.matmul(
            bounds.exact(x),
            bounds.operand(values.t() if transposed else values, bounds.compute_dtype(torch.bfloat16)),
            dtype,
            0.5,
            bounds.exact(t) if addend else None,
            bounds.exact(u) if addend else None,
            bounds.exact(bias),
        )

    values = reference.dequantize_4bit(four_bit, torch.float32)
    return [x, t, u, bias], [
        (four_bit, torch.bfloat16, expected(values, torch.bfloat16, True)),
        (dense.bfloat16(), torch.float32, expected(dense.bfloat16(), torch.float32, False)),
    ]


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_layouts(size: tuple[int, int, int], transposed: bool, layout: str, at: str, isa: str) -> None:
    """Within the bound of fp64, nothing touched beyond any matrix, the same bits on any number of threads."""
    (x, t, u, bias), weights = product(size, transposed, at)
    for weight, dtype, expected in weights:
        if isinstance(weight, Tensor):
            given: object = laid_out(weight, layout, at)
        else:
            packed, absmax, nested, *rest = weight.kernel_args
            given = (guarded(packed, at), guarded(absmax, at), nested, *rest)
        addend = not isinstance(weight, Tensor)
        found = []
        for threads in (1, 2):
            out = guarded(torch.full((size[0], size[1]), torch.nan, dtype=dtype), at)
            args = (laid_out(t, layout, at), laid_out(u, layout, at)) if addend else (None, None)
            _cpu.matmul(
                out,
                laid_out(x, layout, at),
                given,
                transposed,
                0.5,
                *args,
                guarded(bias, at),
                None,
                threads,
            )
            found.append(out)
        bounds.check("out", found[0], expected)
        assert torch.equal(found[1], found[0])


@pytest.mark.skipif("amx" not in ISAS, reason="needs the level amx (make test-amx has it emulated)")
@pytest.mark.parametrize(
    ("rows", "outputs", "inner"),
    [
        # more outputs than wait between two parts of a contraction
        (225, 9330, 2304),
        # units of 32 and of 16 rows of W whose pointers stay in registers, and the last, which are not whole
        (2, 72, 640),
        (48, 72, 640),
        (64, 72, 640),
        (80, 72, 640),
        (100, 72, 640),
    ],
)
def test_amx_reads_blocks_of_64_in_place(rows: int, outputs: int, inner: int) -> None:
    x = torch.randn(rows, inner).bfloat16()
    weight = peftkern.quantize_4bit(torch.randn(outputs, inner))
    found = []
    with use_isa("amx"):
        for threads in (1, 2):
            out = torch.full((rows, outputs), torch.nan)
            _cpu.matmul(out, x, weight.kernel_args, False, 1.0, None, None, None, None, threads)
            found.append(out)
        compute = bounds.compute_dtype(torch.bfloat16)
    operand = bounds.operand(reference.dequantize_4bit(weight, torch.float32), compute)
    bounds.check("out", found[1], bounds.matmul(bounds.exact(x), operand, torch.float32))
    assert torch.equal(found[0], found[1])
