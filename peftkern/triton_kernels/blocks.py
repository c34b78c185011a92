"""MoRA of several blocks as an addend of the product: M is turned, not x.

Block b of the middle is z_b = R_b x̃_b, with R_b the turn of that block, and v_b = M z_b = (M R_b) x̃_b. With
U_b = M R_b, made once for all rows (by `compress`, which turns M's rows back), type 6 is a few steps more of
the same sum for a tile of outputs, in which x is read where it lies, and its adjoint reads the same U.
Nothing as wide as x or y is made. U has n r̂² ≈ I r̂ numbers: 2 MB at 4096² and r̂ = 256, beside 8 MB of W and 4
MB of x at 512 rows; the multiply-adds are r̂ / I more, 6 %. At a few rows, too, one launch that writes U
beside W's 8 MB costs less than those that turn x and multiply it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peftkern.triton_kernels.arithmetic import brought_to, dot, rounded, widened


@triton.jit
def _wrapped_at(t, row, start, r, size, columns, stride_tm, stride_tr, ALIGNED: tl.constexpr):
    """x̃[row, start + r], x̃ repeating the columns of t: [r, m]."""
    if ALIGNED:  # a step lies in one repetition, at a multiple of 16
        at = tl.multiple_of(start % columns, 16) + tl.arange(0, r.shape[0])
    else:
        at = (start + tl.arange(0, r.shape[0])) % columns
    return tl.load(
        t + row[None, :] * stride_tm + at.to(tl.int64)[:, None] * stride_tr,
        mask=(r < size)[:, None],
        other=0.0,
    )


@triton.jit
def _summed_at(t, row, start, r, size, width, columns, stride_tm, stride_tr, COMPUTE: tl.constexpr):
    """Σ_k t[row, start + r + k · width] over the columns of t: [r, m], rounded once."""
    at = (start + tl.arange(0, r.shape[0])).to(tl.int64)
    line = t + row[None, :] * stride_tm
    inside = (r < size)[:, None]
    value = tl.load(line + at[:, None] * stride_tr, mask=inside & (at < columns)[:, None], other=0.0)
    if columns > width:
        total = widened(value)
        for _ in range(width, columns, width):
            at += width
            more = tl.load(line + at[:, None] * stride_tr, mask=inside & (at < columns)[:, None], other=0.0)
            total += widened(more)
        value = rounded(total, COMPUTE)
    return value


@triton.jit
def blocks_addend(
    acc, t, u, row, column, first_column, outputs, size, count, columns, scaling, stride_tm, stride_tr,
    stride_ub, stride_uo, stride_ur,
    ADJOINT: tl.constexpr, ALIGNED: tl.constexpr, LOCAL: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scaling · (acc[o, m] + the addend of output o), of `count` blocks of `size` inputs and outputs, width =
    size · count; t [M, columns], u [block, o, r] by its strides; column [o] begins at first_column.

    plain:    sum_r u[b, i, r] x̃[m, b · size + r], o = (block of repetition) · size + i, x̃ repeating t
    ADJOINT:  the same summed over o + k · outputs < width, in place of x̃ t summed over repetitions of width
    ALIGNED:  16 divides size and the columns of x̃; for the adjoint t is not summed: columns = width
    LOCAL:    what is not finite stays in its block, where nothing else carries it further
    """
    BLOCK_O: tl.constexpr = acc.shape[0]
    last_column = tl.minimum(first_column + BLOCK_O, outputs) - 1
    width = size * count
    repetitions = 1
    if ADJOINT:
        repetitions = tl.cdiv(width - first_column, outputs)
    for k in range(repetitions):
        shift = k * outputs
        first = (first_column + shift) // size
        last = (last_column + shift) // size
        if ADJOINT:
            last = tl.minimum(last, count - 1)
        # a tile lies in one block, or in a few whose rows of u follow one another
        for b in range(first, last + 1):
            block = b % count
            i = column + shift - b * size
            mine = ((i >= 0) & (i < size))[:, None]
            part = tl.zeros(acc.shape, tl.float32) if LOCAL else acc
            line = u + block.to(tl.int64) * stride_ub + i[:, None] * stride_uo
            for start in range(0, size, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                u_tile = tl.load(line + r[None, :] * stride_ur, mask=mine & (r < size)[None, :], other=0.0)
                at = block * size + start
                if ADJOINT and not ALIGNED:
                    t_tile = _summed_at(t, row, at, r, size, width, columns, stride_tm, stride_tr, COMPUTE)
                else:
                    t_tile = _wrapped_at(t, row, at, r, size, columns, stride_tm, stride_tr, ALIGNED)
                part = dot(brought_to(u_tile, COMPUTE), brought_to(t_tile, COMPUTE), part, PRECISION)
            acc = tl.where(mine, acc + part, acc) if LOCAL else part
    return acc * scaling
