"""Dropout inside a product, for backends whose kernels do not mask what they load."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.backends import Mask, Primitive, Spread, Weight4
from peftkern.backends.parts import cut, split


class Masked(NamedTuple):
    """`matmul` with a mask, by a matmul that has none: some rows of the masked operand at a time are dropped
    into a buffer of `scratch` bytes at most, or one row; of the addend to a 4-bit W, `rows` in fp32."""

    plain: Primitive
    dropout: Primitive  # (out, x, p, seed, start); out may be x
    scratch: int  # bytes of such a buffer
    rows: int  # of x, for which a 4-bit W is decoded anew

    def matmul(
        self,
        out: Tensor,
        x: Tensor,
        weight: Weight4 | Tensor,
        transposed: bool = False,
        alpha: float = 1.0,
        t: Tensor | None = None,
        u: Tensor | None = None,
        bias: Tensor | None = None,
        spread: Spread | None = None,
        mask: Mask | None = None,
    ) -> None:
        if mask is None:
            self.plain(out, x, weight, transposed, alpha, t, u, bias, spread)
        elif mask[0] == "x":
            self._x(out, x, weight, transposed, alpha, *mask[1:])
        elif mask[0] == "weight":
            assert isinstance(weight, Tensor)
            self._weight(out, x, weight, alpha, *mask[1:])
        else:
            assert t is not None
            assert u is not None
            self._addend(out, x, weight, transposed, t, u, bias, *mask[1:])

    def _part(self, rows: int, columns: int, size: int) -> int:
        return split(rows, self.scratch // max(1, columns * size))

    def _x(
        self,
        out: Tensor,
        x: Tensor,
        weight: Weight4 | Tensor,
        transposed: bool,
        alpha: float,
        p: float,
        seed: Tensor,
    ) -> None:
        M, columns = x.shape
        part = self._part(M, columns, x.element_size())
        buffer = x.new_empty(part, columns)
        for start in range(0, M, part):
            rows = min(part, M - start)
            kept = cut(buffer, 0, rows)
            self.dropout(kept, cut(x, start, rows), p, seed, start * columns)
            self.plain(cut(out, start, rows), kept, weight, transposed, alpha, None, None, None, None)

    def _weight(self, out: Tensor, x: Tensor, weight: Tensor, alpha: float, p: float, seed: Tensor) -> None:
        """alpha x dropout(W), W [inner, outputs]: its parts, of which the shape alone decides, are summed in
        fp32."""
        inner, outputs = weight.shape
        part = self._part(inner, outputs, weight.element_size())
        buffer = weight.new_empty(part, outputs)
        total = out if part >= inner else torch.empty(out.shape, dtype=torch.float32, device=out.device)
        term = total
        for start in range(0, max(1, inner), part):
            rows = min(part, inner - start)
            kept = cut(buffer, 0, rows)
            self.dropout(kept, cut(weight, start, rows), p, seed, start * outputs)
            self.plain(term, x[:, start : start + rows], kept, True, alpha, None, None, None, None)
            if start:
                total.add_(term)
            elif total is not out:
                term = torch.empty_like(total)
        if total is not out:
            out.copy_(total)

    def _addend(
        self,
        out: Tensor,
        x: Tensor,
        weight: Weight4 | Tensor,
        transposed: bool,
        t: Tensor,
        u: Tensor,
        bias: Tensor | None,
        p: float,
        seed: Tensor,
    ) -> None:
        M, columns = out.shape
        if columns == 0:
            return
        part = self._part(M, columns, 4) if isinstance(weight, Tensor) else split(M, self.rows)
        addend = x.new_empty(part, columns, dtype=torch.float32)
        for start in range(0, M, part):
            rows = min(part, M - start)
            V, X = cut(addend, 0, rows), cut(x, start, rows)
            self.plain(V, cut(t, start, rows), u, False, 1.0, None, None, None, None)
            self.dropout(V, V, p, seed, start * columns)
            spread = (V, False, columns)
            self.plain(cut(out, start, rows), X, weight, transposed, 1.0, None, None, bias, spread)
