"""What every kernel that reads 4-bit weights shares: nibble → code, block → scale.

A code is looked up across the warp: each lane keeps code[lane & 15], and one SHFL.IDX hands a weight the
exact fp32 code of its nibble; the lane number is taken modulo 32 and the table stands twice, so the
nibble needs no mask. 32 weights of one thread cost 32 SHFL, 28 shifts, 32 multiplications by the scale
and 16 conversions to pairs of 16 bits: 3.4 instructions a weight. The shuffles are the floor, 32 lanes a
clock on an SM. Byte permutes (PRMT) would do without them, but only with codes rounded to 16 bits, hence
with a rounding more, and keep the integer pipe, half as wide as the others, busy for longer.

The interpreter has no inline assembly: there the lookup is a gather.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peftkern.formats import CODES
from peftkern.triton_kernels.arithmetic import INTERPRET

NF4_CODES = tl.constexpr(CODES["nf4"])
FP4_CODES = tl.constexpr(CODES["fp4"])


@triton.jit
def _lane_code(codes: tl.constexpr):
    """code[lane & 15], of each lane its own, in the PTX register `peftkern_code` of the whole kernel."""
    lane = tl.inline_asm_elementwise(
        "mov.u32 $0, %laneid;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=True, pack=1
    )
    code = tl.where((lane & 15) == 0, codes[0], 0.0)
    for i in tl.static_range(1, 16):
        code = tl.where((lane & 15) == i, codes[i], code)
    tl.inline_asm_elementwise(
        ".reg .f32 peftkern_code; mov.f32 peftkern_code, $1; mov.u32 $0, 0;",
        "=r,f",
        [code],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prepare_lookup(NF4: tl.constexpr):
    """Once at the head of a kernel that calls `lookup`, which takes what this returns."""
    if INTERPRET:
        index = tl.arange(0, 16)
        codes = tl.zeros((16,), tl.float32)
        for i in tl.static_range(16):
            codes = tl.where(index == i, NF4_CODES[i] if NF4 else FP4_CODES[i], codes)
        return codes
    else:
        if NF4:
            _lane_code(NF4_CODES)
        else:
            _lane_code(FP4_CODES)
        return 0


@triton.jit
def lookup(q, codes):
    """fp32 code of the low four bits of q, an int32 tensor; whatever stands above them is ignored.

    On a GPU the table is no operand: a scalar operand would be spread over a tensor, and that alone keeps the
    compiler from moving the lookup into the layout of the tensor cores' left operand.
    """
    if INTERPRET:
        return tl.gather(codes, (q & 15).reshape(q.numel), 0).reshape(q.shape)
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, peftkern_code, $1, 31, 0xffffffff;",
            "=f,r",
            [q],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def nibbles_of_word(words):
    """int32 [..., W] → [..., W, bit, high, low]: weight (high low bit) of eight, in the lowest four bits."""
    # shifts by constants, joined: a shift by a tensor of numbers would keep the compiler from moving it.
    # The high nibble of a byte is its first weight.
    return tl.join(
        tl.join(tl.join(words >> 4, words), tl.join(words >> 20, words >> 16)),
        tl.join(tl.join(words >> 12, words >> 8), tl.join(words >> 28, words >> 24)),
    )


@triton.jit
def nibbles_of_half(halves):
    """int16 [..., W] → int32 [..., W, bit, high]: weight (high bit) of four."""
    halves = halves.to(tl.int32)
    return tl.join(tl.join(halves >> 4, halves), tl.join(halves >> 12, halves >> 8))


@triton.jit
def load_scale(absmax, absmax2, code2, offset, block, LOG2_BLOCK2: tl.constexpr):
    """fp32 absmax of the blocks; with absmax2 nested: code2[u8] · absmax2 + offset, two roundings."""
    if absmax2 is None:
        return tl.load(absmax + block)
    else:
        scale = tl.load(code2 + tl.load(absmax + block).to(tl.int32)) * tl.load(
            absmax2 + (block >> LOG2_BLOCK2)
        )
        return scale + tl.load(offset)
