"""Triton kernels (triton_kernels/) for CUDA tensors of compute capability 8.0 and up.

With TRITON_INTERPRET=1 in the environment it takes CPU tensors instead, through Triton's interpreter:
slow, for tests; that of Triton 3.6 needs numpy older than 2.4. Triton is imported by the first call that
needs it, so that a machine without a GPU never pays for it.

Above a number of rows (triton_kernels/choices.py) a 4-bit W is dequantized into a scratch buffer, which
torch's allocator takes back when the call ends, and cuBLAS adds the product onto the addend. Below it a
double quantization's scales are decoded into such a buffer, 4 bytes a block.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from contextlib import nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftkern.backends import Backend, Call, Mask, Middle, Spread, Weight4
from peftkern.backends.linear import ComposedLinear, gemm_onto, product_by_product
from peftkern.backends.mora import ComposedMora, OntoBase
from peftkern.reference import keep_threshold

if TYPE_CHECKING:
    from peftkern.triton_kernels.launch import Launch, Machine

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
OLDEST = (3, 6)


@cache
def missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install peftkern[triton])"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # from a distribution of another name
        version = str(importlib.import_module("triton").__version__)
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(int(part) for part in found.groups()) < OLDEST:
        return f"it needs triton {OLDEST[0]}.{OLDEST[1]} or newer, this is {version}"
    return None


def supports(call: Call) -> str | None:
    kind = call.device.type
    if INTERPRETED and kind != "cpu":
        return f"TRITON_INTERPRET=1: it runs tensors on cpu, these are on {call.device}"
    if not INTERPRETED and kind != "cuda":
        return f"it runs tensors on cuda, these are on {call.device}"
    if call.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, this is {str(call.dtype).removeprefix('torch.')}"
    if kind == "cuda":
        if torch.version.hip is not None:
            return "it is for NVIDIA GPUs, this torch is built for ROCm"
        machine = _machine(call.device)
        if machine.capability < 80:
            return f"it needs compute capability 8.0, {call.device} has {machine.capability / 10:.1f}"
    return None


def detail(call: Call) -> str:
    from peftkern.triton_kernels import choices
    from peftkern.triton_kernels.matmul import words_problem

    machine = _machine(call.device)
    text = "Triton's interpreter" if INTERPRETED else f"Triton, sm_{machine.capability}"
    if isinstance(call.weight, Tensor):
        return f"cuBLAS, the adapter by {text}"
    if call.weight is None:
        return text
    limit = choices.crossover(call.dtype == torch.float32, machine)
    if call.rows >= limit:
        return f"{text}; W dequantized for cuBLAS, as x has {call.rows} rows, {limit} or more"
    problem = words_problem(call.dtype, call.weight, False)
    slow = "" if problem is None else f", W byte by byte: {problem}"
    return f"{text}; fused, as x has {call.rows} rows, fewer than {limit}{slow}"


@cache
def _machine(device: torch.device) -> Machine:
    from peftkern.triton_kernels import launch

    if device.type != "cuda":
        return launch.INTERPRETED
    properties: Any = torch.cuda.get_device_properties(device)
    return launch.Machine(properties.major * 10 + properties.minor, properties.multi_processor_count)


def _run(launches: list[Launch], device: torch.device) -> None:
    """On the caller's current stream of `device`, whichever device is current."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        for launch in launches:
            launch.run()


def matmul(
    out: Tensor,
    x: Tensor,
    weight: Weight4 | Tensor,
    transposed: bool = False,
    alpha: float = 1.0,
    t: Tensor | None = None,
    u: Tensor | None = None,
    bias: Tensor | None = None,
    spread: Spread | None = None,
    mask: Mask | None = None,
) -> None:
    from peftkern.triton_kernels import matmul as kernels

    if not isinstance(weight, Tensor) and alpha == 1.0 and out.dtype == x.dtype:
        dense = _dequantized(x, weight)
        if dense is not None:
            matmul_dense(out, x, dense, transposed, t, u, bias, spread, mask)
            return
    machine = _machine(x.device)
    masked = None if mask is None else (mask[0], keep_threshold(mask[1]), mask[2])
    launches = kernels.plan(machine, out, x, weight, transposed, alpha, t, u, bias, spread, mask=masked)
    _run(launches, x.device)


def _dequantized(x: Tensor, weight: Weight4) -> Tensor | None:
    """W in a scratch buffer, where x has so many rows that it pays."""
    from peftkern.triton_kernels import choices

    if x.shape[0] < choices.crossover(x.dtype == torch.float32, _machine(x.device)):
        return None
    scratch = x.new_empty(weight[5], weight[6])
    dequantize(scratch, weight)
    return scratch


matmul_dense = partial(gemm_onto, matmul)


def output_grads(
    G: Tensor | None,
    dB: Tensor | None,
    dbias: Tensor | None,
    dY: Tensor,
    B: Tensor | None,
    T: Tensor | None,
    alpha: float,
) -> None:
    from peftkern.triton_kernels import choices
    from peftkern.triton_kernels import output_grads as kernels

    rank = next((matrix.shape[1] for matrix in (B, T) if matrix is not None), 0)
    if rank > choices.ONE_PASS_RANK or dY.numel() == 0:
        product_by_product(matmul, G, dB, dbias if dY.numel() == 0 else None, dY, B, T, alpha)
        G = dB = None
    if dY.numel() > 0:
        _run(kernels.plan(_machine(dY.device), G, dB, dbias, dY, B, T, alpha), dY.device)


_LINEAR = ComposedLinear(matmul, matmul_dense, output_grads)


def compress(
    out: Tensor,
    x: Tensor,
    grouped: bool,
    length: int,
    rotation: Tensor | None = None,
    inverse: bool = False,
) -> None:
    from peftkern.triton_kernels import compress as kernels

    if x.shape[1] == 0:
        out.zero_()
        return
    _run(kernels.plan(out, x, grouped, length, rotation, inverse), x.device)


def dequantize(out: Tensor, weight: Weight4) -> None:
    from peftkern.triton_kernels import dequantize as kernels

    _run(kernels.plan(out, weight), out.device)


def quantize(weight: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int) -> None:
    from peftkern.triton_kernels import quantize as kernels

    _run(kernels.plan(weight, packed, absmax, quant_type, blocksize), weight.device)


# one block, for some rows at a time
_MORA = ComposedMora(matmul, compress, scratch=1 << 26)
_ONTO_BASE = OntoBase(_MORA.alone, matmul, matmul_dense, None)


def mora(
    out: Tensor,
    z: Tensor | None,
    x: Tensor,
    weight: Weight4 | Tensor | None,
    transposed: bool,
    matrix: Tensor,
    scaling: float,
    bias: Tensor | None,
    middle: Middle,
) -> None:
    """Several blocks: M is turned, not x (triton_kernels/blocks.py), and there is no z. One: composed."""
    from peftkern.triton_kernels import matmul as kernels

    (rows, outputs), size = out.shape, matrix.shape[0]
    _, _, columns, rotation = middle
    if columns == size:
        _ONTO_BASE.mora(out, z, x, weight, transposed, matrix, scaling, bias, middle)
        return
    if rows == 0 or outputs == 0:
        return
    u = matrix
    if rotation is not None:  # the matrix, turned back for each block
        u = x.new_empty(size, columns)
        compress(u, matrix, False, columns, rotation, True)
    dense = _dequantized(x, weight) if isinstance(weight, tuple) else weight
    factor: Tensor = x
    if dense is not None or weight is None:  # the addend alone, onto which cuBLAS adds
        factor, weight = x[:, :0], x.new_empty((0, outputs) if transposed else (outputs, 0))
    machine = _machine(x.device)
    blocks = (columns // size, scaling)
    _run(kernels.plan(machine, out, factor, weight, transposed, 1.0, x, u, bias, None, blocks), x.device)
    if dense is not None:
        out.addmm_(x, dense if transposed else dense.t())


def mora_grad(
    dM: Tensor, dY: Tensor, x: Tensor, scaling: float, columns: int, rotation: Tensor | None
) -> None:
    from peftkern.triton_kernels import mora_grad as kernels

    if dY.numel() == 0 or x.numel() == 0:
        dM.zero_()
        return
    _run(kernels.plan(_machine(x.device), dM, dY, x, scaling, columns, rotation), x.device)


BACKEND = Backend(
    name="triton",
    rows={
        "linear": _LINEAR.forward,
        "linear_grad": _LINEAR.backward,
        "compress": compress,
        "mora": mora,
        "mora_grad": mora_grad,
        "dequantize": dequantize,
        "quantize": quantize,
    },
    supports=supports,
    detail=detail,
    missing=missing,
)
