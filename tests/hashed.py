"""The dropout kernels' hash, alone: tests launch it on elements that no tensor of a test has."""

from __future__ import annotations

import triton
import triton.language as tl

from peftkern.triton_kernels.dropout import kept, mask_key


@triton.jit
def hashed(out, seed, first, columns, threshold, WIDE: tl.constexpr):
    """out int8 [4, 16]: whether the elements of rows first … first + 3 and columns 0 … 15 are kept."""
    row, column = tl.arange(0, 4)[:, None], tl.arange(0, 16)[None, :]
    keep = kept(first + row.to(tl.int64), column, columns, mask_key(seed), threshold, WIDE)
    tl.store(out + row * 16 + column, keep.to(tl.int8))
