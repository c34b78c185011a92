"""Every primitive in plain PyTorch, on any device: what the other backends are held to."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from peftkern import reference
from peftkern.backends import Backend, Call, Mask, Spread, Weight4
from peftkern.backends.linear import ComposedLinear, product_by_product
from peftkern.backends.mora import ComposedMora, OntoBase
from peftkern.formats import DoubleQuant, QuantizedWeight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _weight(weight: Weight4 | Tensor) -> QuantizedWeight | Tensor:
    if isinstance(weight, Tensor):
        return weight
    packed, absmax, nested, quant_type, blocksize, rows, columns = weight
    double = None if nested is None else DoubleQuant(*nested)
    return QuantizedWeight(packed, absmax, (rows, columns), quant_type, blocksize, torch.float32, double)


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
    # in fp32 up to here: out's dtype may be wider than x's
    x = x.float()
    if mask is not None:
        where, p, seed = mask
        if where == "x":
            x = _dropped(x, p, seed)
        elif where == "weight":
            assert isinstance(weight, Tensor)
            weight = _dropped(weight, p, seed)
        else:
            assert t is not None
            assert u is not None
            spread = (_dropped(reference.matmul(t.float(), u), p, seed), False, out.shape[1])
            t = u = None
    out.copy_(reference.matmul(x, _weight(weight), transposed, alpha, t, u, bias, spread))


def _dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return x.masked_fill(~reference.dropout_mask(seed, x.shape, p, x.device), 0.0)


def matmul_dense(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    t: Tensor | None,
    u: Tensor | None,
    bias: Tensor | None,
    spread: Spread | None = None,
    mask: Mask | None = None,
) -> None:
    matmul(out, x, weight, transposed, 1.0, t, u, bias, spread, mask)


def compress(
    out: Tensor,
    x: Tensor,
    grouped: bool,
    length: int,
    rotation: Tensor | None = None,
    inverse: bool = False,
) -> None:
    out.copy_(reference.compress(x.float(), out.shape[1], grouped, length, rotation, inverse))


def dequantize(out: Tensor, weight: Weight4) -> None:
    quantized = _weight(weight)
    assert isinstance(quantized, QuantizedWeight)
    out.copy_(reference.dequantize_4bit(quantized, out.dtype).view(out.shape))


def quantize(weight: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int) -> None:
    quantized = reference.quantize_4bit(weight.reshape(1, -1), quant_type, blocksize)
    packed.copy_(quantized.packed.view(packed.shape))
    absmax.copy_(quantized.absmax.view(absmax.shape))


def supports(call: Call) -> str | None:
    if call.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, this is {str(call.dtype).removeprefix('torch.')}"
    return None


_LINEAR = ComposedLinear(matmul, matmul_dense, partial(product_by_product, matmul))
_MORA = ComposedMora(matmul, compress, scratch=1 << 21)

BACKEND = Backend(
    name="reference",
    rows={
        "linear": _LINEAR.forward,
        "linear_grad": _LINEAR.backward,
        "compress": compress,
        "mora": OntoBase(_MORA.alone, matmul, matmul_dense, 384).mora,
        "mora_grad": _MORA.grad,
        "dequantize": dequantize,
        "quantize": quantize,
    },
    supports=supports,
    detail=lambda call: "plain PyTorch",
    missing=lambda: None,
)
