"""quantize_4bit and dequantize_4bit: checks, library ops for traced calls, public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import dispatch
from peftkern.backends import Call
from peftkern.dispatch import find
from peftkern.formats import BLOCKSIZES, QUANT_TYPES, QuantizedWeight, double_quantize
from peftkern.ops.checks import DTYPES, check_tensor, matrix_shape, refuse
from peftkern.ops.library import OPS, flatten_weight, is_direct, register, weight4


def _quantize(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """packed uint8 [ceil(n / 2)], absmax fp32 [ceil(n / blocksize)]."""
    numel = weight.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=weight.device)
    if numel:
        row = find("quantize", weight.device, weight.dtype)
        row(weight.contiguous(), packed, absmax, quant_type, blocksize)
    return packed, absmax


def _quantize_fake(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    numel = weight.numel()
    packed = weight.new_empty(((numel + 1) // 2,), dtype=torch.uint8)
    return packed, weight.new_empty((-(-numel // blocksize),), dtype=torch.float32)


def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    blocksize2: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    if rows and columns:
        spec = (quant_type, blocksize, blocksize2, rows, columns)
        weight = weight4(packed, absmax, absmax2, code, offset, spec)
        find("dequantize", packed.device, dtype)(out, weight)
    return out


def _dequantize_fake(packed: Tensor, *args: Any) -> Tensor:
    rows, columns, dtype = args[7:]
    return packed.new_empty((rows, columns), dtype=dtype)


register(
    "quantize_4bit(Tensor weight, str quant_type, int blocksize) -> (Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
register(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? code, Tensor? offset, "
    "str quant_type, int blocksize, int blocksize2, int rows, int columns, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)


def _check_quantize(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> None:
    shape = matrix_shape(weight)
    if shape is None:
        refuse("weight", weight, "shape [N, K]", None, None)
    check_tensor("weight", weight, shape, weight.device)
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: expected one of {QUANT_TYPES}, got {quant_type!r}")
    if isinstance(blocksize, bool) or not isinstance(blocksize, int):
        raise TypeError(f"blocksize: expected an integer, got {blocksize!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, got {blocksize}")
    if not isinstance(double_quant, bool):
        raise TypeError(f"double_quant: expected True or False, got {double_quant!r}")


def _quantize_calls(weight: Tensor, *rest: Any) -> tuple[Call, ...]:
    _check_quantize(weight, *rest)
    return (Call("quantize", weight.device, weight.dtype),)


@dispatch.explained_by(_quantize_calls)
def quantize_4bit(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False
) -> QuantizedWeight:
    """The nearest 4-bit code to weight / absmax(block), block by block of the flat row-major index.

    weight [N, K] fp32, bf16 or fp16, any strides (a copy is made unless it is contiguous); no gradient.
    quant_type "nf4" or "fp4", blocksize 32, 64, … 4096. Returns a QuantizedWeight whose dtype is weight's, on
    its device.

        absmax = max |w| over the block (fp32)
        v      = clamp(w · (1 / max(absmax, 1e-38)), -1, 1)
                 clamp(w / max(absmax, 1e-38), -1, 1) in the short last block
        q      = the code whose interval holds v; intervals end at the fp32 midpoints of neighbouring codes

    The bytes are those of bitsandbytes 0.50.2 on the CPU. Where its backends disagree, that is:

    - a tie goes to the lower value. (Its GPU kernels compare |v| with rounded constants for FP4: a tie goes
      towards zero, and values within 4e-7 of 7/12 can differ; for the short last block they multiply by the
      reciprocal.)
    - FP4: v in (-0.0026, 0] becomes nibble 0 and v in (0, 0.0026] nibble 8; both decode to +0. (Its GPU
      kernels go by v's sign.)
    - a block of zeros has nibbles 7 (NF4) or 0 (FP4) and absmax 0, or 1e-38 when it is the short last block;
    - NaN and Inf stay in their block. A NaN makes its absmax NaN and its nibbles 15 (NF4) or 3 (FP4): it
      decodes to NaN. An Inf makes its absmax Inf: infinite weights decode to +Inf, finite ones to NaN;
    - an odd N·K leaves a last low nibble, that of 0: 7 (NF4) or 0 (FP4).

    double_quant stores absmax as 8-bit codes of absmax - mean(absmax), 256 to a group: 4.127 bits a weight
    instead of 4.5 at blocksize 64. Its bytes too are those of the CPU path, on every device, as the mean is
    taken on the CPU (formats.double_quantize says how); a weight with NaN or Inf raises ValueError, as the
    mean would carry it to every block. Both wait for a GPU.

    Raises TypeError or ValueError naming the argument. Source: QLoRA, Dettmers et al., arXiv 2305.14314;
    bitsandbytes.
    """
    _check_quantize(weight, quant_type, blocksize, double_quant)
    weight = weight.detach()
    if is_direct(weight):
        packed, absmax = _quantize(weight, quant_type, blocksize)
    else:
        packed, absmax = OPS.quantize_4bit(weight, quant_type, blocksize)
    nested = None
    if double_quant:
        absmax, nested = double_quantize(absmax)
    return QuantizedWeight(
        packed, absmax, (weight.shape[0], weight.shape[1]), quant_type, blocksize, weight.dtype, nested
    )


def _check_dequantize(weight: QuantizedWeight, dtype: torch.dtype | None) -> torch.dtype:
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight: expected a QuantizedWeight, got {type(weight).__name__}")
    if dtype is None:
        return weight.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype or None, got {type(dtype).__name__}")
    if dtype not in DTYPES:
        raise TypeError(
            f"dtype: expected float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
        )
    return dtype


def _dequantize_calls(weight: QuantizedWeight, dtype: torch.dtype | None) -> tuple[Call, ...]:
    return (Call("dequantize", weight.device, _check_dequantize(weight, dtype)),)


@dispatch.explained_by(_dequantize_calls)
def dequantize_4bit(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """[N, K] of dtype (weight.dtype when None): round(code[q] · absmax), an fp32 product and one rounding.

    The same bits on every backend, and bitsandbytes' where it is right (its 0.50.2 CPU library is not, with
    AVX-512, when K is a multiple of 16 but not of blocksize). With double quantization absmax = code2[u8] ·
    absmax2 + offset, two fp32 roundings. The result does not depend on a gradient and has none.

    Raises TypeError naming the argument. Source: QLoRA, Dettmers et al., arXiv 2305.14314.
    """
    dtype = _check_dequantize(weight, dtype)
    tensors, spec = flatten_weight(weight)
    dequantize = _dequantize if is_direct(*tensors) else OPS.dequantize_4bit
    return dequantize(*tensors, *spec, dtype)
