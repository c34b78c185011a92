"""Every public op in plain PyTorch: same names, same arguments, differentiable, on any device. The oracle of
the other backends.

x may also be fp64 here; then everything is computed in fp64, from the fp32 values of the decoded weight.
Otherwise everything is computed in fp32 and rounded once, to x's dtype, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from peftkern.formats import QuantizedWeight, code_table, double_quantize

_UINT32 = 0xFFFFFFFF
# bitsandbytes divides by no less than this; as fp32 it is the subnormal 9.9999994e-39.
_SMALLEST_SCALE = 1e-38


# ---- quantization


def quantize_4bit(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False
) -> QuantizedWeight:
    """The nearest code to weight / absmax(block), block by block of the row-major index. weight [N, K].

        absmax = max |w| over the block
        v      = clamp(w * (1 / max(absmax, 1e-38)), -1, 1) in fp32
                 clamp(w / max(absmax, 1e-38), -1, 1) in the short last block
        q      = the code whose interval holds v; intervals end at the fp32 midpoints of neighbouring codes

    Bit for bit what bitsandbytes 0.50.2 does on the CPU: `peftkern.quantize_4bit` says what that means for
    ties, zeros, NaN and Inf. double_quant: see `formats.double_quantize`.
    """
    flat = weight.detach().reshape(-1).float()
    numel = flat.numel()
    full = numel - numel % blocksize
    blocks = flat[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    unit = (blocks * absmax.clamp(min=_SMALLEST_SCALE).reciprocal()[:, None]).view(-1)
    if full < numel:
        scale = flat[full:].abs().amax().clamp(min=_SMALLEST_SCALE)
        absmax = torch.cat((absmax, scale[None]))
        unit = torch.cat((unit, flat[full:] / scale))
    if numel % 2:
        unit = torch.nn.functional.pad(unit, (0, 1))

    values, order = code_table(quant_type, flat.device).sort(stable=True)
    thresholds = (values[:-1] + values[1:]) / 2
    codes = order.to(torch.uint8)[torch.bucketize(unit.clamp(-1.0, 1.0), thresholds, out_int32=True)]
    packed = codes[::2] << 4 | codes[1::2]
    nested = None
    if double_quant:
        absmax, nested = double_quantize(absmax)
    shape = (weight.shape[0], weight.shape[1])
    return QuantizedWeight(packed, absmax, shape, quant_type, blocksize, weight.dtype, nested)


def absmax_values(weight: QuantizedWeight) -> Tensor:
    """fp32 [ceil(N K / blocksize)]: the scale of each block, decoded from its 8 bits when nested."""
    nested = weight.nested
    if nested is None:
        return weight.absmax
    scales = nested.absmax.repeat_interleave(nested.blocksize)[: weight.absmax.shape[0]]
    return nested.code[weight.absmax.int()] * scales + nested.offset


def dequantize_4bit(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """[N, K]: round(code[q] * absmax), an fp32 product and one rounding to dtype (weight.dtype when None)."""
    rows, columns = weight.shape
    numel = rows * columns
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), 1).view(-1)[:numel]
    values = code_table(weight.quant_type, weight.device)[codes.int()]
    scales = absmax_values(weight).repeat_interleave(weight.blocksize)[:numel]
    return (values * scales).to(weight.dtype if dtype is None else dtype).view(rows, columns)


# ---- linear


def _dense(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return (
        weight.to(dtype) if isinstance(weight, Tensor) else dequantize_4bit(weight, torch.float32).to(dtype)
    )


def matmul(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    transposed: bool = False,
    alpha: float = 1.0,
    t: Tensor | None = None,
    u: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """out[m, o] = alpha * (sum_c x[m, c] w(o, c) + sum_r t[m, r] u[o, r]) + bias[o], in x's dtype: the one
    primitive.

    w(o, c) = W[o, c], W [outputs, inner]; transposed: w(o, c) = W[c, o], W [inner, outputs]. x [..., inner],
    t [..., R], u [outputs, R].
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        w = _dense(weight, dtype)
        out = x.to(dtype) @ (w if transposed else w.t())
        if t is not None and u is not None:
            out = out + t.to(dtype) @ u.to(dtype).t()
        out = out * alpha
        if bias is not None:
            out = out + bias.to(dtype)
        return out.to(x.dtype)


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def linear_4bit(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Y = X Wᵀ + b. x [..., K], weight [N, K], bias [N] → [..., N] of x's dtype (or autocast's)."""
    return matmul(_autocast(x), weight, bias=bias)


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Y = X Wᵀ + scaling · drop(X) Aᵀ Bᵀ + b. x [..., K], weight [N, K], lora_A [R, K], lora_B [N, R], bias
    [N] → [..., N].

    drop(x) = where(keep, x, 0) / (1 - dropout) with the mask of `dropout_mask(seed, x.shape, dropout)`; a
    dropped NaN or Inf is 0; dropout = 1 leaves the base product alone. Without a seed it takes one from
    torch's generator of x's device. W may be dense, and gets a gradient then if it asks for one. T = X Aᵀ is
    not rounded.

    Raises ValueError for a dropout outside [0, 1].
    """
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: expected 0 <= dropout <= 1, got {dropout}")
    x = _autocast(x)
    # one cast for both branches, so that dX too is rounded once
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    dropped = wide
    if dropout > 0.0:
        mask = dropout_mask(draw_seed(x.device) if seed is None else seed, x.shape, dropout, x.device)
        dropped = torch.where(mask, wide, 0.0)
    t = matmul(dropped, lora_A, alpha=scaling / (1.0 - dropout) if dropout < 1.0 else 0.0)
    return matmul(wide, weight, t=t, u=lora_B, bias=bias).to(x.dtype)


def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """ΔW = scaling · B A. lora_A [R, K], lora_B [N, R] → [N, K] in the two dtypes' common one."""
    common = torch.promote_types(lora_A.dtype, lora_B.dtype)
    dtype = torch.float64 if common == torch.float64 else torch.float32
    with torch.autocast(lora_A.device.type, enabled=False):
        return (lora_B.to(dtype) @ lora_A.to(dtype) * scaling).to(common)


_Weight = TypeVar("_Weight", Tensor, QuantizedWeight)


def merge(weight: _Weight, delta: Tensor) -> _Weight:
    """W + ΔW, summed in fp32 (fp64 for fp64) and rounded to W's dtype; a 4-bit W is quantized again."""
    if isinstance(weight, Tensor):
        dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
        return (weight.to(dtype) + delta.to(dtype)).to(weight.dtype)
    merged = (dequantize_4bit(weight, torch.float32) + delta.float()).to(weight.dtype)
    return quantize_4bit(merged, weight.quant_type, weight.blocksize, weight.nested is not None)


# ---- seeded dropout


def draw_seed(device: torch.device | str | None = None) -> Tensor:
    """An int64 scalar tensor from torch's generator of the device: torch.manual_seed repeats it."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=device)


def _mix(x: Tensor) -> Tensor:
    # int64 lanes hold uint32 values; an int64 product wraps, and its low 32 bits are right all the same
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _UINT32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)


def keep_threshold(p: float) -> int:
    """How many of the 2^32 hash values are kept: round((1 - p) 2^32)."""
    return round((1.0 - p) * 2.0**32)


def dropout_mask(
    seed: int | Tensor, shape: Sequence[int], p: float, device: torch.device | str | None = None
) -> Tensor:
    """bool of `shape`: True keeps the element, with probability 1 - p. Depends on the seed and the row-major
    index alone.

    seed: any 64-bit integer, or an int64 scalar tensor. For x [M, K] the index is i = m K + k, in 64 bits.
    Every operation is on unsigned 32-bit integers that wrap; seed_lo, i_lo are the low and seed_hi, i_hi the
    high halves (two's complement):

        mix(x):  x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16
        k0   = mix(seed_lo + mix(seed_hi + 0x9E3779B9))
        k1   = mix(k0 + i_hi + 0x85EBCA6B)
        h    = mix(mix(i_lo ^ k0) + k1)
        keep = h < round((1 - p) 2^32)          compared as 64-bit numbers: p = 0 keeps all, p = 1 none

    mix is a bijection with good avalanche ("lowbias32" of C. Wellons' hash-prospector, public domain). There
    are two rounds with two keys because one round, mix(i + key), would give any two seeds shifted copies of
    one sequence.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    k0 = _mix(((seed & _UINT32) + _mix(((seed >> 32 & _UINT32) + 0x9E3779B9) & _UINT32)) & _UINT32)
    index = torch.arange(math.prod(shape), dtype=torch.int64, device=seed.device)
    k1 = _mix((k0 + (index >> 32) + 0x85EBCA6B) & _UINT32)
    h = _mix((_mix((index & _UINT32) ^ k0) + k1) & _UINT32)
    return (h < keep_threshold(p)).view(tuple(shape))
