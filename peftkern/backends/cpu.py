"""The compiled CPU kernels (csrc/) for CPU tensors of fp32, bf16 and fp16. `_cpu` picks the instructions."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, get_num_threads

from peftkern.backends import Backend, Call, Spread, Weight4, gemm_onto, product_by_product
from peftkern.backends.blocks import Blocks

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
    if call.primitive == "matmul_dense":
        return f"torch's GEMM, the addend by {_cpu.kernel('matmul', call.dtype)}"
    if call.primitive in ("blocks", "blocks_grad"):
        return f"{_cpu.kernel('compress', call.dtype)}, {_cpu.kernel('matmul', call.dtype)}, in row blocks"
    return str(_cpu.kernel("matmul" if call.primitive == "output_grads" else call.primitive, call.dtype))


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


matmul_dense = partial(gemm_onto, matmul)


def dequantize(out: Tensor, weight: Weight4) -> None:
    _cpu.dequantize(out, weight, get_num_threads())


def quantize(weight: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int) -> None:
    _cpu.quantize(weight, packed, absmax, quant_type, blocksize, get_num_threads())


def dropout(out: Tensor, x: Tensor, p: float, seed: Tensor) -> None:
    _cpu.dropout(out, x, p, int(seed), get_num_threads())


def compress(
    out: Tensor,
    x: Tensor,
    grouped: bool,
    length: int,
    rotation: Tensor | None = None,
    inverse: bool = False,
) -> None:
    _cpu.compress(out, x, grouped, length, rotation, inverse, get_num_threads())


# Row blocks large enough to hide that each decodes W anew; parts that stay in the threads' L2 caches.
_BLOCKS = Blocks(matmul, matmul_dense, compress, rows=384, scratch=1 << 21)

BACKEND = Backend(
    name="cpu",
    rows={
        "matmul": matmul,
        "matmul_dense": matmul_dense,
        "output_grads": partial(product_by_product, matmul),
        "dequantize": dequantize,
        "quantize": quantize,
        "dropout": dropout,
        "compress": compress,
        "blocks": _BLOCKS.product,
        "blocks_grad": _BLOCKS.grad,
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
