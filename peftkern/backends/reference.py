"""Every primitive in plain PyTorch, on any device and in any floating dtype: what the other backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import reference
from peftkern.backends import Backend, Call, Weight4
from peftkern.formats import DoubleQuant, QuantizedWeight


def _dense(weight: Weight4 | Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    packed, absmax, nested, quant_type, blocksize, rows, columns = weight
    double = None if nested is None else DoubleQuant(*nested)
    quantized = QuantizedWeight(packed, absmax, (rows, columns), quant_type, blocksize, torch.float32, double)
    return reference.dequantize_4bit(quantized, dtype)


def matmul(
    out: Tensor,
    x: Tensor,
    weight: Weight4 | Tensor,
    transposed: bool = False,
    alpha: float = 1.0,
    t: Tensor | None = None,
    u: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = _dense(weight, dtype)
    y = x.to(dtype) @ (w if transposed else w.t())
    if t is not None and u is not None:
        y += t.to(dtype) @ u.to(dtype).t()
    y *= alpha
    if bias is not None:
        y += bias.to(dtype)
    out.copy_(y)


def matmul_dense(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    transposed: bool = False,
    t: Tensor | None = None,
    u: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    matmul(out, x, weight, transposed, 1.0, t, u, bias)


def dequantize(out: Tensor, weight: Weight4) -> None:
    out.copy_(_dense(weight, out.dtype).view(out.shape))


def quantize(weight: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int) -> None:
    quantized = reference.quantize_4bit(weight.reshape(1, -1), quant_type, blocksize)
    packed.copy_(quantized.packed.view(packed.shape))
    absmax.copy_(quantized.absmax.view(absmax.shape))


def dropout(out: Tensor, x: Tensor, p: float, seed: Tensor) -> None:
    torch.where(reference.dropout_mask(x.shape, p, seed), x / (1.0 - p), 0.0, out=out)


BACKEND = Backend(
    name="reference",
    rows={
        "matmul": matmul,
        "matmul_dense": matmul_dense,
        "dequantize": dequantize,
        "quantize": quantize,
        "dropout": dropout,
    },
    supports=lambda call: None if call.dtype.is_floating_point else f"it takes floating dtypes, this is {call.dtype}",
    detail=lambda call: "plain PyTorch",
    missing=lambda: None,
)
