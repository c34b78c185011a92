"""lora_linear: the frozen product with its low-rank adapter as addend; lora_delta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import dispatch, reference
from peftkern.backends import Call, Weight4
from peftkern.formats import QuantizedWeight
from peftkern.ops.linear import (
    NO_WEIGHT,
    PLAIN,
    WeightSpec,
    as_rows,
    base_matmul,
    check_base,
    check_dropout,
    check_scaling,
    check_tensor,
    flatten_weight,
    is_direct,
    like_rows,
    matmul_row,
    needs_graph,
    no_double_backward,
    output_grads,
    refuse,
    thin_matmul,
    weight4,
)
from peftkern.ops.linear import (
    dropout as apply_dropout,
)
from peftkern.reference import draw_seed


def _alpha(scaling: float, p: float) -> float:
    """s / (1 - p): dropout's scale rides along with the adapter's, so that the mask itself rounds nothing."""
    return scaling / (1.0 - p) if p < 1.0 else 0.0


def _forward(
    traced: bool,
    x: Tensor,
    weight: Weight4 | Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    """Y [..., N] and T = s · dropout(X) Aᵀ [M, R], rounded to x's dtype."""
    row = matmul_row(traced, x)
    rows = x if x.ndim == 2 else as_rows(x, A.shape[1])
    thin = rows if seed is None else apply_dropout(traced, rows, p, seed)
    T = thin_matmul(row, thin, A, False, scaling if p == 0.0 else _alpha(scaling, p))
    y = base_matmul(row, rows, weight, False, T, B, bias)
    return like_rows(y, x), T


def _save(
    ctx: Any,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    dense: Tensor | None,
    seed: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    spec: WeightSpec | None,
    scaling: float,
    p: float,
    T: Tensor,
) -> None:
    """Only what the gradients that are asked for will read."""
    needs_x, needs_A, needs_B, needs_bias, needs_W = ctx.needs_input_grad[:5]
    ctx.settings = spec, scaling, p, A.dtype, B.dtype, bias.dtype if bias is not None and needs_bias else None
    ctx.save_for_backward(
        x if needs_A or needs_W else None,
        A if needs_x else None,
        B if needs_x or needs_A else None,
        T if needs_B else None,
        seed,
        *((dense, *tensors) if needs_x else (None,) * 6),
    )


def _backward(ctx: Any, traced: bool, grad: Tensor) -> tuple[Any, ...]:
    """The gradients of x, A, B, bias and the dense W."""
    x, A, B, T, seed, dense, packed, absmax, absmax2, code, offset = ctx.saved_tensors
    needs_x, needs_A, _, _, needs_W = ctx.needs_input_grad[:5]
    spec, scaling, p, A_dtype, B_dtype, bias_dtype = ctx.settings
    row = matmul_row(traced, grad)
    dY = as_rows(grad, grad.shape[-1])
    dx = dA = dW = None
    # s/(1-p) · dY B [M, R], dYᵀ T [N, R], Σ dY [N]: those of which the operands were saved
    G: Any
    G, dB, dbias = output_grads(traced, dY, B, T, _alpha(scaling, p), B_dtype, bias_dtype)
    if needs_A or needs_W:
        rows = as_rows(x, x.shape[-1])
    if needs_A:
        thin = rows if seed is None else apply_dropout(traced, rows, p, seed)
        dA = thin_matmul(row, G.t(), thin, True, 1.0, A_dtype)  # Gᵀ dropout(X), [R, K]
    if needs_x:
        weight = weight4(packed, absmax, absmax2, code, offset, spec) if dense is None else dense
        if seed is None:
            dx = base_matmul(row, dY, weight, True, G, A.t())
        else:
            # the mask falls between the adapter's product and the sum
            dx = base_matmul(row, dY, weight, True)
            dx = dx + apply_dropout(traced, thin_matmul(row, G, A, True), p, seed)
        if grad.ndim != 2:
            dx = dx.view(*grad.shape[:-1], dx.shape[-1])
    if needs_W:
        dW = torch.mm(dY.t(), rows)
    return dx, dA, dB, dbias, dW


class _LoraLinear(torch.autograd.Function):
    """Direct."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        dense: Tensor | None,
        seed: Tensor | None,
        quantized: QuantizedWeight | None,
        scaling: float,
        p: float,
    ) -> Tensor:
        operand: Any = dense if quantized is None else quantized.kernel_args
        y, T = _forward(False, x, operand, A, B, bias, seed, scaling, p)
        tensors, spec = NO_WEIGHT if quantized is None else flatten_weight(quantized)
        _save(ctx, x, A, B, bias, dense, seed, tensors, spec, scaling, p, T)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        no_double_backward(ctx, grad, "lora_linear")
        return *_backward(ctx, not is_direct(grad), grad), None, None, None, None


class _LoraLinearTraced(torch.autograd.Function):
    """T is a second output: functorch saves nothing but inputs and outputs. It stays differentiable, so that
    dB, which is made of it, raises when it is differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        dense: Tensor | None,
        seed: Tensor | None,
        packed: Tensor,
        absmax: Tensor,
        absmax2: Tensor | None,
        code: Tensor | None,
        offset: Tensor | None,
        spec: WeightSpec,
        scaling: float,
        p: float,
    ) -> tuple[Tensor, Tensor]:
        weight = weight4(packed, absmax, absmax2, code, offset, spec) if dense is None else dense
        return _forward(True, x, weight, A, B, bias, seed, scaling, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, A, B, bias, dense, seed, *tensors, spec, scaling, p = inputs
        _save(ctx, x, A, B, bias, dense, seed, tuple(tensors), spec, scaling, p, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        return *_backward(ctx, True, grad), None, None, None, None, None, None, None, None, None


def check_adapter(lora_A: Tensor, lora_B: Tensor, columns: int, rows: int, device: torch.device) -> None:
    if not isinstance(lora_A, Tensor) or lora_A.dim() != 2:
        refuse("lora_A", lora_A, f"shape [R, {columns}]", None, device)
    rank = lora_A.shape[0]
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
    check_adapter(lora_A, lora_B, columns, rows, device)
    if bias is not None:
        check_tensor("bias", bias, (rows,), device)
    check_scaling(scaling)
    check_dropout(dropout)
    return dtype


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

    Backward, with G = s · dY B: dX = dY W + G A, dA = Gᵀ X, dB = dYᵀ T, dbias = Σ dY, each in its own
    parameter's dtype, and only those that are asked for. A QuantizedWeight is frozen; a dense W that requires
    grad gets dW = dYᵀ X. Saved: x, A, B, T and the weight by reference, never a dequantized W. First
    derivatives in reverse mode only: double backward and forward mode raise RuntimeError.

    dropout acts on the adapter's input alone, always (training or not is the caller's business). Its seed is
    drawn from torch's generator of x's device, so manual_seed repeats it and checkpointing replays it;
    backward rebuilds the mask from the seed. Under torch.autocast x and a dense W are cast as F.linear casts
    them; the adapters are brought to that dtype inside the product and keep their own dtype for their
    gradients.

    Raises TypeError or ValueError naming the argument; RuntimeError when a forced backend cannot run the
    call. Method: LoRA, Hu et al., arXiv 2106.09685; QLoRA, Dettmers et al., arXiv 2305.14314.
    """
    dtype = _check(x, weight, lora_A, lora_B, scaling, bias, dropout)
    if dtype is not x.dtype:
        x = x.to(dtype)
    seed = None if dropout == 0.0 else draw_seed(x.device)
    if isinstance(weight, QuantizedWeight):
        quantized, dense = weight, None
        direct = is_direct(x, lora_A, lora_B, bias) and type(weight.packed) in PLAIN
    else:
        quantized, dense = None, weight if weight.dtype is dtype else weight.to(dtype)
        direct = is_direct(x, lora_A, lora_B, bias, dense)
    if direct and not needs_graph(x, lora_A, lora_B, bias, dense):
        operand: Any = dense if quantized is None else quantized.kernel_args
        return _forward(False, x, operand, lora_A, lora_B, bias, seed, scaling, dropout)[0]
    if direct:
        return _LoraLinear.apply(  # type: ignore[no-any-return,no-untyped-call]
            x, lora_A, lora_B, bias, dense, seed, quantized, scaling, dropout
        )
    tensors, spec = NO_WEIGHT if quantized is None else flatten_weight(quantized)
    y, _ = _LoraLinearTraced.apply(  # type: ignore[no-untyped-call]
        x, lora_A, lora_B, bias, dense, seed, *tensors, spec, scaling, dropout
    )
    return y  # type: ignore[no-any-return]


def _calls(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Call, ...]:
    dtype = _check(x, weight, lora_A, lora_B, scaling, bias, dropout)
    primitives = ["matmul"] if isinstance(weight, QuantizedWeight) else ["matmul_dense", "matmul"]
    if dropout:
        primitives.append("dropout")
    return tuple(Call(primitive, x.device, dtype) for primitive in primitives)


dispatch.CALLS["lora_linear"] = _calls


def _check_delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    if not isinstance(lora_A, Tensor) or lora_A.dim() != 2:
        refuse("lora_A", lora_A, "shape [R, K]", None, None)
    if not isinstance(lora_B, Tensor) or lora_B.dim() != 2:
        refuse("lora_B", lora_B, "shape [N, R]", None, None)
    check_adapter(lora_A, lora_B, lora_A.shape[1], lora_B.shape[0], lora_A.device)
    check_scaling(scaling)


def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """ΔW = s · B A: what the adapter adds to W.

    lora_A [R, K], lora_B [N, R], fp32, bf16 or fp16. Returns [N, K] in the two dtypes' common one, summed in
    fp32 and rounded once; differentiable to any order. Raises TypeError or ValueError naming the argument.
    """
    _check_delta(lora_A, lora_B, scaling)
    return reference.lora_delta(lora_A, lora_B, scaling)


def _delta_calls(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> tuple[Call, ...]:
    _check_delta(lora_A, lora_B, scaling)
    return ()


dispatch.CALLS["lora_delta"] = _delta_calls
