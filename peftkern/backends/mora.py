"""MoRA, composed of a backend's other rows: what a backend has no kernel of its own for.

The middle of several blocks is as wide as x, so it is made for some rows at a time and never for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.backends import Middle, Primitive, Weight4
from peftkern.backends.parts import cut, split


def _is_middle(x: Tensor, columns: int) -> bool:
    """Whether x, not turned, may be read or written in place of the middle."""
    return x.shape[1] == columns and x.is_contiguous()


class ComposedMora(NamedTuple):
    """`mora` without a weight, and `mora_grad`."""

    matmul: Primitive
    compress: Primitive
    scratch: int  # bytes of what is made in between for some rows

    def alone(
        self,
        out: Tensor,
        z: Tensor | None,
        x: Tensor,
        transposed: bool,
        matrix: Tensor,
        scaling: float,
        bias: Tensor | None,
        middle: Middle,
    ) -> None:
        """Beside out: the middle of a part in x's dtype, in fp32 and, turned back, in fp32; none where z, x
        or out is it."""
        inner, outer, columns, rotation = middle
        (M, outputs), size, whole = out.shape, matrix.shape[0], (False, columns)
        before, after = (None, rotation) if transposed else (rotation, None)
        part = split(M, self.scratch // (columns * (x.element_size() + 4)))
        made = z is None and not (before is None and inner == whole and _is_middle(x, columns))
        buffer = x.new_empty(part, columns) if made else None
        written = bias is None and outer == whole and _is_middle(out, columns)
        values = None if written else x.new_empty(part, columns, dtype=torch.float32)
        turned = None if after is None else x.new_empty(part, columns, dtype=torch.float32)
        for start in range(0, M, part):
            rows = min(part, M - start)
            X, Y = cut(x, start, rows), cut(out, start, rows)
            Z = X
            if z is not None:
                Z = cut(z, start, rows)
            elif buffer is not None:
                Z = cut(buffer, 0, rows)
            if Z is not X:
                self.compress(Z, X, *inner, before, False)
            V = Y if values is None else cut(values, 0, rows)
            U = V if turned is None else cut(turned, 0, rows)
            self.matmul(U.view(-1, size), Z.view(-1, size), matrix, transposed, scaling, None, None, None)
            if turned is not None:
                self.compress(V, U, *whole, after, True)
            if values is not None:  # a product of nothing
                empty = Y.new_empty(outputs, 0)
                self.matmul(Y, X[:, :0], empty, False, 1.0, None, None, bias, (V, *outer))

    def grad(
        self, dM: Tensor, dY: Tensor, x: Tensor, scaling: float, columns: int, rotation: Tensor | None
    ) -> None:
        """Beside dM: the middles of a part in x's dtype, and once more dM. x's shape and dtype alone decide
        on the parts: dM, a sum over them, has the same bits for any number of threads."""
        M, size = x.shape[0], dM.shape[0]
        if M == 0:
            dM.zero_()
            return
        made = [not (rotation is None and _is_middle(x, columns)), not _is_middle(dY, columns)]
        part = split(M, self.scratch // (columns * x.element_size() * sum(made))) if any(made) else M
        zs, gs = (x.new_empty(part, columns) if needed else None for needed in made)
        term = dM
        for start in range(0, M, part):
            rows = min(part, M - start)
            z, g = cut(x, start, rows), cut(dY, start, rows)
            if zs is not None:
                z = cut(zs, 0, rows)
                self.compress(z, cut(x, start, rows), False, columns, rotation, False)
            if gs is not None:
                g = cut(gs, 0, rows)
                self.compress(g, cut(dY, start, rows), False, dY.shape[1], None, False)
            self.matmul(term, g.view(-1, size).t(), z.view(-1, size), True, scaling, None, None, None)
            if start:
                dM.add_(term)
            elif rows < M:
                term = torch.empty_like(dM)


class OntoBase(NamedTuple):
    """`mora`: what `alone` makes in fp32 is spread in the epilogue of the product with the base. With several
    blocks, which keep no z, it is as wide as x: `most` rows at a time, for which the base is decoded or
    streamed anew."""

    alone: Primitive
    matmul: Primitive
    matmul_dense: Primitive
    most: int | None

    def mora(
        self,
        out: Tensor,
        z: Tensor | None,
        x: Tensor,
        weight: Weight4 | Tensor | None,
        transposed: bool,
        matrix: Tensor,
        scaling: float,
        bias: Tensor | None,
        middle: Middle,
    ) -> None:
        M = x.shape[0]
        if weight is None:
            self.alone(out, z, x, transposed, matrix, scaling, bias, middle)
            return
        columns, outer = middle.columns, middle.outer
        to_middle = middle._replace(outer=(False, columns))
        step = M if self.most is None or columns == matrix.shape[0] else split(M, self.most)
        values = x.new_empty(min(M, step), columns, dtype=torch.float32)
        for start in range(0, M, max(1, step)):
            rows = min(step, M - start)
            X, Y, V = cut(x, start, rows), cut(out, start, rows), cut(values, 0, rows)
            self.alone(V, z, X, transposed, matrix, scaling, None, to_middle)
            if isinstance(weight, Tensor):
                self.matmul_dense(Y, X, weight, transposed, None, None, bias, (V, *outer))
            else:
                self.matmul(Y, X, weight, transposed, 1.0, None, None, bias, (V, *outer))
