"""Quantize: absmax of each block and the nearest code of each weight, bit for bit the reference's.

    v = clamp(w * (1 / max(absmax, 1e-38)), -1, 1)      in the short last block w / max(absmax, 1e-38)
    q = the code whose interval holds v: as many codes further than the smallest as midpoints lie below v;
        NaN goes the whole way

Reads each weight once, writes half a byte. Every operation is rounded by itself: nothing is fused.
"""

from __future__ import annotations

import struct
from itertools import pairwise

import triton
import triton.language as tl
from torch import Tensor

from peftkern.formats import CODES
from peftkern.triton_kernels.arithmetic import widened
from peftkern.triton_kernels.launch import Launch

# bitsandbytes divides by no less than this fp32 number, a subnormal
SMALLEST = tl.constexpr(struct.unpack("f", struct.pack("f", 1e-38))[0])
WEIGHTS = 4096  # of a program


def _fp32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _intervals(quant_type: str) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The fp32 midpoints of neighbouring codes, and the nibbles in the order of their values."""
    codes = CODES[quant_type]
    order = sorted(range(16), key=lambda q: codes[q])
    # the sum is exact in fp64 and halving is exact: one rounding, that of the fp32 sum
    middles = tuple(_fp32(codes[a] + codes[b]) / 2 for a, b in pairwise(order))
    return middles, tuple(order)


NF4_INTERVALS = tl.constexpr(_intervals("nf4"))
FP4_INTERVALS = tl.constexpr(_intervals("fp4"))


@triton.jit
def _nearest(v, intervals: tl.constexpr):
    q = tl.full(v.shape, intervals[1][0], tl.int32)
    for i in tl.static_range(15):
        q = tl.where(v > intervals[0][i], intervals[1][i + 1], q)
    return tl.where(v != v, intervals[1][15], q)


@triton.jit(do_not_specialize=["numel"])
def quantize(packed, absmax, weight, numel, NF4: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    w = widened(tl.load(weight + i, mask=i < numel, other=0.0))
    largest = tl.max(tl.abs(w), axis=1)
    # NaN is no maximum to every machine: said explicitly
    largest = tl.where(tl.max((w != w).to(tl.int32), axis=1) > 0, float("nan"), largest)
    scale = tl.where(largest < SMALLEST, SMALLEST, largest)
    short = (block + 1) * BLOCKSIZE > numel
    largest = tl.where(short, scale, largest)
    v = tl.where(
        short[:, None],
        tl.div_rn(w, scale[:, None]),
        w * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None],
    )
    # by comparisons, which leave NaN as it is
    v = tl.where(v > 1.0, 1.0, tl.where(v < -1.0, -1.0, v))
    v = tl.where(i < numel, v, 0.0)
    q = _nearest(v, NF4_INTERVALS if NF4 else FP4_INTERVALS)
    high, low = tl.split(q.reshape(BLOCKS, BLOCKSIZE // 2, 2))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed + byte, (high * 16 + low).to(tl.uint8), mask=byte * 2 < numel)
    tl.store(absmax + block, largest, mask=block * BLOCKSIZE < numel)


def plan(weight: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int) -> list[Launch]:
    """weight: contiguous, of any of the three dtypes."""
    numel = weight.numel()
    if numel == 0:
        return []
    blocks = WEIGHTS // blocksize
    arguments = {
        "packed": packed,
        "absmax": absmax,
        "weight": weight,
        "numel": numel,
        "NF4": quant_type == "nf4",
        "BLOCKSIZE": blocksize,
        "BLOCKS": blocks,
    }
    return [Launch(quantize, (-(-numel // (blocks * blocksize)),), arguments, fuse=False)]
