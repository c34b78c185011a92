"""The gradients on the side of the outputs, all from one read of dY [M, N]:

    G = alpha · dY B  [M, R]        dB = dYᵀ T  [N, R]        dbias = Σ_m dY[m, ·]  [N]

A program takes a tile of columns and a part of the rows. It keeps B's tile, and its sums of dB and dbias over
these rows; each step of rows also gives G's sum over these columns. What is not the whole sum goes to a
scratch buffer in fp32, and one launch adds up all such parts, in their order, and rounds: no atomics, so the
same bits always.

dY is read once, 2 M N bytes of 16 bits; the parts are 4 R M bytes of each tile of columns and 4 R N of each
part of the rows, written once and read once. At M = 8192, N = 4096 they are 10 MB at rank 16, 21 at 32 and 42
at 64, beside dY's 67. One product after the other reads dY twice, with dbias three times, in up to six
launches instead of two: beyond rank 64 that is less.

Hopper's tensor cores take dY from shared memory for both products, as it lies and transposed. The older ones
take it as left operand of the one and right operand of the other (Y_RIGHT), because the compiler loads ahead
of the loop only what neither takes transposed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.triton_kernels.arithmetic import brought_to, dot, rounded, sum_of_parts
from peftkern.triton_kernels.choices import Pass, output_grads_tile
from peftkern.triton_kernels.launch import TYPES, Launch, Layout, Machine, layout
from peftkern.triton_kernels.matmul import precision

FINISH_NUMBERS = 512  # of a program


@triton.jit
def _onto(acc, a, y, Y_RIGHT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + yᵀ a, or its transpose where y is the right operand."""
    if Y_RIGHT:
        return dot(tl.trans(a), y, acc, PRECISION)
    else:
        return dot(tl.trans(y), a, acc, PRECISION)


@triton.jit(do_not_specialize=["M", "steps_per_part"])
def output_grads(
    G, dB, dbias, dY, B, T,
    M, N, rank, steps_per_part,
    stride_g_tile, stride_gm, stride_gr, stride_db_part, stride_dbn, stride_dbr, stride_dbias_part,
    stride_dbias, stride_ym, stride_yn, stride_bn, stride_br, stride_tm, stride_tr, alpha,
    Y_RIGHT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """G, dB, dbias: the result where this program has the whole sum, else its fp32 parts; or None."""
    tile, part = tl.program_id(0), tl.program_id(1)
    n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    some_n, some_r = n < N, r < rank
    if G is not None:
        b = tl.load(
            B + n[:, None] * stride_bn + r[None, :] * stride_br,
            mask=some_n[:, None] & some_r[None, :],
            other=0.0,
        )
        b = brought_to(b, COMPUTE)
    if dB is not None:
        db = tl.zeros((BLOCK_R, BLOCK_N) if Y_RIGHT else (BLOCK_N, BLOCK_R), tl.float32)
    if dbias is not None:
        # a product with ones, the least that there is, for its sums: on tensor cores it costs nothing
        ones = rounded(tl.full((BLOCK_M, 16), 1.0, tl.float32), COMPUTE)
        sums = tl.zeros((16, BLOCK_N) if Y_RIGHT else (BLOCK_N, 16), tl.float32)
    first = part * steps_per_part
    for step in range(first, tl.minimum(first + steps_per_part, tl.cdiv(M, BLOCK_M))):
        m = (step * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        some_m = m < M
        y = tl.load(
            dY + m[:, None] * stride_ym + n[None, :] * stride_yn,
            mask=some_m[:, None] & some_n[None, :],
            other=0.0,
        )
        if dB is not None:
            t = tl.load(
                T + m[:, None] * stride_tm + r[None, :] * stride_tr,
                mask=some_m[:, None] & some_r[None, :],
                other=0.0,
            )
            db = _onto(db, brought_to(t, COMPUTE), y, Y_RIGHT, PRECISION)
        if dbias is not None:
            sums = _onto(sums, ones, y, Y_RIGHT, "ieee")  # a sum, whatever products may round to
        if G is not None:
            g = dot(y, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION) * alpha
            at = G + tile * stride_g_tile + m[:, None] * stride_gm + r[None, :] * stride_gr
            tl.store(at, rounded(g, G.dtype.element_ty), mask=some_m[:, None] & some_r[None, :])
    if dB is not None:
        if Y_RIGHT:
            db = tl.trans(db)
        at = dB + part * stride_db_part + n[:, None] * stride_dbn + r[None, :] * stride_dbr
        tl.store(at, rounded(db, dB.dtype.element_ty), mask=some_n[:, None] & some_r[None, :])
    if dbias is not None:
        if Y_RIGHT:
            sums = tl.trans(sums)
        # all columns are the same
        total = tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, sums, 0.0), axis=1)
        at = dbias + part * stride_dbias_part + n * stride_dbias
        tl.store(at, rounded(total, dbias.dtype.element_ty), mask=some_n)


@triton.jit
def _add_parts(
    out, parts, program, count, rows, columns, stride_part, stride_parts_row, stride_row, stride_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [rows, columns]: the sum of so many parts."""
    row = (program.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = sum_of_parts(total, parts + row * stride_parts_row + column, mask, stride_part, count)
    tl.store(out + row * stride_row + column * stride_column, rounded(total, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "column_tiles", "row_parts", "programs_g", "programs_db"])
def finish_output_grads(
    G, g_parts, dB, db_parts, dbias, dbias_parts,
    M, N, rank, column_tiles, row_parts, programs_g, programs_db,
    stride_gm, stride_gr, stride_dbn, stride_dbr, stride_dbias,
    NUMBERS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Those of the three that came in parts; the others None."""
    program = tl.program_id(0)
    ROWS: tl.constexpr = NUMBERS // BLOCK_R
    if G is not None:  # noqa: SIM102 (known when compiled; the next is not)
        if program < programs_g:
            _add_parts(
                G, g_parts, program, column_tiles, M, rank, rank, column_tiles * rank, stride_gm, stride_gr,
                ROWS, BLOCK_R,
            )  # fmt: skip
    program -= programs_g
    if dB is not None:  # noqa: SIM102
        if (program >= 0) & (program < programs_db):
            _add_parts(
                dB, db_parts, program, row_parts, N, rank, N * rank, rank, stride_dbn, stride_dbr,
                ROWS, BLOCK_R,
            )  # fmt: skip
    program -= programs_db
    if dbias is not None:  # noqa: SIM102
        if program >= 0:
            _add_parts(dbias, dbias_parts, program, row_parts, N, 1, N, 1, stride_dbias, 0, NUMBERS, 1)


class _Fixed(NamedTuple):
    """The launches of a plan without their tensors."""

    tile: Pass
    grid: tuple[int, int]
    arguments: dict[str, Any]
    programs: int  # of the kernel that adds up the parts
    finish: dict[str, Any]
    parts: dict[str, tuple[int, ...]]  # of the results that come in parts, the shapes of these


@lru_cache(maxsize=1024)
def _fixed(
    machine: Machine,
    precision: str,
    dY: Layout,
    B: Layout | None,
    T: Layout | None,
    G: Layout | None,
    dB: Layout | None,
    dbias: Layout | None,
    rank: int,
) -> _Fixed:
    dtype, (M, N), (stride_ym, stride_yn) = dY
    tile, rows, row_parts = output_grads_tile(M, N, rank, dtype == torch.float32, machine)
    columns = -(-N // tile.columns)
    strides = {
        "stride_gm": 0 if G is None else G[2][0],
        "stride_gr": 0 if G is None else G[2][1],
        "stride_dbn": 0 if dB is None else dB[2][0],
        "stride_dbr": 0 if dB is None else dB[2][1],
        "stride_dbias": 0 if dbias is None else dbias[2][0],
    }
    sizes = {"M": M, "N": N, "rank": rank, "BLOCK_R": tile.rank}
    arguments: dict[str, Any] = {
        **strides,
        **sizes,
        "stride_g_tile": 0,
        "stride_db_part": 0,
        "stride_dbias_part": 0,
        "steps_per_part": rows // tile.rows,
        "stride_ym": stride_ym,
        "stride_yn": stride_yn,
        "stride_bn": 0 if B is None else B[2][0],
        "stride_br": 0 if B is None else B[2][1],
        "stride_tm": 0 if T is None else T[2][0],
        "stride_tr": 0 if T is None else T[2][1],
        "Y_RIGHT": tile.y_right,
        "COMPUTE": TYPES[dtype],
        "PRECISION": precision,
        "BLOCK_N": tile.columns,
        "BLOCK_M": tile.rows,
    }
    parts: dict[str, tuple[int, ...]] = {}
    lines = FINISH_NUMBERS // tile.rank
    programs = {"G": 0, "dB": 0, "dbias": 0}
    if G is not None and columns > 1:
        parts["G"], programs["G"] = (M, columns, rank), -(-M // lines)
        arguments |= {"stride_g_tile": rank, "stride_gm": columns * rank, "stride_gr": 1}
    if dB is not None and row_parts > 1:
        parts["dB"], programs["dB"] = (row_parts, N, rank), -(-N // lines)
        arguments |= {"stride_db_part": N * rank, "stride_dbn": rank, "stride_dbr": 1}
    if dbias is not None and row_parts > 1:
        parts["dbias"], programs["dbias"] = (row_parts, N), -(-N // FINISH_NUMBERS)
        arguments |= {"stride_dbias_part": N, "stride_dbias": 1}
    finish = {
        **strides,
        **sizes,
        "column_tiles": columns,
        "row_parts": row_parts,
        "programs_g": programs["G"],
        "programs_db": programs["dB"],
        "NUMBERS": FINISH_NUMBERS,
    }
    return _Fixed(tile, (columns, row_parts), arguments, sum(programs.values()), finish, parts)


def plan(
    machine: Machine,
    G: Tensor | None,
    dB: Tensor | None,
    dbias: Tensor | None,
    dY: Tensor,
    B: Tensor | None,
    T: Tensor | None,
    alpha: float,
) -> list[Launch]:
    """The launches that compute those asked for, of a rank that `output_grads_tile` has.

    dY [M, N], B [N, R], T [M, R] of any strides, M and N not 0. The scratch buffers, fp32: [M, column tiles,
    R] for G where N is more than one tile, [row parts, N, R] and [row parts, N] for dB and dbias where the
    rows have parts: of choices.PART_ROWS at least, and no more of them than fill the machine.
    """
    B, T = None if G is None else B, None if dB is None else T
    rank = next((matrix.shape[1] for matrix in (B, T) if matrix is not None), 0)
    if rank == 0:
        G = dB = B = T = None
    if G is None and dB is None and dbias is None:
        return []
    fixed = _fixed(
        machine, precision() if dY.dtype == torch.float32 else "ieee", layout(dY), layout(B), layout(T),
        layout(G), layout(dB), layout(dbias), rank,
    )  # fmt: skip
    results = {"G": G, "dB": dB, "dbias": dbias}
    parts = {
        name: torch.empty(shape, dtype=torch.float32, device=dY.device) for name, shape in fixed.parts.items()
    }
    operands = {"dY": dY, "B": B, "T": T, "alpha": float(alpha)}
    arguments = {**fixed.arguments, **results, **parts, **operands}
    launches = [Launch(output_grads, fixed.grid, arguments, fixed.tile.warps, fixed.tile.stages)]
    if parts:
        finish = {
            **fixed.finish,
            **{name: results[name] if name in parts else None for name in results},
            "g_parts": parts.get("G"),
            "db_parts": parts.get("dB"),
            "dbias_parts": parts.get("dbias"),
        }
        launches.append(Launch(finish_output_grads, (fixed.programs,), finish))
    return launches
