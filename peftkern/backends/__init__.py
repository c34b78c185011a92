"""Rows of primitives: what a backend offers to the dispatcher, and the one calling convention they share.

A primitive writes into `out`, which the caller allocated; it allocates nothing that outlives the call.

    matmul(out, x, weight, transposed, alpha, t, u, bias, spread)
        out[m, o] = alpha * (sum_c x[m, c] w(o, c) + sum_r t[m, r] u[o, r]) + bias[o] + s(m, o)
        plain:       w(o, c) = W[o, c], W is [outputs, inner]
        transposed:  w(o, c) = W[c, o], W is [inner, outputs]
        weight is a Weight4 or a dense matrix; t, u, bias and spread may be None; matrices are 2-D with any
        strides. inner = 0 (x [M, 0], weight [outputs, 0]) leaves the addends.
        spread = (v, grouped, length), v fp32 [M, P], P >= 1, with a column stride of 1:
        grouped:     s(m, o) = v[m, g(o)], the outputs cut into P contiguous groups, the first outputs mod P
                     of them one longer than the others
        cyclic:      s(m, o) = sum of v[m, p mod P] over those p < length with p mod outputs = o
    matmul_dense(out, x, weight, transposed, t, u, bias, spread)
        the same with alpha = 1, for a big dense W of x's dtype, where a vendor's GEMM is the best kernel
    output_grads(G, dB, dbias, dY, B, T, alpha)
        a low-rank adapter's gradients on the side of its outputs, and the bias's; dY [M, N], B [N, R] and
        T [M, R] have any strides. What is not asked for is None, and so is B without G, T without dB:
        G = alpha dY B [M, R] of dY's dtype        dB = dYᵀ T [N, R]        dbias = sum_m dY[m] [N]
    compress(out, x, grouped, length, rotation, inverse)
        out [M, P] fp32, bf16 or fp16 with a column stride of 1; x [M, I], any strides; the adjoint of spread:
        grouped:     out[m, q] = sum of x[m, i] over g(i) = q, I columns in P groups (0 for an empty one)
        cyclic:      out[m, q] = sum of x[m, p mod I] over those p < length with p mod P = q
        rotation     None, or fp32 [n, 2, h] (cos, sin), contiguous, n * 2h = P: block b of 2h columns becomes
                     (z1 cos - z2 sin, z2 cos + z1 sin), z1 and z2 its halves; sin negated when inverse
        all in fp32 with one rounding to out's dtype at the end
    mora(out, z, x, weight, transposed, matrix, scaling, bias, inner, outer, columns, rotation)
        MoRA and, with x's and out's ends swapped, its own adjoint; matrix [r̂, r̂], columns = n r̂, weight as in
        matmul or None, inner and outer (grouped, length) as in compress and spread, rotation None or
        fp32 [n, 2, r̂ / 2] as in compress
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
    dropout(out, x, p, seed)             out = x where kept, else 0 (unscaled); seed: int64 scalar tensor
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
# grouped, length: how one end of MoRA is walked, as in compress and spread
Walk = tuple[bool, int]

Primitive = Callable[..., None]


class Call(NamedTuple):
    """What the choice of a backend depends on."""

    primitive: str
    device: torch.device
    # of x for matmul, compress, mora and dropout, of dY for the gradients, of out for dequantize, of weight
    # for quantize
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.primitive} {str(self.dtype).removeprefix('torch.')} on {self.device}"


def gemm_onto(
    matmul: Primitive,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    t: Tensor | None,
    u: Tensor | None,
    bias: Tensor | None,
    spread: Spread | None = None,
) -> None:
    """matmul_dense by torch's GEMM: `matmul`, the backend's own, writes the addends in one thin pass, and the
    GEMM then adds to them in its own epilogue."""
    w = weight if transposed else weight.t()
    if spread is None and (t is None or u is None):
        if bias is None:
            torch.mm(x, w, out=out)
        else:
            torch.addmm(bias.to(x.dtype), x, w, out=out)
        return
    if t is None or u is None:
        t, u = x[:, :0], w.t()[:, :0]
    matmul(out, t, u, False, 1.0, None, None, bias, spread)
    out.addmm_(x, w)


def product_by_product(
    matmul: Primitive,
    G: Tensor | None,
    dB: Tensor | None,
    dbias: Tensor | None,
    dY: Tensor,
    B: Tensor | None,
    T: Tensor | None,
    alpha: float,
) -> None:
    """output_grads by `matmul`, the backend's own: a pass over dY for each."""
    if dB is not None:
        assert T is not None
        matmul(dB.t(), T.t(), dY, True, 1.0, None, None, None, None)  # Tᵀ dY
    if G is not None:
        matmul(G, dY, B, True, alpha, None, None, None, None)
    if dbias is not None:
        # 1ᵀ dY, summed in fp32: torch's sum would make an fp32 copy of dY first
        ones = dY.new_ones(1, 1).expand(1, dY.shape[0])
        matmul(dbias.view(1, -1), ones, dY, True, 1.0, None, None, None, None)


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
