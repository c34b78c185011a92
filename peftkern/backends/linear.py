"""The frozen linear layer with its adapter, composed of a backend's products: what a backend has no kernel of
its own for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.backends import Dropout, Mask, Primitive, Spread, Weight4


class ComposedLinear(NamedTuple):
    """`linear` and `linear_grad`."""

    matmul: Primitive
    matmul_dense: Primitive
    output_grads: Primitive

    def _base(
        self,
        out: Tensor,
        x: Tensor,
        weight: Weight4 | Tensor,
        transposed: bool,
        t: Tensor | None,
        u: Tensor | None,
        bias: Tensor | None,
        mask: Mask | None,
    ) -> None:
        if isinstance(weight, Tensor):
            self.matmul_dense(out, x, weight, transposed, t, u, bias, None, mask)
        else:
            self.matmul(out, x, weight, transposed, 1.0, t, u, bias, None, mask)

    def forward(
        self,
        out: Tensor,
        T: Tensor | None,
        x: Tensor,
        weight: Weight4 | Tensor,
        A: Tensor | None,
        B: Tensor | None,
        scaling: float,
        dropout: Dropout | None,
        bias: Tensor | None,
    ) -> None:
        if A is not None:
            if T is None:
                T = x.new_empty(x.shape[0], A.shape[0])
            mask = None if dropout is None else ("x", *dropout)
            self.matmul(T, x, A, False, scaling, None, None, None, None, mask)
        self._base(out, x, weight, False, T, B, bias, None)

    def backward(
        self,
        dx: Tensor | None,
        dA: Tensor | None,
        dB: Tensor | None,
        dbias: Tensor | None,
        dY: Tensor,
        x: Tensor | None,
        weight: Weight4 | Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        T: Tensor | None,
        scaling: float,
        dropout: Dropout | None,
    ) -> None:
        """Beside the gradients: G [M, R] of dY's dtype."""
        G = None
        if B is not None and (dx is not None or dA is not None):
            G = dY.new_empty(dY.shape[0], B.shape[1])
        if G is not None or dB is not None or dbias is not None:
            given = None if G is None else B, None if dB is None else T
            self.output_grads(G, dB, dbias, dY, *given, scaling)
        if dA is not None:
            assert G is not None
            mask = None if dropout is None else ("weight", *dropout)
            self.matmul(dA, G.t(), x, True, 1.0, None, None, None, None, mask)  # Gᵀ dropout(x)
        if dx is not None:
            assert weight is not None
            u = None if A is None else A.t()
            mask = None if dropout is None else ("addend", *dropout)
            self._base(dx, dY, weight, True, G, u, None, mask)


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
    mask: Mask | None = None,
) -> None:
    """A dense W of x's dtype by torch's GEMM: `matmul`, the backend's own, writes the addends in one thin
    pass, and the GEMM then adds to them in its own epilogue."""
    w = weight if transposed else weight.t()
    if spread is None and (t is None or u is None):
        if bias is None:
            torch.mm(x, w, out=out)
        else:
            torch.addmm(bias.to(x.dtype), x, w, out=out)
        return
    if mask is not None:  # on the addend
        matmul(out, x[:, :0], w[:0], True, 1.0, t, u, bias, spread, mask)
    else:
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
    """The gradients on the side of the outputs, those that are asked for, a pass over dY for each:
    G = alpha dY B, dB = dYᵀ T, dbias = sum_m dY[m]."""
    if dB is not None:
        assert T is not None
        matmul(dB.t(), T.t(), dY, True, 1.0, None, None, None, None)  # Tᵀ dY
    if G is not None:
        matmul(G, dY, B, True, alpha, None, None, None, None)
    if dbias is not None:
        # 1ᵀ dY, summed in fp32: torch's sum would make an fp32 copy of dY first
        ones = dY.new_ones(1, 1).expand(1, dY.shape[0])
        matmul(dbias.view(1, -1), ones, dY, True, 1.0, None, None, None, None)
