"""Dequantize: out[i] = round(code[q[i]] · absmax[i / blocksize]), bit for bit the reference's.

A program takes BLOCK neighbouring bytes of the flat index, so it reads half a byte and writes 2 or 4
bytes a weight in whole lines: 4096 × 4096 to bf16 moves 42.5 MB, at 4.3 TB/s 10 µs. Nested scales are
decoded inside; a product and the sum after it are rounded one by one, so the launch forbids fusing them.

decode_scales writes nested scales alone, as the matmul takes them: 4 bytes a block, 1/16 byte a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peftkern.triton_kernels.arithmetic import rounded
from peftkern.triton_kernels.decode import load_scale, lookup, prepare_lookup
from peftkern.triton_kernels.launch import Launch, Weight4

BYTES = 1024  # of a program
SCALES = 1024


@triton.jit(do_not_specialize=["numel"])
def dequantize(
    out, packed, absmax, absmax2, code2, offset, numel,
    NF4: tl.constexpr, LOG2_BLOCK: tl.constexpr, LOG2_BLOCK2: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """EVEN: whole programs, no masks. A block of weights has an even number of them: a byte has one scale."""
    codes = prepare_lookup(NF4)
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # past the end: the last byte once more, not stored
    at = byte if EVEN else tl.minimum(byte, (numel - 1) // 2)
    q = tl.load(packed + at).to(tl.int32)
    scale = load_scale(absmax, absmax2, code2, offset, (at * 2) >> LOG2_BLOCK, LOG2_BLOCK2)
    values = lookup(tl.join(q >> 4, q), codes) * scale[:, None]
    i = (byte[:, None] * 2 + tl.arange(0, 2)[None, :]).reshape(BLOCK * 2)
    y = rounded(values, out.dtype.element_ty).reshape(BLOCK * 2)
    if EVEN:
        tl.store(out + i, y)
    else:
        tl.store(out + i, y, mask=i < numel)


@triton.jit(do_not_specialize=["blocks"])
def decode_scales(
    out, absmax, absmax2, code2, offset, blocks, LOG2_BLOCK2: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = tl.minimum(block, blocks - 1)
    tl.store(out + block, load_scale(absmax, absmax2, code2, offset, at, LOG2_BLOCK2), mask=block < blocks)


def plan(out: Tensor, weight: Weight4) -> list[Launch]:
    """out: contiguous [N, K]."""
    packed, absmax, nested, quant_type, blocksize, N, K = weight
    numel = N * K
    if numel == 0:
        return []
    absmax2, code2, offset, blocksize2 = (None, None, None, 1) if nested is None else nested
    arguments = {
        "out": out,
        "packed": packed,
        "absmax": absmax,
        "absmax2": absmax2,
        "code2": code2,
        "offset": offset,
        "numel": numel,
        "NF4": quant_type == "nf4",
        "LOG2_BLOCK": blocksize.bit_length() - 1,
        "LOG2_BLOCK2": blocksize2.bit_length() - 1,
        "EVEN": numel % (2 * BYTES) == 0,
        "BLOCK": BYTES,
    }
    return [Launch(dequantize, (-(-numel // (2 * BYTES)),), arguments, fuse=False)]


def plan_scales(out: Tensor, weight: Weight4) -> list[Launch]:
    """out fp32 [blocks]: the scales of a nested weight."""
    _, absmax, nested, _, _, _, _ = weight
    assert nested is not None
    blocks = out.shape[0]
    if blocks == 0:
        return []
    absmax2, code2, offset, blocksize2 = nested
    arguments = {
        "out": out,
        "absmax": absmax,
        "absmax2": absmax2,
        "code2": code2,
        "offset": offset,
        "blocks": blocks,
        "LOG2_BLOCK2": blocksize2.bit_length() - 1,
        "BLOCK": SCALES,
    }
    return [Launch(decode_scales, (-(-blocks // SCALES),), arguments, fuse=False)]
