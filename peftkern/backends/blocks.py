"""MoRA of several blocks, composed of a backend's other rows.

Its middle is as wide as x, so it is made for some rows at a time and never for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.backends import Primitive, Weight4


class _Block(NamedTuple):
    """Rows that go through the product with the base at once, and their parts (start, rows), each of which
    goes through what is before it at once."""

    start: int
    rows: int
    parts: list[tuple[int, int]]


def _split(rows: int, most: int) -> int:
    """The size of as few equal parts as there can be."""
    return -(-rows // -(-rows // most))


def _cut(tensor: Tensor, start: int, rows: int) -> Tensor:
    return tensor if tensor.shape[0] == rows else tensor[start : start + rows]


def _is_middle(x: Tensor, width: int) -> bool:
    """Whether x, not turned, may be read or written in place of the middle."""
    return x.shape[1] == width and x.is_contiguous()


class Blocks(NamedTuple):
    matmul: Primitive
    matmul_dense: Primitive
    compress: Primitive
    rows: int  # at most, through a base: it is decoded or streamed anew for each row block
    scratch: int  # bytes of a part's middle in x's dtype and in fp32

    def _row_blocks(self, x: Tensor, width: int, based: bool) -> list[_Block]:
        """The first block, and a block's first part, is the largest. Without a base every part is a block.
        x's shape and dtype alone decide: dM, a sum over parts, has the same bits for any number of threads.
        """
        step = _split(max(1, x.shape[0]), self.rows)
        part = _split(step, max(1, self.scratch // (width * (x.element_size() + 4))))
        blocks = []
        for start in range(0, x.shape[0], step):
            rows = min(step, x.shape[0] - start)
            parts = [(at, min(part, start + rows - at)) for at in range(start, start + rows, part)]
            blocks += [_Block(start, rows, parts)] if based else [_Block(*one, [one]) for one in parts]
        return blocks

    def product(
        self,
        out: Tensor,
        x: Tensor,
        weight: Weight4 | Tensor | None,
        transposed: bool,
        matrix: Tensor,
        scaling: float,
        bias: Tensor | None,
        rotation: Tensor | None,
        width: int,
    ) -> None:
        """The row `blocks`. Beside out: the middle of a part in x's dtype and, turned back, in fp32; and in
        fp32 that of a part, or with a base of a row block. None of them where x or out is the middle itself.
        """
        (M, outputs), inputs, size = out.shape, x.shape[1], matrix.shape[0]
        if M == 0:
            return
        taken, given = (inputs, width) if transposed else (width, outputs)
        before, after = (None, rotation) if transposed else (rotation, None)
        blocks = self._row_blocks(x, width, weight is not None)
        largest = blocks[0].parts[0][1]
        middle = None if before is None and _is_middle(x, width) else x.new_empty(largest, width)
        alone = weight is None and bias is None and _is_middle(out, width)
        values = None if alone else x.new_empty(blocks[0].rows, width, dtype=torch.float32)
        turned = None if after is None else x.new_empty(largest, width, dtype=torch.float32)
        for start, rows, parts in blocks:
            X, Y = _cut(x, start, rows), _cut(out, start, rows)
            V = Y if values is None else _cut(values, 0, rows)
            for at, some in parts:
                z = _cut(x, at, some)
                if middle is not None:
                    z = _cut(middle, 0, some)
                    self.compress(z, _cut(x, at, some), False, taken, before, False)
                v = _cut(V, at - start, some)
                u = v if turned is None else _cut(turned, 0, some)
                self.matmul(u.view(-1, size), z.view(-1, size), matrix, transposed, scaling, None, None, None)
                if turned is not None:
                    self.compress(v, u, False, width, after, True)
            if values is None:
                continue
            spread = V, False, given
            if isinstance(weight, Tensor):
                self.matmul_dense(Y, X, weight, transposed, None, None, bias, spread)
            elif weight is not None:
                self.matmul(Y, X, weight, transposed, 1.0, None, None, bias, spread)
            else:  # a product of nothing
                empty = Y.new_empty(outputs, 0)
                self.matmul(Y, X[:, :0], empty, False, 1.0, None, None, bias, spread)

    def grad(
        self, dM: Tensor, dY: Tensor, x: Tensor, scaling: float, rotation: Tensor | None, width: int
    ) -> None:
        """The row `blocks_grad`. Beside dM: the middles of a part in x's dtype, and once more dM."""
        if x.shape[0] == 0:
            dM.zero_()
            return
        size = dM.shape[0]
        blocks = self._row_blocks(x, width, False)
        largest = blocks[0].rows
        zs = None if rotation is None and _is_middle(x, width) else x.new_empty(largest, width)
        gs = None if _is_middle(dY, width) else x.new_empty(largest, width)
        term = dM
        for at, some, _ in blocks:
            z, g = _cut(x, at, some), _cut(dY, at, some)
            if zs is not None:
                z = _cut(zs, 0, some)
                self.compress(z, _cut(x, at, some), False, width, rotation, False)
            if gs is not None:
                g = _cut(gs, 0, some)
                self.compress(g, _cut(dY, at, some), False, dY.shape[1], None, False)
            self.matmul(term, g.view(-1, size).t(), z.view(-1, size), True, scaling, None, None, None)
            if at:
                dM.add_(term)
            elif some < x.shape[0]:
                term = torch.empty_like(dM)
