"""lora_linear: the frozen product with its low-rank adapter as addend; lora_delta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import dispatch, reference
from peftkern.backends import Call
from peftkern.formats import QuantizedWeight
from peftkern.ops.checks import check_base, check_dropout, check_scaling, check_tensor, matrix_shape, refuse
from peftkern.ops.library import call
from peftkern.ops.linear import linear
from peftkern.reference import draw_seed


def _check_adapter(lora_A: Tensor, lora_B: Tensor, columns: int, rows: int, device: torch.device) -> None:
    shape = matrix_shape(lora_A)
    if shape is None:
        refuse("lora_A", lora_A, f"shape [R, {columns}]", None, device)
    rank = shape[0]
    check_tensor("lora_A", lora_A, (rank, columns), device)
    check_tensor("lora_B", lora_B, (rows, rank), device)


def _check(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout: float,
) -> torch.dtype:
    """Raises for anything that the op does not take; returns the dtype to compute in."""
    rows, columns, device, dtype = check_base(x, weight)
    _check_adapter(lora_A, lora_B, columns, rows, device)
    if bias is not None:
        check_tensor("bias", bias, (rows,), device)
    check_scaling(scaling)
    check_dropout(dropout, scaling)
    return dtype


def _calls(x: Tensor, weight: QuantizedWeight | Tensor, *rest: Any) -> tuple[Call, ...]:
    return (call("linear", x, _check(x, weight, *rest), weight),)


@dispatch.explained_by(_calls)
def lora_linear(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Y = X Wᵀ + s · dropout(X) Aᵀ Bᵀ + b, the adapter added inside the frozen product, which with a 4-bit W
    writes Y once.

    x [..., K] fp32, bf16 or fp16, any strides, any batch shape, empty too; weight a dense [N, K] of x's dtype
    or a QuantizedWeight; lora_A [R, K], lora_B [N, R] and bias [N] of any of these dtypes (PEFT keeps
    adapters in fp32 beside a bf16 x). Returns [..., N] of x's dtype, contiguous.

    T = s · dropout(X) Aᵀ is rounded to x's dtype; every sum runs in fp32. With a dense W, the addend is
    written to Y first and torch's own GEMM adds to it, which costs one more rounding to x's dtype; its bits
    are torch's, and in fp32 they may depend on the thread count, while with a QuantizedWeight they do not.

    Backward, with p = dropout, drop(·) the mask alone and G = s / (1 - p) · dY B: dX = dY W + drop(G A),
    dA = Gᵀ drop(X), dB = dYᵀ T, dbias = Σ dY, each in its own parameter's dtype, and only those that are
    asked for. A QuantizedWeight is frozen; a dense W that requires grad gets dW = dYᵀ X. Saved: x, A, B, T
    and the weight by reference, never a dequantized W. First derivatives in reverse mode only: double
    backward and forward mode raise RuntimeError.

    dropout acts on the adapter's input alone, always (training or not is the caller's business). Its seed is
    drawn from torch's generator of x's device, so manual_seed repeats it and checkpointing replays it;
    backward rebuilds the mask from the seed. No dropped copy of x is made (but on reference): triton masks as
    it loads, cpu drops some rows at a time, 2 MB of x (or a row) and, for dX, 384 rows of G A in fp32.

    Under torch.autocast x and a dense W are cast as F.linear casts them; the adapters are brought to that
    dtype inside the product and keep their own dtype for their gradients.

    Raises TypeError or ValueError naming the argument; RuntimeError when a forced backend cannot run the
    call. Method: LoRA, Hu et al., arXiv 2106.09685; QLoRA, Dettmers et al., arXiv 2305.14314.
    """
    dtype = _check(x, weight, lora_A, lora_B, scaling, bias, dropout)
    if dtype is not x.dtype:
        x = x.to(dtype)
    seed = None if dropout == 0.0 else draw_seed(x.device)
    return linear(x, weight, lora_A, lora_B, bias, scaling, dropout, seed)


def _check_delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Call, ...]:
    A, B = matrix_shape(lora_A), matrix_shape(lora_B)
    if A is None:
        refuse("lora_A", lora_A, "shape [R, K]", None, None)
    if B is None:
        refuse("lora_B", lora_B, "shape [N, R]", None, None)
    _check_adapter(lora_A, lora_B, A[1], B[0], lora_A.device)
    check_scaling(scaling)
    return ()


@dispatch.explained_by(_check_delta)
def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """ΔW = s · B A: what the adapter adds to W.

    lora_A [R, K], lora_B [N, R], fp32, bf16 or fp16. Returns [N, K] in the two dtypes' common one, summed in
    fp32 and rounded once; differentiable to any order. Raises TypeError or ValueError naming the argument.
    """
    _check_delta(lora_A, lora_B, scaling)
    return reference.lora_delta(lora_A, lora_B, scaling)
