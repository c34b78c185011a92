"""Rows of primitives: what a backend offers to the dispatcher, and the one calling convention they share.

A primitive writes into `out`, which the caller allocated; it allocates nothing that outlives the call.

    matmul(out, x, weight, transposed, alpha, t, u, bias)
        out[m, o] = alpha * (sum_c x[m, c] w(o, c) + sum_r t[m, r] u[o, r]) + bias[o]
        plain:       w(o, c) = W[o, c], W is [outputs, inner]
        transposed:  w(o, c) = W[c, o], W is [inner, outputs]
        weight is a Weight4 or a dense matrix; t, u and bias may be None; matrices are 2-D with any strides.
    matmul_dense(out, x, weight, transposed, t, u, bias)
        the same with alpha = 1, for a big dense W of x's dtype, where a vendor's GEMM is the best kernel
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

Primitive = Callable[..., None]


class Call(NamedTuple):
    """What the choice of a backend depends on."""

    primitive: str
    device: torch.device
    dtype: torch.dtype  # of x for matmul and dropout, of out for dequantize, of weight for quantize

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
