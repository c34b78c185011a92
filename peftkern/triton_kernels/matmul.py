"""The one primitive: a matmul with an addend, W in 4 bits or dense.

    out[m, o] = alpha * (sum_c x[m, c] w(o, c) + sum_r t[m, r] u[o, r]) + bias[o] + spread(values)[m, o]

4-bit W: the product is computed transposed, acc[o, m] = W xᵀ, so that the decoded W is the left operand
of tl.dot, which wgmma takes from registers: while the tensor cores work on one half of a step, the warps
decode the other. The addend is the first steps of the same sum. W's bytes are read once for each tile of
rows.

The way into those registers is free of exchanges between threads, because a sum may be taken in any
order. A thread of the left operand holds, of a row, pairs of neighbouring columns, with the pairs of
three other lanes between them. Plain: it loads int32 words of eight weights, its pairs are those of its
own word, and x's columns are read in the order that this makes. Transposed (dX), W's rows are the sum
and its columns the operand's rows, of which a thread holds four that lie 8 and BLOCK_O / 2 apart: it
loads int16 halves, four weights to these rows, and the result's rows are put back in order before they
are stored.

Dropout's mask falls where x is loaded, T = alpha dropout(x) Aᵀ and dA = Gᵀ dropout(x), or on the addend
alone, dX = dY W + dropout(G A): there on the sums themselves, after the addend's steps and before those of W,
so that nothing of x's size is written and no second sum kept. For each element a thread issues some 22
instructions (triton_kernels/dropout.py): at a tile of 64 × 64 about 720 a step instead of 100, once for each
64 ranks; for dX 128 of them for each tile of 256 × 128, some 3000 instructions beside 424 for each step.

"Bytes" takes any N, K, address and blocksize: each weight reads its own byte. Right, not fast.

A step reads BLOCK_O · BLOCK_C / 2 bytes of W and 2 · BLOCK_M · BLOCK_C of x for BLOCK_O · BLOCK_M ·
BLOCK_C multiply-adds. At 256 × 128 × 64 the tensor cores of Hopper take 1024 clocks for it and the
shuffles of the lookup 512; the machine code has some 190 instructions a thread for 32 weights
(bench.compile_report), of which an SM issues a step's in 760 clocks. No time was measured yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.triton_kernels.arithmetic import brought_to, dot, rounded, sum_of_parts, widened
from peftkern.triton_kernels.blocks import blocks_addend
from peftkern.triton_kernels.choices import (
    BYTES,
    CROWDED_ROWS,
    FLOAT32,
    GROUP,
    THIN_FLOAT32,
    Tile,
    of,
    splits,
    thin_tile,
    tiles,
    words_tile,
)
from peftkern.triton_kernels.decode import (
    lookup,
    nibbles_of_half,
    nibbles_of_word,
    prepare_lookup,
)
from peftkern.triton_kernels.dequantize import plan_scales
from peftkern.triton_kernels.dropout import kept, mask_key
from peftkern.triton_kernels.launch import TYPES, Launch, Layout, Machine, Spread, Weight4, layout

FINISH_BLOCK = 512
SHORT_INDICES = 1 << 32  # of so many elements 32 bits are an index
BLOCK_R = 16  # a step of the addend: more of it at once would not fit beside the sums
FINISH_REGISTERS = 16  # sums of a thread that are finished at a time


# each of their values would be another kernel, were they specialized
DYNAMIC = ["M", "rank", "P", "length", "steps_per_split", "blocks", "t_columns", "threshold"]

# where it falls ("x", "weight" or "addend"), how many of the 2^32 hashes are kept, seed int64 scalar
Mask = tuple[str, int, Tensor]
NO_MASK = "", 0, None


@triton.jit
def _spread_at(values, row, column, mask, stride, outputs, P, length, GROUPED: tl.constexpr):
    """spread(values)[row, column]: fp32, values [M, P].

    cyclic: sum over p < length with p = column (mod outputs) of values[row, p mod P]
    grouped: values[row, g(column)], the first outputs mod P of the P groups one longer than the others
    """
    line = values + row * stride
    if GROUPED:
        size = outputs // P
        longer = outputs % P
        cut = longer * (size + 1)
        g = tl.where(column < cut, column // (size + 1), longer + (column - cut) // tl.maximum(size, 1))
        return tl.load(line + g, mask=mask, other=0.0)
    else:
        total = tl.load(line + column % P, mask=mask & (column < length), other=0.0)
        for first in range(outputs, length, outputs):
            p = column + first
            total += tl.load(line + p % P, mask=mask & (p < length), other=0.0)
        return total


@triton.jit
def _finish(
    acc, row, column, mask, out, bias, values, stride_out_m, stride_out_o, stride_bias, stride_values,
    alpha, outputs, P, length, GROUPED: tl.constexpr,
):  # fmt: skip
    """What follows the sum, in fp32, and the one rounding."""
    y = acc * alpha
    if bias is not None:
        y += widened(tl.load(bias + column.to(tl.int64) * stride_bias, mask=column < outputs, other=0.0))
    if values is not None:
        y += _spread_at(values, row, column, mask, stride_values, outputs, P, length, GROUPED)
    tl.store(
        out + row * stride_out_m + column.to(tl.int64) * stride_out_o,
        rounded(y, out.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _finish_tile(
    acc, first_row, first_column, M, out, bias, values, stride_out_m, stride_out_o, stride_bias,
    stride_values, alpha, outputs, P, length, GROUPED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """_finish for a whole tile acc [o, m], so many parts of its rows one after the other: addresses of all at
    once would not fit beside it in the registers."""
    BLOCK_O: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    if PARTS == 1:
        m = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        o = (first_column + tl.arange(0, BLOCK_O))[None, :]
        mask = (m < M) & (o < outputs)
        _finish(
            tl.trans(acc), m, o, mask, out, bias, values, stride_out_m, stride_out_o, stride_bias,
            stride_values, alpha, outputs, P, length, GROUPED,
        )  # fmt: skip
    else:
        one, two = tl.split(acc.reshape(BLOCK_O, 2, BLOCK_M // 2).permute(0, 2, 1))
        _finish_tile(
            one, first_row, first_column, M, out, bias, values, stride_out_m, stride_out_o, stride_bias,
            stride_values, alpha, outputs, P, length, GROUPED, PARTS // 2,
        )  # fmt: skip
        _finish_tile(
            two, first_row + BLOCK_M // 2, first_column, M, out, bias, values, stride_out_m, stride_out_o,
            stride_bias, stride_values, alpha, outputs, P, length, GROUPED, PARTS // 2,
        )  # fmt: skip


@triton.jit
def _addend(
    acc, t, u, row, column, first_column, outputs, rank, blocks, t_columns, scaling, stride_tm, stride_tr,
    stride_ub, stride_uo, stride_ur,
    BLOCKS: tl.constexpr, ADJOINT: tl.constexpr, ALIGNED: tl.constexpr, LOCAL: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc[o, m] += sum_r u[o, r] t[m, r], or that of BLOCKS; row [m], column [o] are inside the matrices."""
    if BLOCKS:
        return blocks_addend(
            acc, t, u, row, column, first_column, outputs, rank, blocks, t_columns, scaling, stride_tm,
            stride_tr, stride_ub, stride_uo, stride_ur,
            ADJOINT, ALIGNED, LOCAL, COMPUTE, BLOCK_R, PRECISION,
        )  # fmt: skip
    else:
        for first in range(0, rank, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R).to(tl.int64)
            inside = r < rank
            u_tile = tl.load(
                u + column[:, None] * stride_uo + r[None, :] * stride_ur, mask=inside[None, :], other=0.0
            )
            t_tile = tl.load(
                t + row[None, :] * stride_tm + r[:, None] * stride_tr, mask=inside[:, None], other=0.0
            )
            acc = dot(brought_to(u_tile, COMPUTE), brought_to(t_tile, COMPUTE), acc, PRECISION)
        return acc


@triton.jit
def _tile(tiles_m, tiles_o, GROUP: tl.constexpr):
    """Which tile this program computes: GROUP tiles of rows pass over W's tiles together, W in L2."""
    program = tl.program_id(0)
    per_group = GROUP * tiles_o
    group = program // per_group
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program % per_group
    return first + within % height, within // height


@triton.jit(do_not_specialize=DYNAMIC)
def matmul_4bit(
    out, x, packed, absmax, t, u, bias, values, seed,
    M, outputs, inner, line, rank, P, length,
    stride_out_m, stride_out_o, stride_xm, stride_xc, stride_tm, stride_tr, stride_uo, stride_ur, stride_bias,
    stride_values, x_step, steps_per_split, alpha, blocks, t_columns, stride_ub, scaling, threshold,
    NF4: tl.constexpr, LOG2_BLOCK: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr, WORDS: tl.constexpr, SPLIT: tl.constexpr, GROUPED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr,
    MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """packed: where WORDS int32, or int16 if TRANSPOSED, `line` of them a row of W; else uint8. SPLIT: out is
    fp32 [splits, M, outputs], for `finish_split`. BLOCKS: t and u are those of `blocks_addend`, rank = r̂.
    MASK: "" or "addend"."""
    # halves or words of a step, along W's rows
    W: tl.constexpr = BLOCK_O // 4 if TRANSPOSED else BLOCK_C // 8
    GROUPS: tl.constexpr = BLOCK_O // SCALE_COLUMNS
    codes = prepare_lookup(NF4)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_o = tl.cdiv(outputs, BLOCK_O)
    tile_m, tile_o = _tile(tiles_m, tiles_o, GROUP)
    # rows and columns past the end repeat the last one: no masks in the loop, and they are not stored
    row = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    column = tl.minimum(tile_o * BLOCK_O + tl.arange(0, BLOCK_O), outputs - 1).to(tl.int64)
    columns = outputs if TRANSPOSED else inner  # K, W's row length
    split = tl.program_id(1)
    steps = tl.cdiv(inner, BLOCK_C)
    first_step = split * steps_per_split
    last_step = tl.minimum(first_step + steps_per_split, steps)

    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    c = tl.arange(0, BLOCK_C)
    order = tl.arange(0, BLOCK_O)
    if WORDS and TRANSPOSED:
        # left operand's row (high | half's upper bits | bit | half's lower 3 bits):
        # column half · 4 + high · 2 + bit
        order = (order // 16 % (W // 8) * 8 + order % 8) * 4 + order // (BLOCK_O // 2) * 2 + order // 8 % 2
    if t is not None:  # noqa: SIM102 (known when compiled; the next is not)
        if split == 0:
            at = tl.minimum(tile_o * BLOCK_O + order, outputs - 1).to(tl.int64)
            acc = _addend(
                acc, t, u, row, at, tile_o * BLOCK_O, outputs, rank, blocks, t_columns, scaling, stride_tm,
                stride_tr, stride_ub, stride_uo, stride_ur,
                BLOCKS, TRANSPOSED, ALIGNED, False, COMPUTE, BLOCK_R, PRECISION,
            )  # fmt: skip
            if MASK == "addend":
                keep = kept(row[None, :], at[:, None], outputs, mask_key(seed), threshold, WIDE)
                acc = tl.where(keep, acc, 0.0)

    if WORDS:
        if TRANSPOSED:
            n = (first_step * BLOCK_C + c).to(tl.int64)[:, None]
            # past the end the row begins anew: by the remainder, which the compiler knows to keep neighbours
            half = tl.max_contiguous(tl.multiple_of((tile_o * W + tl.arange(0, W)) % line, 8), 8)
            group = (tile_o * BLOCK_O + tl.arange(0, GROUPS) * SCALE_COLUMNS) % outputs
            w_tile = packed + n * line + half[None, :]
            scale_at = n * columns + group[None, :]
            x_tile = x + n * stride_xc + row[None, :] * stride_xm
            for _ in range(first_step, last_step):
                halves = tl.load(w_tile)
                scale = tl.load(absmax + (scale_at >> LOG2_BLOCK))
                scale = scale[:, :, None].broadcast_to(BLOCK_C, GROUPS, W // GROUPS).reshape(BLOCK_C, W)
                w = rounded(lookup(nibbles_of_half(halves), codes) * scale[:, :, None, None], COMPUTE)
                w = w.reshape(BLOCK_C, W // 8, 8, 2, 2).permute(4, 1, 3, 2, 0).reshape(BLOCK_O, BLOCK_C)
                acc = dot(w, tl.load(x_tile), acc, PRECISION)
                w_tile += BLOCK_C * line
                scale_at += BLOCK_C * columns
                x_tile += x_step
        else:
            # step column (word's upper bits | pair, 2 bits | word's lower 2 bits | bit):
            # W's column word · 8 + pair · 2 + bit
            mixed = c // 32 * 32 + c // 2 % 4 * 8 + c // 8 % 4 * 2 + c % 2
            start = (first_step * BLOCK_C).to(tl.int64)
            x_tile = x + (start + mixed)[:, None] * stride_xc + row[None, :] * stride_xm
            w_tile = packed + column[:, None] * line + (start // 8 + tl.arange(0, W))[None, :]
            scale_at = column * columns + start
            for _ in range(first_step, last_step):
                words = tl.load(w_tile)
                scale = tl.load(absmax + (scale_at >> LOG2_BLOCK))
                q = nibbles_of_word(words).reshape(BLOCK_O, W // 4, 4, 2, 2, 2).permute(0, 1, 4, 5, 2, 3)
                w = rounded(lookup(q.reshape(BLOCK_O, BLOCK_C), codes) * scale[:, None], COMPUTE)
                acc = dot(w, tl.load(x_tile), acc, PRECISION)
                w_tile += W
                scale_at += BLOCK_C
                x_tile += x_step
    else:
        for step in range(first_step, last_step):
            at = (step * BLOCK_C + c).to(tl.int64)
            inside = at < inner
            at = tl.minimum(at, inner - 1)
            if TRANSPOSED:
                flat = at[None, :] * columns + column[:, None]
            else:
                flat = column[:, None] * columns + at[None, :]
            byte = tl.load(packed + (flat >> 1)).to(tl.int32)
            scale = tl.load(absmax + (flat >> LOG2_BLOCK))
            w = lookup(tl.where(flat & 1 == 0, byte >> 4, byte), codes) * scale
            w = tl.where(inside[None, :], w, 0.0)
            x_values = tl.load(
                x + at[:, None] * stride_xc + row[None, :] * stride_xm, mask=inside[:, None], other=0.0
            )
            acc = dot(rounded(w, COMPUTE), x_values, acc, PRECISION)

    if WORDS and TRANSPOSED:
        acc = acc.reshape(2, W // 8, 2, 8, BLOCK_M).permute(1, 3, 0, 2, 4).reshape(BLOCK_O, BLOCK_M)
    if SPLIT:
        m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        o = (tile_o * BLOCK_O + tl.arange(0, BLOCK_O))[None, :]
        at = out + (split.to(tl.int64) * M + m) * outputs + o
        tl.store(at, tl.trans(acc), mask=(m < M) & (o < outputs))
    else:
        _finish_tile(
            acc, tile_m * BLOCK_M, tile_o * BLOCK_O, M, out, bias, values, stride_out_m, stride_out_o,
            stride_bias, stride_values, alpha, outputs, P, length, GROUPED, PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*DYNAMIC, "inner"])
def matmul_dense(
    out, x, weight, t, u, bias, values, seed,
    M, outputs, inner, rank, P, length,
    stride_out_m, stride_out_o, stride_xm, stride_xc, stride_wo, stride_wc, stride_tm, stride_tr, stride_uo,
    stride_ur, stride_bias, stride_values, steps_per_split, alpha, blocks, t_columns, stride_ub, scaling,
    threshold,
    SPLIT: tl.constexpr, GROUPED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, EVEN_M: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCKS: tl.constexpr, ADJOINT: tl.constexpr, ALIGNED: tl.constexpr, MASK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The same for a dense W of any strides and dtype, one side of the product a rank, or for the addend
    alone: memory bound.

    MASK: what is dropped of the operand as it is loaded, "weight" as transposed, or of the addend.

    EVEN: 16 divides M, inner. Where they count neighbours in memory, a mask by a number of which that is not
    known would cut the loads to single values.
    """
    if EVEN_M:
        M = M // 16 * 16
    if EVEN_C:
        inner = inner // 16 * 16
    tile_m, tile_o = _tile(tl.cdiv(M, BLOCK_M), tl.cdiv(outputs, BLOCK_O), GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    row, column = m.to(tl.int64), o.to(tl.int64)
    some_m, some_o = m < M, o < outputs
    split = tl.program_id(1)
    first_step = split * steps_per_split
    last_step = tl.minimum(first_step + steps_per_split, tl.cdiv(inner, BLOCK_C))
    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    if MASK != "":
        key = mask_key(seed)
    if t is not None:  # noqa: SIM102 (known when compiled; the next is not)
        if split == 0:
            at_m, at_o = tl.minimum(row, M - 1), tl.minimum(column, outputs - 1)
            acc = _addend(
                acc, t, u, at_m, at_o, tile_o * BLOCK_O, outputs, rank, blocks, t_columns, scaling, stride_tm,
                stride_tr, stride_ub, stride_uo, stride_ur,
                BLOCKS, ADJOINT, ALIGNED, True, COMPUTE, BLOCK_R, PRECISION,
            )  # fmt: skip
            if MASK == "addend":
                acc = tl.where(kept(m[None, :], o[:, None], outputs, key, threshold, WIDE), acc, 0.0)
    for step in range(first_step, last_step):
        i = step * BLOCK_C + tl.arange(0, BLOCK_C)
        c, some_c = i.to(tl.int64), i < inner
        w = tl.load(
            weight + column[:, None] * stride_wo + c[None, :] * stride_wc,
            mask=some_o[:, None] & some_c[None, :],
            other=0.0,
        )
        x_values = tl.load(
            x + c[:, None] * stride_xc + row[None, :] * stride_xm,
            mask=some_c[:, None] & some_m[None, :],
            other=0.0,
        )
        # not by the loads' masks, which would cut them to single values
        if MASK == "weight":
            w = tl.where(kept(i[None, :], o[:, None], outputs, key, threshold, WIDE), w, 0.0)
        if MASK == "x":
            x_values = tl.where(kept(m[None, :], i[:, None], inner, key, threshold, WIDE), x_values, 0.0)
        acc = dot(brought_to(w, COMPUTE), x_values, acc, PRECISION)
    if SPLIT:
        m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        o = (tile_o * BLOCK_O + tl.arange(0, BLOCK_O))[None, :]
        at = out + (split.to(tl.int64) * M + m) * outputs + o
        tl.store(at, tl.trans(acc), mask=(m < M) & (o < outputs))
    else:
        _finish_tile(
            acc, tile_m * BLOCK_M, tile_o * BLOCK_O, M, out, bias, values, stride_out_m, stride_out_o,
            stride_bias, stride_values, alpha, outputs, P, length, GROUPED, PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["numel", "outputs", "P", "length", "splits"])
def finish_split(
    out, partial, bias, values, numel, outputs, P, length,
    stride_out_m, stride_out_o, stride_bias, stride_values, splits, alpha,
    GROUPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the partial sums [splits, M, outputs], in their order, and what follows it."""
    flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # 32 bits: few outputs, or nothing were split
    mask = flat < numel
    acc = sum_of_parts(tl.zeros((BLOCK,), tl.float32), partial + flat, mask, numel, splits)
    _finish(
        acc, (flat // outputs).to(tl.int64), flat % outputs, mask, out, bias, values, stride_out_m,
        stride_out_o, stride_bias, stride_values, alpha, outputs, P, length, GROUPED,
    )  # fmt: skip


def words_problem(dtype: torch.dtype, weight: Weight4, transposed: bool) -> str | None:
    """None where W may be read in words, else why not."""
    packed, _, _, _, blocksize, N, K = weight
    step = min(blocksize, 64)
    if dtype == torch.float32:
        return "fp32 takes no tensor cores"
    if K == 0 or K % step:
        return f"K = {K} is no positive multiple of {step}"
    if transposed and N % step:
        return f"N = {N} is no multiple of {step}"
    if (0 if packed.is_meta else packed.data_ptr()) % 16 or packed.storage_offset() % 4:
        return "the packed bytes are not at a multiple of 16"
    return None


def precision() -> str:
    """TF32 only where torch would use it: off by default."""
    # allow_tf32 says the same, but raises once a caller has set this
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class _Fixed(NamedTuple):
    """The launches of a plan without their tensors."""

    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Any]
    parts: tuple[int, int, int] | None  # where the sum is split: of the buffer of its parts
    finish: dict[str, Any]  # of the kernel that adds them up


# a training run has a few for each kind of layer; a thousand are some megabytes
@lru_cache(maxsize=1024)
def _fixed(
    machine: Machine,
    tile: Tile,
    precision: str,
    out: Layout,
    x: Layout,
    weight: Any,
    transposed: bool,
    t: Layout | None,
    u: Layout | None,
    bias: Layout | None,
    values: Layout | None,
    grouped: bool,
    length: int,
    blocks: int,
    aligned: bool,
    masked: str,
) -> _Fixed:
    """weight: the layout of a dense one; of one in 4 bits quant_type, blocksize, K and whether it is read in
    words."""
    _, (M, outputs), (stride_out_m, stride_out_o) = out
    dtype, (_, inner), (stride_xm, stride_xc) = x
    stride_uo, stride_ur = (0, 0) if u is None else u[2]
    elements = (inner if masked == "weight" else M) * (inner if masked == "x" else outputs)
    arguments: dict[str, Any] = {
        "M": M,
        "inner": inner,
        "rank": 0 if u is None else u[1][0 if blocks else 1],
        "stride_xm": stride_xm,
        "stride_xc": stride_xc,
        "stride_tm": 0 if t is None else t[2][0],
        "stride_tr": 0 if t is None else t[2][1],
        "blocks": blocks,
        "t_columns": 0 if t is None else t[1][1],
        "BLOCKS": blocks > 0,
        "MASK": masked,
        "WIDE": masked != "" and elements > SHORT_INDICES,
        "ALIGNED": aligned,
        # of MoRA's blocks, unless one serves all; the adjoint reads its columns as rows
        "stride_ub": u[1][0] * u[2][1] if blocks and u is not None and u[1][1] > u[1][0] else 0,
        "stride_uo": stride_ur if blocks and transposed else stride_uo,
        "stride_ur": stride_uo if blocks and transposed else stride_ur,
        "COMPUTE": TYPES[dtype],
        "PRECISION": precision,
        "BLOCK_R": BLOCK_R,
        "BLOCK_O": tile.outputs,
        "BLOCK_M": tile.rows,
        "BLOCK_C": tile.inner,
        "GROUP": GROUP,
        "PARTS": max(1, tile.outputs * tile.rows // (tile.warps * 32) // FINISH_REGISTERS),
    }
    dense = isinstance(weight[0], torch.dtype)
    if dense:
        row, column = weight[2]
        arguments["stride_wo"], arguments["stride_wc"] = (column, row) if transposed else (row, column)
        arguments["ADJOINT"] = transposed and blocks > 0
        # nowhere else, lest every other number of rows needed a kernel of its own
        arguments["EVEN_M"] = M % 16 == 0 and stride_xm == 1
        arguments["EVEN_C"] = inner % 16 == 0 and 1 in (stride_xc, arguments["stride_wc"])
    else:
        quant_type, blocksize, K, words = weight
        arguments |= {
            "line": K // (4 if transposed else 8) if words else K,
            "x_step": stride_xc * tile.inner,
            "NF4": quant_type == "nf4",
            "LOG2_BLOCK": blocksize.bit_length() - 1,
            # how many neighbouring columns of a tile surely have one scale; a row may start inside a block
            "SCALE_COLUMNS": min(blocksize, tile.outputs, K & -K) if words else tile.outputs,
            "TRANSPOSED": transposed,
            "WORDS": words,
        }
    epilogue = {
        "outputs": outputs,
        "P": 1 if values is None else values[1][1],
        "length": length,
        "stride_out_m": stride_out_m,
        "stride_out_o": stride_out_o,
        "stride_bias": 0 if bias is None else bias[2][0],
        "stride_values": 0 if values is None else values[2][0],
        "GROUPED": grouped,
    }
    steps = -(-inner // tile.inner)
    per_split = -(-steps // splits(tile, M, outputs, inner, machine))
    parts = max(1, -(-steps // max(per_split, 1)))
    arguments |= {**epilogue, "steps_per_split": per_split, "SPLIT": parts > 1}
    finish = {**epilogue, "numel": M * outputs, "splits": parts, "BLOCK": FINISH_BLOCK}
    return _Fixed(
        matmul_dense if dense else matmul_4bit,
        (tiles(tile, M, outputs), parts),
        arguments,
        (parts, M, outputs) if parts > 1 else None,
        finish,
    )


def _aligned(columns: int, blocks: int, size: int, transposed: bool) -> bool:
    """Whether a step of `blocks_addend` reads neighbours of its source, and nothing else."""
    if blocks == 0 or size % BLOCK_R or columns % BLOCK_R:
        return False
    return columns == blocks * size or not transposed


def plan(
    machine: Machine,
    out: Tensor,
    x: Tensor,
    weight: Weight4 | Tensor,
    transposed: bool,
    alpha: float,
    t: Tensor | None,
    u: Tensor | None,
    bias: Tensor | None,
    spread: Spread | None,
    middle: tuple[int, float] = (0, 1.0),
    mask: Mask | None = None,
) -> list[Launch]:
    """The launches that compute `out`; none where it is empty. A split sum allocates its parts, fp32.

    middle: so many blocks of r̂ are the middle of MoRA, and its scaling. t is then x or, transposed, dY, and u
    the matrix turned back for each block, [r̂, blocks · r̂], or the matrix.

    mask: 0 in place of what dropout drops, by its row-major index: of x [M, inner], of a dense transposed W
    [inner, outputs], or of the addend t uᵀ [M, outputs]; of a W in 4 bits, of the addend alone.
    """
    M, outputs = out.shape
    launches: list[Launch] = []
    if M == 0 or outputs == 0:
        return launches
    if t is None or u is None or t.shape[1] == 0:
        t = u = None
    values, grouped, length = (None, False, 0) if spread is None else spread
    where, threshold, seed = NO_MASK if mask is None or mask[1] >= 1 << 32 else mask
    full = x.dtype == torch.float32
    threshold -= threshold >> 31 << 32  # as int32, or it were another kernel from 2^31 on
    tensors: dict[str, Any] = {"x": x, "t": t, "u": u, "seed": seed, "threshold": threshold}
    key: Any
    blocks, scaling = middle
    aligned = t is not None and u is not None and _aligned(t.shape[1], blocks, u.shape[0], transposed)
    if isinstance(weight, Tensor):
        tile = THIN_FLOAT32 if full else thin_tile(M, outputs)
        tensors["weight"] = weight
        key = layout(weight)
    else:
        packed, absmax, nested, quant_type, blocksize, _, K = weight
        if nested is not None:
            scales = torch.empty(absmax.shape, dtype=torch.float32, device=absmax.device)
            launches += plan_scales(scales, weight)
            absmax = scales
        words = words_problem(x.dtype, weight, transposed) is None
        if words:
            # what sums its source in registers leaves none for a tile of more rows, nor do wide indices
            crowded = blocks > 0 and transposed and not aligned
            crowded |= where == "addend" and M * outputs > SHORT_INDICES
            rows = min(M, of(CROWDED_ROWS, machine)) if crowded else M
            tile = words_tile(rows, outputs, blocksize, transposed, machine)
            packed = packed.view(torch.int16 if transposed else torch.int32)
        else:
            tile = FLOAT32 if full else BYTES
        tensors["packed"], tensors["absmax"] = packed, absmax
        key = quant_type, blocksize, K, words
    if full and blocks:
        # or it spills; Y's tiles stay the base's, so that a zero matrix gives the base's bits
        tile = tile._replace(outputs=32 if transposed else tile.outputs, warps=2 * tile.warps)
    kernel, grid, arguments, parts, finish = _fixed(
        machine, tile, precision() if full else "ieee", layout(out), layout(x), key, transposed, layout(t),
        layout(u), layout(bias), layout(values), grouped, length, blocks, aligned, where,
    )  # fmt: skip
    tensors["scaling"] = float(scaling)
    end: dict[str, Any] = {"out": out, "bias": bias, "values": values, "alpha": float(alpha)}
    if parts is None:
        launches.append(Launch(kernel, grid, {**arguments, **tensors, **end}, tile.warps, tile.stages))
        return launches
    partial = torch.empty(parts, dtype=torch.float32, device=out.device)
    # the parts are plain sums: everything after the sum happens once, in finish_split
    plain = {"out": partial, "bias": None, "values": None, "alpha": 1.0}
    launches.append(Launch(kernel, grid, {**arguments, **tensors, **plain}, tile.warps, tile.stages))
    programs = -(-finish["numel"] // FINISH_BLOCK)
    launches.append(Launch(finish_split, (programs,), {**finish, **end, "partial": partial}))
    return launches
