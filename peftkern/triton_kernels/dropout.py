"""Dropout where a product loads what it masks: the hash of reference.dropout_mask, of the seed and the
row-major index.

Some 22 instructions of an element, counted in the machine code: four products beside 17 shifts, logic and the
like, which Hopper issues for 64 elements a clock and SM. An H200 reads some 5 bytes an SM meanwhile, so a
product that reads 2 bytes of x and does little else is bound by its hash, at 2.4 times the reads; a masked
copy would cost the same hash, the copy and another read. Nothing of it was measured yet.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def mask_key(seed):
    """What the seed gives to the hash of every element."""
    value = tl.load(seed)
    low = value.to(tl.uint32)
    high = (value >> 32).to(tl.uint32)
    return _mix(low + _mix(high + tl.full((), 0x9E3779B9, tl.uint32)))


@triton.jit
def kept(row, column, columns, key, threshold, WIDE: tl.constexpr):
    """Whether the element at (row, column), which broadcast, of a matrix of so many columns is kept.

    key: of mask_key. threshold: how many of the 2^32 hashes are kept, less than all, as int32. WIDE: for a
    matrix of more than 2^32 elements; of any other the high half of the index is 0, and what it adds to the
    hash the same for all.
    """
    index = row.to(tl.int64) * columns + column
    second = key + tl.full((), 0x85EBCA6B, tl.uint32)
    if WIDE:
        second += (index >> 32).to(tl.uint32)
    h = _mix(_mix(index.to(tl.uint32) ^ key) + _mix(second))
    return h < threshold.to(tl.uint32, bitcast=True)
