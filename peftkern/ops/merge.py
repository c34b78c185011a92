"""merge: W + ΔW as the same kind of weight; merge_error: how far that is from the exact sum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import overload

import torch
from torch import Tensor

from peftkern import dispatch, reference
from peftkern.backends import Call
from peftkern.formats import DoubleQuant, QuantizedWeight
from peftkern.ops.checks import check_tensor, matrix_shape, refuse
from peftkern.ops.quantize import dequantize_4bit, quantize_4bit
from peftkern.reference import MergeError

_CHUNK = 1 << 20  # elements: 8 MB in fp64


def _check_weight(name: str, weight: QuantizedWeight | Tensor) -> None:
    if isinstance(weight, QuantizedWeight):
        return
    shape = matrix_shape(weight)
    if shape is None:
        refuse(name, weight, "a QuantizedWeight or shape [N, K]", None, None)
    check_tensor(name, weight, shape, weight.device)


def _check(weight: QuantizedWeight | Tensor, delta: Tensor) -> None:
    _check_weight("weight", weight)
    check_tensor("delta", delta, tuple(weight.shape), weight.device)


def _merge_calls(weight: QuantizedWeight | Tensor, delta: Tensor) -> tuple[Call, ...]:
    _check(weight, delta)
    if isinstance(weight, Tensor):
        return ()
    return (
        Call("dequantize", weight.device, torch.float32),
        Call("quantize", weight.device, weight.dtype),
    )


@overload
def merge(weight: Tensor, delta: Tensor) -> Tensor: ...
@overload
def merge(weight: QuantizedWeight, delta: Tensor) -> QuantizedWeight: ...
@dispatch.explained_by(_merge_calls)
def merge(weight: QuantizedWeight | Tensor, delta: Tensor) -> QuantizedWeight | Tensor:
    """W + ΔW, summed in fp32, as the same kind of weight; `weight` itself stays as it is.

    A dense weight [N, K] gives a dense one of its dtype, differentiable. A QuantizedWeight is re-quantized
    with its own settings (quant_type, blocksize, double quantization, dtype): the merged weight carries a
    fresh quantization error, as QLoRA's merge does; `merge_error` measures it. delta [N, K], fp32, bf16 or
    fp16. Raises TypeError or ValueError naming the argument.
    """
    _check(weight, delta)
    if isinstance(weight, Tensor):
        return reference.merge(weight, delta)
    merged = dequantize_4bit(weight, torch.float32) + delta.detach()
    merged = merged.to(weight.dtype)
    return quantize_4bit(merged, weight.quant_type, weight.blocksize, weight.nested is not None)


def _check_error(weight: QuantizedWeight | Tensor, delta: Tensor, merged: QuantizedWeight | Tensor) -> None:
    _check(weight, delta)
    _check_weight("merged", merged)
    if tuple(merged.shape) != tuple(weight.shape):
        expected = list(weight.shape)
        raise ValueError(f"merged: expected shape {expected} as the weight's, got shape {list(merged.shape)}")
    if merged.device != weight.device:
        raise ValueError(f"merged: expected device {weight.device} as the weight's, got {merged.device}")


def _chunks(weight: QuantizedWeight | Tensor, size: int) -> Iterator[Tensor]:
    """The weight's values in fp64, `size` of them at a time in row-major order."""
    if isinstance(weight, Tensor):
        for chunk in torch.split(weight.detach().reshape(-1), size):
            yield chunk.double()
        return
    numel, nested = weight.shape[0] * weight.shape[1], weight.nested
    blocks = size // weight.blocksize
    for start in range(0, numel, size):
        first = start // weight.blocksize
        double = None
        if nested is not None:
            groups = slice(first // nested.blocksize, (first + blocks) // nested.blocksize)
            double = DoubleQuant(nested.absmax[groups], nested.code, nested.offset, nested.blocksize)
        part = QuantizedWeight(
            weight.packed[start // 2 : (start + size) // 2],
            weight.absmax[first : first + blocks],
            (1, min(size, numel - start)),
            weight.quant_type,
            weight.blocksize,
            weight.dtype,
            double,
        )
        yield dequantize_4bit(part, torch.float32).view(-1).double()


def _error_calls(
    weight: QuantizedWeight | Tensor, delta: Tensor, merged: QuantizedWeight | Tensor
) -> tuple[Call, ...]:
    _check_error(weight, delta, merged)
    quantized = any(isinstance(operand, QuantizedWeight) for operand in (weight, merged))
    return (Call("dequantize", weight.device, torch.float32),) if quantized else ()


@dispatch.explained_by(_error_calls)
@torch.no_grad()
def merge_error(
    weight: QuantizedWeight | Tensor, delta: Tensor, merged: QuantizedWeight | Tensor
) -> MergeError:
    """How far `merged` is from the exact W + ΔW, as `merge(weight, delta)` leaves it: whether the merge kept
    the update or drowned it. With E = merged - (W + ΔW), over all elements, in fp64:

        maximum   max |E|
        rms       the root mean square of E
        relative  ‖E‖ / ‖ΔW‖ (Frobenius): above 1, the merge moved W by more noise than update
        kept      ⟨merged - W, ΔW⟩ / ‖ΔW‖²: the share of the update that W moved along it; 1: all of it
                  arrived, beside whatever noise; 0: none did, as when no code of a 4-bit weight changed

    weight and merged [N, K], each dense (fp32, bf16 or fp16) or a QuantizedWeight; delta [N, K]. Returns a
    `reference.MergeError` of Python floats; relative and kept are NaN for ΔW = 0, and a NaN in an operand
    makes all four NaN. No gradient. It goes through the weights 2²⁰ elements at a time: no copy of their
    size is made, but of operands that are not contiguous. Raises TypeError or ValueError naming the argument.
    """
    _check_error(weight, delta, merged)
    numel = weight.shape[0] * weight.shape[1]
    if not numel:
        return MergeError(0.0, 0.0, math.nan, math.nan)
    zero = torch.zeros((), dtype=torch.float64, device=weight.device)
    maximum, error2, delta2, moved = zero, zero, zero, zero
    size = _CHUNK
    for operand in (weight, merged):
        if isinstance(operand, QuantizedWeight) and operand.nested is not None:
            # whole groups of blocks, for both; every size is a power of two
            size = max(size, operand.blocksize * operand.nested.blocksize)
    operands = (_chunks(weight, size), _chunks(delta, size), _chunks(merged, size))
    for W, dW, W2 in zip(*operands, strict=True):
        step = W2 - W
        E = step - dW
        maximum = torch.maximum(maximum, E.abs().amax())
        error2, delta2 = error2 + E.square().sum(), delta2 + dW.square().sum()
        moved = moved + torch.dot(step, dW)
    rms = (error2 / numel).sqrt().item()
    if not delta2:
        return MergeError(maximum.item(), rms, math.nan, math.nan)
    return MergeError(maximum.item(), rms, (error2 / delta2).sqrt().item(), (moved / delta2).item())
