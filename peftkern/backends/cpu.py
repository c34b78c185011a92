"""The compiled CPU kernels (csrc/) for CPU tensors of fp32, bf16 and fp16. `_cpu` picks the instructions."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, get_num_threads

from peftkern.backends import Backend, Call, Dropout, Middle, Spread, Weight4
from peftkern.backends.dropout import Masked
from peftkern.backends.linear import ComposedLinear, gemm_onto, product_by_product
from peftkern.backends.mora import ComposedMora, OntoBase

_cpu: Any = None
_missing: str | None = None
try:
    _cpu = importlib.import_module("peftkern._cpu")
except ImportError as error:  # a bad PEFTKERN_ISA is a ValueError and goes through
    _missing = f"the extension peftkern._cpu is not available ({error})"

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def missing() -> str | None:
    return _missing


def supports(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"it runs tensors on cpu, these are on {call.device}"
    if call.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, this is {str(call.dtype).removeprefix('torch.')}"
    return None


def detail(call: Call) -> str:
    primitive = "matmul" if call.primitive.startswith("linear") else call.primitive
    kernel = str(_cpu.kernel(primitive, call.dtype))
    return f"torch's GEMM, the adapter by {kernel}" if isinstance(call.weight, Tensor) else kernel


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
) -> None:
    _cpu.matmul(out, x, weight, transposed, alpha, t, u, bias, spread, get_num_threads())


def dequantize(out: Tensor, weight: Weight4) -> None:
    _cpu.dequantize(out, weight, get_num_threads())


def quantize(weight: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int) -> None:
    _cpu.quantize(weight, packed, absmax, quant_type, blocksize, get_num_threads())


def dropout(out: Tensor, x: Tensor, p: float, seed: Tensor, start: int = 0) -> None:
    _cpu.dropout(out, x, p, int(seed), start, get_num_threads())


def compress(
    out: Tensor,
    x: Tensor,
    grouped: bool,
    length: int,
    rotation: Tensor | None = None,
    inverse: bool = False,
) -> None:
    _cpu.compress(out, x, grouped, length, rotation, inverse, get_num_threads())


def renew_pages(data: Tensor) -> None:
    _cpu.renew_pages(data)


# What is made in between: parts that stay in the threads' L2 caches.
_SCRATCH = 1 << 21
# Rows for which W is decoded anew: enough to hide it.
_ROWS = 384

_masked = Masked(matmul, dropout, _SCRATCH, _ROWS).matmul
_matmul_dense = partial(gemm_onto, _masked)
_LINEAR = ComposedLinear(_masked, _matmul_dense, partial(product_by_product, matmul))


def linear(
    out: Tensor,
    T: Tensor | None,
    x: Tensor,
    weight: Weight4 | Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    bias: Tensor | None,
) -> None:
    if dropout is None and isinstance(weight, tuple):
        _cpu.linear(out, T, x, weight, A, B, scaling, bias, get_num_threads())
    else:
        _LINEAR.forward(out, T, x, weight, A, B, scaling, dropout, bias)


def linear_grad(
    dx: Tensor | None,
    dA: Tensor | None,
    dB: Tensor | None,
    dbias: Tensor | None,
    dY: Tensor,
    x: Tensor | None,
    weight: Weight4 | Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    T: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
) -> None:
    if dropout is None and not isinstance(weight, Tensor):
        _cpu.linear_grad(dx, dA, dB, dbias, dY, x, weight, A, B, T, scaling, get_num_threads())
    else:
        _LINEAR.backward(dx, dA, dB, dbias, dY, x, weight, A, B, T, scaling, dropout)


_MORA = ComposedMora(matmul, compress, _SCRATCH)


def _in_one_pass(rows: int, size: int) -> bool:
    """Whether to bring a matrix [size, size] into panels for so many rows of the middle: if it is small, or
    they are many. In turns, 2 threads, bf16, cached, against the composition: up to r̂ = 512 0.8 to 7 times as
    fast from 1 row on, from r̂ = 724 on 0.4 to 1.2 below the limit and 1.0 to 1.3 above."""
    return size <= 512 or 4 * rows >= size


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
    size = matrix.shape[0]
    if not isinstance(weight, Tensor) and _in_one_pass(x.shape[0] * (middle.columns // size), size):
        _cpu.mora(out, z, x, weight, transposed, matrix, scaling, bias, *middle, get_num_threads())
    elif weight is None:
        _MORA.alone(out, z, x, transposed, matrix, scaling, bias, middle)
    else:
        _ONTO_BASE.mora(out, z, x, weight, transposed, matrix, scaling, bias, middle)


def _mora_alone(out: Tensor, z: Tensor | None, x: Tensor, *args: Any) -> None:
    mora(out, z, x, None, *args)


_ONTO_BASE = OntoBase(_mora_alone, matmul, _matmul_dense, _ROWS)


def mora_grad(
    dM: Tensor, dY: Tensor, x: Tensor, scaling: float, columns: int, rotation: Tensor | None
) -> None:
    size = dM.shape[0]
    # the middles of one block are there: a product; and one of large matrices has outputs to share out
    if size < columns and size <= 512 and _in_one_pass(x.shape[0] * (columns // size), size):
        _cpu.mora_grad(dM, dY, x, scaling, columns, rotation, get_num_threads())
    else:
        _MORA.grad(dM, dY, x, scaling, columns, rotation)


BACKEND = Backend(
    name="cpu",
    rows={
        "linear": linear,
        "linear_grad": linear_grad,
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


@contextmanager
def use_isa(name: str | None) -> Iterator[None]:
    """Run the CPU kernels at instruction set level `name`, one of `_cpu.isa_levels()`; None means the best.

    It holds for the whole process, and must not change while another thread is inside an op. Raises
    ValueError naming the levels of this machine.
    """
    if _cpu is None:
        raise RuntimeError(str(_missing))
    before = _cpu.isa()
    _cpu.set_isa(name)
    try:
        yield
    finally:
        _cpu.set_isa(before)
