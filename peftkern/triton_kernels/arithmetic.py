"""What every kernel computes with: conversions, a product and a sum in which the interpreter does as a GPU
does."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"))


@triton.jit
def widened(x):
    """x in fp32. By its bits in the interpreter, whose own conversion of bf16 is wrong below 2^-126."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x, fp32, to the nearest value of dtype, ties to even: the interpreter's own cast to bf16 cuts off."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def brought_to(x, dtype: tl.constexpr):
    """x, of any of the three dtypes, in dtype."""
    if x.dtype == dtype:
        return x
    else:
        return rounded(widened(x), dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRET:  # its 16-bit products are wrong (bf16) or summed in 16 bits (fp16)
        if a.dtype == tl.bfloat16:  # as `widened` does; a call of a function is what takes long there
            a = (a.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
            b = (b.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def sum_of_parts(acc, at, mask, stride, parts):
    """acc plus the fp32 numbers at `at`, at + stride, …, in this order: so many parts of one sum."""
    count = tl.where(mask, parts, 0)
    # eight loads under way at a time: one after the other they would cost eight latencies
    for first in range(0, parts, 8):
        for i in tl.static_range(8):
            acc += tl.load(at, mask=count > first + i, other=0.0)
            at += stride
    return acc
