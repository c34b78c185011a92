"""Dropout: out = x where kept, else 0; the mask is reference.dropout_mask's, of the seed and the
row-major index.

Reads and writes each element once; the hash of a weight is four mixes of 32 bits, two of them the same
for 2^32 neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peftkern.triton_kernels.launch import Launch

ROWS, COLUMNS = 4, 256


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


@triton.jit(do_not_specialize=["M", "threshold"])
def dropout(
    out, x, seed, M, columns, threshold, stride_xm, stride_xc, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """threshold: how many of the 2^32 hashes are kept."""
    m = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    k = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    index = m * columns + k
    value = tl.load(seed)
    low = value.to(tl.uint32)
    high = (value >> 32).to(tl.uint32)
    k0 = _mix(low + _mix(high + tl.full((), 0x9E3779B9, tl.uint32)))
    k1 = _mix(k0 + (index >> 32).to(tl.uint32) + tl.full((), 0x85EBCA6B, tl.uint32))
    h = _mix(_mix(index.to(tl.uint32) ^ k0) + k1)
    inside = (m < M) & (k < columns)
    keep = inside & (h.to(tl.int64) < threshold)
    # a dropped NaN or Inf is 0: it is not read at all
    y = tl.load(x + m * stride_xm + k * stride_xc, mask=keep, other=0.0)
    tl.store(out + index, y, mask=inside)


def plan(out: Tensor, x: Tensor, threshold: int, seed: Tensor) -> list[Launch]:
    """out: contiguous [M, K]; x [M, K] of any strides; seed: an int64 scalar tensor on their device."""
    M, columns = x.shape
    if M == 0 or columns == 0:
        return []
    arguments = {
        "out": out,
        "x": x,
        "seed": seed,
        "M": M,
        "columns": columns,
        "threshold": threshold,
        "stride_xm": x.stride(0),
        "stride_xc": x.stride(1),
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
    }
    return [Launch(dropout, (-(-M // ROWS), -(-columns // COLUMNS)), arguments)]
