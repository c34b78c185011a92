"""Rows of primitives: what a backend offers to the dispatcher, and the one calling convention they share.

A primitive writes into `out`, which the caller allocated; it allocates nothing that outlives the call.
matmul is no row: it is what a backend makes its rows of, and what those that are composed are given
(linear.py, mora.py; a backend that masks nothing as it loads takes dropout.py for `mask`).

    matmul(out, x, weight, transposed, alpha, t, u, bias, spread, mask)
        out[m, o] = alpha * (sum_c x[m, c] w(o, c) + sum_r t[m, r] u[o, r]) + bias[o] + s(m, o)
        plain:       w(o, c) = W[o, c], W is [outputs, inner]
        transposed:  w(o, c) = W[c, o], W is [inner, outputs]
        weight is a Weight4 or a dense matrix; t, u, bias, spread and mask may be None; matrices are 2-D with
        any strides. inner = 0 (x [M, 0], weight [outputs, 0]) leaves the addends.
        spread = (v, grouped, length), v fp32 [M, P], P >= 1, with a column stride of 1:
        grouped:     s(m, o) = v[m, g(o)], the outputs cut into P contiguous groups, the first outputs mod P
                     of them one longer than the others
        cyclic:      s(m, o) = sum of v[m, p mod P] over those p < length with p mod outputs = o
        mask = (where, p, seed) puts 0 for what dropout drops, by its row-major index, where it is
        "x":         of x; then no t, bias, spread
        "weight":    of a dense W, transposed; then no t, bias, spread
        "addend":    of sum_r t[m, r] u[o, r], [M, outputs]; then t and u, alpha = 1, no spread
    linear(out, T, x, weight, A, B, scaling, dropout, bias)
        the frozen layer and, unless A and B are None, its low-rank adapter; A [R, K] and B [N, R]:
        T = scaling * dropout(x) Aᵀ [M, R] of x's dtype, contiguous      out = x Wᵀ + T Bᵀ + bias [M, N]
        T is where it is to be written, or None; weight as in matmul, a dense one of x's dtype; dropout None
        or (p, seed)
    linear_grad(dx, dA, dB, dbias, dY, x, weight, A, B, T, scaling, dropout)
        what is not asked for is None, and so may be what only that needs; with G = scaling * dY B [M, R]:
        dx = dY W + dropout(G A)    dA = Gᵀ dropout(x)    dB = dYᵀ T    dbias = sum_m dY[m]
        each alone has the bits that it has beside the others
    compress(out, x, grouped, length, rotation, inverse)
        out [M, P] fp32, bf16 or fp16 with a column stride of 1; x [M, I], any strides; the adjoint of spread:
        grouped:     out[m, q] = sum of x[m, i] over g(i) = q, I columns in P groups (0 for an empty one)
        cyclic:      out[m, q] = sum of x[m, p mod I] over those p < length with p mod P = q
        rotation     None, or fp32 [n, 2, h] (cos, sin), contiguous, n * 2h = P: block b of 2h columns becomes
                     (z1 cos - z2 sin, z2 cos + z1 sin), z1 and z2 its halves; sin negated when inverse
        all in fp32 with one rounding to out's dtype at the end
    mora(out, z, x, weight, transposed, matrix, scaling, bias, middle)
        MoRA and, with x's and out's ends swapped, its own adjoint; matrix [r̂, r̂], weight as in matmul or
        None; middle = (inner, outer, columns, rotation): columns = n r̂, inner and outer (grouped, length) as
        in compress and spread, rotation None or fp32 [n, 2, r̂ / 2] as in compress
        plain:       out = x Wᵀ + bias + spread(v, outer), of each block of r̂ columns
                     v_b = scaling * z_b matrixᵀ in fp32,
                     z = compress(x, inner, rotation) [M, columns] in x's dtype
        transposed:  out = x W + bias + spread(v, outer), v_b = scaling * z_b matrix, turned back,
                     z = compress(x, inner)
        z is None or, with one block, where it is to be written, contiguous
    mora_grad(dM, dY, x, scaling, columns, rotation)
        dM [r̂, r̂] fp32 = scaling * sum over rows and blocks of g_bᵀ z_b,
        g = compress(dY, cyclic, dY's columns), z = compress(x, cyclic, columns, rotation): the middles of the
        plain and the transposed product with several blocks; with one block both are given
    dequantize(out, weight)              out: contiguous [N, K] fp32, bf16 or fp16; weight: Weight4
    quantize(weight, packed, absmax, quant_type, blocksize)
        packed uint8 [ceil(N K / 2)] and absmax fp32 [ceil(N K / blocksize)] from a contiguous weight

Dropout drops by a hash of (seed, index), seed an int64 scalar tensor, and does not scale what it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# absmax2 fp32, code fp32 [256], offset fp32 scalar, blocksize2
Nested4 = tuple[Tensor, Tensor, Tensor, int]
# packed, absmax, nested, quant_type, blocksize, N, K
Weight4 = tuple[Tensor, Tensor, Nested4 | None, str, int, int, int]
# values, grouped, length
Spread = tuple[Tensor, bool, int]
# where, p, seed
Mask = tuple[str, float, Tensor]
# p, seed
Dropout = tuple[float, Tensor]
# grouped, length: how one end of MoRA is walked, as in compress and spread
Walk = tuple[bool, int]


class Middle(NamedTuple):
    """How MoRA goes from x's columns to those of the middle, and from these to out's."""

    inner: Walk
    outer: Walk
    columns: int
    rotation: Tensor | None


Primitive = Callable[..., None]


class Call(NamedTuple):
    """What the choice of a backend depends on, and the story that is told of it."""

    primitive: str
    device: torch.device
    # of x for linear, compress and mora, of dY for the gradients, of out for dequantize, of weight
    # for quantize
    dtype: torch.dtype
    # nothing depends on these but the words of `explain`
    rows: int = 0  # of x
    weight: Weight4 | Tensor | None = None

    def __str__(self) -> str:
        return f"{self.primitive} {str(self.dtype).removeprefix('torch.')} on {self.device}"


@dataclass(frozen=True)
class Backend:
    name: str
    rows: Mapping[str, Primitive]
    supports: Callable[[Call], str | None]  # None, or why it cannot run the call
    detail: Callable[[Call], str]  # the kernel that would run, in a few words
    missing: Callable[[], str | None]  # why the whole backend is absent from this installation, or None


def unavailable(backend: Backend, call: Call) -> str | None:
    """None when `backend` can run `call`, else the reason in words."""
    missing: Any = backend.missing()
    if missing is not None:
        return str(missing)
    if call.primitive not in backend.rows:
        return f"it has no {call.primitive}"
    return backend.supports(call)
