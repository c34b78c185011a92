"""dM of MoRA from x [M, I] and dY [M, O] as they lie, nothing as wide as either in between:

    dM = scaling · Σ_b R_b(dY_bᵀ x̃_b)

dY_b are the columns b r̂ … (b + 1) r̂ of dY, x̃ repeats the columns of x; n of its blocks are the middle, so
that b of dY meets b mod n of x̃ and of the turns. dY_bᵀ (R_b x̃_b) = R_b(dY_bᵀ x̃_b), R_b on the columns: the
product is turned, not x. One block of x̃, given compressed, is the same with n = 1 and without a turn.

A program takes a tile of dM and a part of the rows of one block, of all blocks where nothing is turned, and
writes its sum in fp32; a second launch turns the parts, adds them up in their order and scales. No atomics,
so the same bits always. Blocks that have no outputs are not read.

x and dY are read r̂ / tile times, from L2 but for the first; 2 M O r̂ flops. The parts are at least 4 O r̂
bytes where blocks are turned, r̂ / M of the bytes of dY and x in 16 bits at O = I, written and read once. At
4096², r̂ = 256 and M = 8192 that is 134 MB of dY and x, 31 µs of an H200, and 17 Gflop, 22 µs. No time was
measured yet.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.triton_kernels.arithmetic import dot
from peftkern.triton_kernels.choices import Tile, mora_grad_tile
from peftkern.triton_kernels.launch import Launch, Layout, Machine, layout
from peftkern.triton_kernels.matmul import precision

FINISH_NUMBERS = 1024  # pairs that a program has under way
FINISH_PARTS = 16  # of them from so many parts


@triton.jit(do_not_specialize=["M", "blocks", "of_x", "steps", "steps_per_part"])
def mora_grad(
    out, dY, x,
    M, size, inputs, outputs, blocks, of_x, steps, steps_per_part,
    stride_part, stride_out_i, stride_out_j, stride_ym, stride_yn, stride_xm, stride_xc, scaling,
    ALIGN_X: tl.constexpr, ALIGN_Y: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out [part, i, j]: scaling times the sum over a part of the steps, `steps` a block of dY, of which those
    beyond M's are empty; of_x: n. ALIGN: a power of two that divides size, the columns and the rows' stride,
    where columns are neighbours."""
    inputs, stride_xm = inputs // ALIGN_X * ALIGN_X, stride_xm // ALIGN_X * ALIGN_X
    outputs, stride_ym = outputs // ALIGN_Y * ALIGN_Y, stride_ym // ALIGN_Y * ALIGN_Y
    part, tile = tl.program_id(0), tl.program_id(1)
    tiles_j = tl.cdiv(size, BLOCK_J)
    first_i, first_j = tile // tiles_j * BLOCK_I, tile % tiles_j * BLOCK_J
    first = part * steps_per_part
    last = tl.minimum(first + steps_per_part, blocks * steps)
    filled = tl.cdiv(M, BLOCK_M)
    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for block in range(first // steps, tl.cdiv(last, steps)):
        # beyond r̂ these are other blocks' columns, whose sums are not stored
        i = tl.multiple_of(block * size + first_i, ALIGN_Y) + tl.arange(0, BLOCK_I)
        j = (tl.multiple_of(block % of_x * size + first_j, ALIGN_X) + tl.arange(0, BLOCK_J)) % inputs
        some_i = i < outputs
        y_line = dY + i.to(tl.int64)[:, None] * stride_yn
        x_line = x + j.to(tl.int64)[None, :] * stride_xc
        before = block * steps
        for step in range(tl.maximum(first - before, 0), tl.minimum(last - before, filled)):
            m = (step * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
            some_m = m < M
            y_tile = tl.load(
                y_line + m[None, :] * stride_ym, mask=some_i[:, None] & some_m[None, :], other=0.0
            )
            x_tile = tl.load(x_line + m[:, None] * stride_xm, mask=some_m[:, None], other=0.0)
            acc = dot(y_tile, x_tile, acc, PRECISION)
    i = (first_i + tl.arange(0, BLOCK_I)).to(tl.int64)[:, None]
    j = (first_j + tl.arange(0, BLOCK_J)).to(tl.int64)[None, :]
    at = out + part.to(tl.int64) * stride_part + i * stride_out_i + j * stride_out_j
    tl.store(at, acc * scaling, mask=(i < size) & (j < size))


@triton.jit(do_not_specialize=["count", "per_block", "of_x"])
def finish_mora_grad(
    dM, parts, rotation, size, half, count, per_block, of_x, stride_i, stride_j, scaling,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """scaling times the sum of `count` parts [r̂, r̂], per_block of them of each block of dY, turned by
    rotation fp32 [n, 2, half], or None; a program has pairs j, j + half of a row, half = ⌈r̂ / 2⌉."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lower, upper = j < half, j + half < size
    source = parts + i * size + j[None, :]
    one = tl.zeros((PARTS, COLUMNS), tl.float32)
    two = tl.zeros((PARTS, COLUMNS), tl.float32)
    for first in range(0, count, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        some = part < count
        at = source + part.to(tl.int64) * size * size
        s = tl.load(at, mask=some & lower[None, :], other=0.0)
        t = tl.load(at + half, mask=some & upper[None, :], other=0.0)
        if rotation is not None:
            table = rotation + part // per_block % of_x * (2 * half) + j[None, :]
            cosine = tl.load(table, mask=some & lower[None, :], other=0.0)
            sine = tl.load(table + half, mask=some & lower[None, :], other=0.0)
            s, t = s * cosine - t * sine, t * cosine + s * sine
        one += s
        two += t
    line = dM + i * stride_i
    tl.store(line + j.to(tl.int64) * stride_j, tl.sum(one, axis=0) * scaling, mask=lower)
    tl.store(line + (j + half).to(tl.int64) * stride_j, tl.sum(two, axis=0) * scaling, mask=upper)


class _Fixed(NamedTuple):
    """The launches of a plan without their tensors."""

    tile: Tile
    grid: tuple[int, int]  # parts, of which there may be many: the second axis ends at 65535; tiles
    arguments: dict[str, Any]
    parts: tuple[int, int, int] | None  # their shape, unless the first launch writes dM
    finish_grid: tuple[int, int]
    finish: dict[str, Any]


@lru_cache(maxsize=1024)
def _fixed(
    machine: Machine, precision: str, dM: Layout, dY: Layout, x: Layout, columns: int, turned: bool
) -> _Fixed:
    dtype, (M, outputs), (stride_ym, stride_yn) = dY
    _, (_, inputs), (stride_xm, stride_xc) = x
    _, (size, _), (stride_i, stride_j) = dM
    blocks, of_x = -(-outputs // size), columns // size
    align_x = math.gcd(size, inputs, stride_xm, 16) if stride_xc == 1 else 1
    align_y = math.gcd(size, outputs, stride_ym, 16) if stride_yn == 1 else 1
    full, narrow = dtype == torch.float32, min(align_x, align_y) < 8
    tile, per_part, parts = mora_grad_tile(M, size, blocks, turned, full, narrow, machine)
    count = blocks * parts if turned else parts
    whole = count == 1 and not turned
    arguments: dict[str, Any] = {
        "M": M,
        "size": size,
        "inputs": inputs,
        "outputs": outputs,
        "blocks": blocks,
        "of_x": of_x,
        # where blocks are turned, no part has steps of two
        "steps": per_part * parts if turned else -(-M // tile.inner),
        "steps_per_part": per_part,
        "stride_part": size * size,
        "stride_out_i": stride_i if whole else size,
        "stride_out_j": stride_j if whole else 1,
        "stride_ym": stride_ym,
        "stride_yn": stride_yn,
        "stride_xm": stride_xm,
        "stride_xc": stride_xc,
        "ALIGN_X": align_x,
        "ALIGN_Y": align_y,
        "PRECISION": precision,
        "BLOCK_I": tile.outputs,
        "BLOCK_J": tile.rows,
        "BLOCK_M": tile.inner,
    }
    half, at_a_time = -(-size // 2), min(FINISH_PARTS, 1 << (count - 1).bit_length())
    finish = {
        "size": size,
        "half": half,
        "count": count,
        "per_block": parts,
        "of_x": of_x,
        "stride_i": stride_i,
        "stride_j": stride_j,
        "PARTS": at_a_time,
        "COLUMNS": FINISH_NUMBERS // at_a_time,
    }
    return _Fixed(
        tile,
        (count, -(-size // tile.outputs) * -(-size // tile.rows)),
        arguments,
        None if whole else (count, size, size),
        (size, -(-half // finish["COLUMNS"])),
        finish,
    )


def plan(
    machine: Machine,
    dM: Tensor,
    dY: Tensor,
    x: Tensor,
    scaling: float,
    columns: int,
    rotation: Tensor | None,
) -> list[Launch]:
    """The launches that compute dM [r̂, r̂] fp32; dY [M, O] and x [M, I] of one dtype and any strides, M, O
    and I not 0; columns = n r̂; rotation fp32 [n, 2, r̂ / 2], contiguous. The scratch buffer, unless the first
    launch has whole sums: fp32, so many parts [r̂, r̂]."""
    fixed = _fixed(
        machine, precision() if x.dtype == torch.float32 else "ieee", layout(dM), layout(dY), layout(x),
        columns, rotation is not None,
    )  # fmt: skip
    tensors = {"dY": dY, "x": x}
    tile, grid, scale = fixed.tile, fixed.grid, float(scaling)
    if fixed.parts is None:
        arguments = {**fixed.arguments, **tensors, "out": dM, "scaling": scale}
        return [Launch(mora_grad, grid, arguments, tile.warps, tile.stages)]
    parts = torch.empty(fixed.parts, dtype=torch.float32, device=dM.device)
    arguments = {**fixed.arguments, **tensors, "out": parts, "scaling": 1.0}
    finish = {**fixed.finish, "dM": dM, "parts": parts, "rotation": rotation, "scaling": scale}
    return [
        Launch(mora_grad, grid, arguments, tile.warps, tile.stages),
        Launch(finish_mora_grad, fixed.finish_grid, finish),
    ]
