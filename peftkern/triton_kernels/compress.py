"""MoRA's compress: [M, I] → [M, P], each output the sum of the inputs that belong to it; then, perhaps,
rotated.

    cyclic, length L    z[m, q] = sum over p < L, p = q (mod P), of x[m, p mod I]
    grouped             z[m, q] = the sum of group q: I columns in P groups, the first I mod P one longer
    rotation [n, 2, h]  blocks of 2h columns, n of them: (z[j], z[j + h]) turned by the angle of (block, j)

x is read once (twice when rotated: an output's partner is summed again, from L1), z is written once. fp32
sums in the order of p; the rotation in fp32; one rounding. No atomics, so the same bits always.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from peftkern.triton_kernels.arithmetic import rounded, widened
from peftkern.triton_kernels.launch import Launch

ROWS, COLUMNS = 4, 256


@triton.jit
def _sum(line, q, mask, inputs, outputs, length, stride, GROUPED: tl.constexpr):
    if GROUPED:
        size = inputs // outputs
        longer = inputs % outputs
        first = q * size + tl.minimum(q, longer)
        count = tl.where(q < longer, size + 1, size)
        z = widened(tl.load(line + first.to(tl.int64) * stride, mask=mask & (count > 0), other=0.0))
        for i in range(1, size + 1):
            z += widened(
                tl.load(line + (first + i).to(tl.int64) * stride, mask=mask & (i < count), other=0.0)
            )
        return z
    else:
        z = widened(tl.load(line + (q % inputs).to(tl.int64) * stride, mask=mask & (q < length), other=0.0))
        for start in range(outputs, length, outputs):
            p = start + q
            z += widened(
                tl.load(line + (p % inputs).to(tl.int64) * stride, mask=mask & (p < length), other=0.0)
            )
        return z


@triton.jit(do_not_specialize=["M", "inputs", "outputs", "length", "half"])
def compress(
    out, x, rotation, M, inputs, outputs, length, half,
    stride_out, stride_xm, stride_xc,
    GROUPED: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    q = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]  # 32 bits: divided by
    mask = (m < M) & (q < outputs)
    line = x + m * stride_xm
    z = _sum(line, q, mask, inputs, outputs, length, stride_xc, GROUPED)
    if rotation is not None:
        side = 2 * half
        block = q // side
        j = q % side
        lower = j < half
        partner = tl.where(lower, q + half, q - half)
        other = _sum(line, partner, mask, inputs, outputs, length, stride_xc, GROUPED)
        table = rotation + block * side + tl.where(lower, j, j - half)
        cosine = tl.load(table, mask=q < outputs, other=0.0)
        sine = tl.load(table + half, mask=q < outputs, other=0.0)
        if INVERSE:
            sine = -sine
        z = tl.where(lower, z * cosine - other * sine, z * cosine + other * sine)
    tl.store(out + m * stride_out + q, rounded(z, out.dtype.element_ty), mask=mask)


def plan(
    out: Tensor, x: Tensor, grouped: bool, length: int, rotation: Tensor | None, inverse: bool
) -> list[Launch]:
    """out [M, P] of unit column stride; x [M, I] of any strides; rotation fp32 [n, 2, h], contiguous."""
    M, outputs = out.shape
    if M == 0 or outputs == 0:
        return []
    arguments: dict[str, Any] = {
        "out": out,
        "x": x,
        "rotation": rotation,
        "M": M,
        "inputs": x.shape[1],
        "outputs": outputs,
        "length": length,
        "half": 1 if rotation is None else rotation.shape[2],
        "stride_out": out.stride(0),
        "stride_xm": x.stride(0),
        "stride_xc": x.stride(1),
        "GROUPED": grouped,
        "INVERSE": inverse,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
    }
    return [Launch(compress, (-(-M // ROWS), -(-outputs // COLUMNS)), arguments)]
