"""The frozen linear layer: linear_4bit; and with its low-rank adapter, for lora.py, what the two share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import dispatch
from peftkern.backends import Call, Weight4
from peftkern.dispatch import find
from peftkern.formats import QuantizedWeight
from peftkern.ops.checks import PLAIN, autocast_dtype, check_tensor, check_x
from peftkern.ops.library import (
    FLAT,
    NO_WEIGHT,
    OPS,
    WeightSpec,
    as_rows,
    call,
    flat,
    flatten_weight,
    fresh,
    full,
    is_direct,
    like_rows,
    needs_graph,
    no_double_backward,
    register,
    unflat,
    weight4,
)
from peftkern.reference import adapter_scale


def _product(
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    weight: Weight4 | Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Y = X Wᵀ + T Bᵀ + b [M, N]; T = s / (1 - p) · dropout(X) Aᵀ [M, R], to keep, if there is an adapter."""
    y, T = _outputs(x, A, weight, keep)
    dropout = None if seed is None else (p, seed)
    find("linear", x.device, x.dtype)(y, T, x, weight, A, B, adapter_scale(scaling, p), dropout, bias)
    return y, T


def _outputs(
    x: Tensor, A: Tensor | None, weight: Weight4 | Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    rows = x.shape[0]
    y = fresh(x, rows, weight[5] if isinstance(weight, tuple) else weight.shape[0])
    return y, fresh(x, rows, A.shape[0]) if keep and A is not None else None


# dx, dA, dB, dbias: those that are asked for
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# of dA, dB and dbias
Dtypes = tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]


def _gradients(
    dY: Tensor,
    x: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    T: Tensor | None,
    dtypes: Dtypes,
    weight: Weight4 | Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> Gradients:
    """With G = s / (1 - p) · dY B: dX = dY W + dropout(G A) given the weight, dA = Gᵀ dropout(X) given x,
    dB = dYᵀ T given T, and dbias = Σ dY if it has a dtype."""
    found = _empty_gradients(dY, x, B, T, dtypes, weight)
    dropout = None if seed is None else (p, seed)
    row = find("linear_grad", dY.device, dY.dtype)
    row(*found, dY, x, weight, A, B, T, adapter_scale(scaling, p), dropout)
    return found


def _empty_gradients(
    dY: Tensor,
    x: Tensor | None,
    B: Tensor | None,
    T: Tensor | None,
    dtypes: Dtypes,
    weight: Weight4 | Tensor | None,
) -> Gradients:
    """Memory for those that are asked for."""
    rows, outputs = dY.shape
    A_dtype, B_dtype, bias_dtype = dtypes
    dx = dA = dB = dbias = None
    if weight is not None:
        dx = fresh(dY, rows, weight[6] if isinstance(weight, tuple) else weight.shape[1])
    if x is not None and B is not None:
        dA = fresh(dY, B.shape[1], x.shape[1], A_dtype)
    if T is not None:
        dB = fresh(dY, outputs, T.shape[1], B_dtype)
    if bias_dtype is not None:
        dbias = dY.new_empty(outputs, dtype=bias_dtype)
    return dx, dA, dB, dbias


def bias_grad(traced: bool, dY: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Σ dY [N] in dtype, summed in fp32; None for None."""
    if dtype is None:
        return None
    nothing = None, None, None, None
    if traced:
        *_, dbias = OPS.linear_backward(dY, *nothing, None, None, dtype, *flat(None), 1.0, 0.0, None)
    else:
        *_, dbias = _gradients(dY, *nothing, (None, None, dtype), None, 1.0, 0.0, None)
    return dbias  # type: ignore[no-any-return]


def _linear_op(x: Tensor, A: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    B, bias, *weight, scaling, p, seed = args
    return full(x, _product(x, A, B, bias, unflat(*weight), scaling, p, seed, True))  # type: ignore[arg-type]


def _linear_op_fake(x: Tensor, A: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    _, _, *weight, _, _, _ = args
    return full(x, _outputs(x, A, unflat(*weight), True))  # type: ignore[arg-type]


def _linear_backward_op(dY: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, A, B, T, A_dtype, B_dtype, bias_dtype, *weight, scaling, p, seed = args
    dtypes = A_dtype, B_dtype, bias_dtype
    return full(dY, _gradients(dY, x, A, B, T, dtypes, unflat(*weight), scaling, p, seed))


def _linear_backward_op_fake(dY: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, _, B, T, A_dtype, B_dtype, bias_dtype, *weight, _, _, _ = args
    return full(dY, _empty_gradients(dY, x, B, T, (A_dtype, B_dtype, bias_dtype), unflat(*weight)))


register(
    f"linear(Tensor x, Tensor? A, Tensor? B, Tensor? bias, {FLAT}, float scaling, float p, Tensor? seed) "
    "-> (Tensor, Tensor)",
    _linear_op,
    _linear_op_fake,
)
register(
    "linear_backward(Tensor dY, Tensor? x, Tensor? A, Tensor? B, Tensor? T, ScalarType? A_dtype, "
    f"ScalarType? B_dtype, ScalarType? bias_dtype, {FLAT}, float scaling, float p, Tensor? seed) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _linear_backward_op,
    _linear_backward_op_fake,
)


# ---- autograd


def _forward(
    traced: bool,
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    weight: Weight4 | Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Y [..., N] and T [M, R], if it is to be kept."""
    rows = x if x.ndim == 2 else as_rows(x, x.shape[-1])
    if traced:
        y, T = OPS.linear(rows, A, B, bias, *flat(weight), scaling, p, seed)
        T = None if A is None else T
    else:
        y, T = _product(rows, A, B, bias, weight, scaling, p, seed, keep)
    return like_rows(y, x), T


def _save(
    ctx: Any,
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    dense: Tensor | None,
    seed: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    spec: WeightSpec | None,
    scaling: float,
    p: float,
    T: Tensor | None,
) -> None:
    """Only what the gradients that are asked for will read."""
    needs_x, needs_A, needs_B, needs_bias, needs_W = ctx.needs_input_grad[:5]
    dtypes = (
        A.dtype if A is not None and needs_A else None,
        B.dtype if B is not None and needs_B else None,
        bias.dtype if bias is not None and needs_bias else None,
    )
    ctx.settings = spec, scaling, p, dtypes
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
    spec, scaling, p, dtypes = ctx.settings
    dY = as_rows(grad, grad.shape[-1])
    weight = dense if packed is None else weight4(packed, absmax, absmax2, code, offset, spec)
    rows = None if x is None else as_rows(x, x.shape[-1])
    dW = torch.mm(dY.t(), rows) if ctx.needs_input_grad[4] and rows is not None else None
    given = None if dtypes[0] is None else rows, A, B, T
    if traced:
        found = OPS.linear_backward(dY, *given, *dtypes, *flat(weight), scaling, p, seed)
        wanted = weight, *dtypes
        dx, dA, dB, dbias = (None if w is None else g for w, g in zip(wanted, found, strict=True))
    else:
        dx, dA, dB, dbias = _gradients(dY, *given, dtypes, weight, scaling, p, seed)
    if dx is not None and grad.ndim != 2:
        dx = dx.view(*grad.shape[:-1], dx.shape[-1])
    return dx, dA, dB, dbias, dW


class _Linear(torch.autograd.Function):
    """Direct."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        bias: Tensor | None,
        dense: Tensor | None,
        seed: Tensor | None,
        quantized: QuantizedWeight | None,
        scaling: float,
        p: float,
    ) -> Tensor:
        weight: Any = dense if quantized is None else quantized.kernel_args
        y, T = _forward(False, x, A, B, bias, weight, scaling, p, seed, ctx.needs_input_grad[2])
        ctx.op = "linear_4bit" if A is None else "lora_linear"
        tensors, spec = NO_WEIGHT if quantized is None else flatten_weight(quantized)
        _save(ctx, x, A, B, bias, dense, seed, tensors, spec, scaling, p, T)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        no_double_backward(ctx, grad, ctx.op)
        return *_backward(ctx, not is_direct(grad), grad), None, None, None, None


# Function.apply itself looks for functorch's wrappers, 2 µs, which a direct call has none of
_apply: Any = super(torch.autograd.Function, _Linear).apply


class _LinearTraced(torch.autograd.Function):
    """T is a second output, if there is one: functorch saves nothing but inputs and outputs. It stays
    differentiable, so that dB, which is made of it, raises when it is differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        bias: Tensor | None,
        dense: Tensor | None,
        seed: Tensor | None,
        packed: Tensor | None,
        absmax: Tensor | None,
        absmax2: Tensor | None,
        code: Tensor | None,
        offset: Tensor | None,
        spec: WeightSpec | None,
        scaling: float,
        p: float,
    ) -> tuple[Tensor, ...]:
        weight: Any = dense
        if packed is not None and absmax is not None and spec is not None:
            weight = weight4(packed, absmax, absmax2, code, offset, spec)
        y, T = _forward(True, x, A, B, bias, weight, scaling, p, seed)
        return (y,) if T is None else (y, T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, A, B, bias, dense, seed, *tensors, spec, scaling, p = inputs
        T = output[1] if len(output) == 2 else None
        _save(ctx, x, A, B, bias, dense, seed, tuple(tensors), spec, scaling, p, T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return *_backward(ctx, True, grad), None, None, None, None, None, None, None, None, None


def linear(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    scaling: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The frozen layer, with its adapter if there is one, of arguments that were checked; x has the dtype to
    compute in."""
    if isinstance(weight, QuantizedWeight):
        quantized, dense = weight, None
        direct = is_direct(x, A, B, bias) and type(weight.packed) in PLAIN
    else:
        quantized, dense = None, weight if weight.dtype is x.dtype else weight.to(x.dtype)
        direct = is_direct(x, A, B, bias, dense)
    if not direct:
        tensors, spec = NO_WEIGHT if quantized is None else flatten_weight(quantized)
        y, *_ = _LinearTraced.apply(  # type: ignore[no-untyped-call]
            x, A, B, bias, dense, seed, *tensors, spec, scaling, p
        )
        return y  # type: ignore[no-any-return]
    if needs_graph(x, A, B, bias, dense):
        return _apply(x, A, B, bias, dense, seed, quantized, scaling, p)  # type: ignore[no-any-return]
    operand: Any = dense if quantized is None else quantized.kernel_args
    return _forward(False, x, A, B, bias, operand, scaling, p, seed, False)[0]


# ---- the public op


def _check(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> torch.dtype:
    """Raises for anything that the op does not take; returns the dtype to compute in."""
    if type(weight) is not QuantizedWeight and not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight: expected a QuantizedWeight, got {type(weight).__name__}")
    rows, columns = weight.shape
    device = weight.packed.device
    check_x(x, columns, device)
    if bias is not None:
        check_tensor("bias", bias, (rows,), device)
    return autocast_dtype(x)


def _calls(x: Tensor, weight: QuantizedWeight, *rest: Any) -> tuple[Call, ...]:
    return (call("linear", x, _check(x, weight, *rest), weight),)


@dispatch.explained_by(_calls)
def linear_4bit(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Y = X Wᵀ + b with W in 4 bits, decoded from its packed bytes inside the product.

    x [..., K] fp32, bf16 or fp16, any strides, any batch shape, empty too; weight QuantizedWeight [N, K];
    bias [N] of any of these dtypes. Returns [..., N] of x's dtype, contiguous.

    fp32 accumulation and one rounding at the end. The weight's values are the fp32 code · absmax, rounded to
    what the backend multiplies: for bf16 x to bf16 (as dequantize_4bit gives them) or not at all; for fp16 x
    not at all on cpu and reference, and to fp16, which tensor cores take, on triton; for fp32 x not at all
    (on a GPU x and W to TF32 where torch.backends.cuda.matmul.fp32_precision asks for it). With u the unit
    roundoff of that type (bf16 2^-8, fp16 2^-11, unrounded 0) and v that of x's dtype, to first order

        |y - exact| ≤ (u + (K + 6) 2^-24) (Σ|x||W| + |b|) + v |y|

    and where triton hands a dequantized W and many rows to cuBLAS (explain says from how many on) b is
    rounded to x's dtype before: v |b| more. On cpu absmax multiplies the sums of up to 24 rows: |x| ≤ 4e37.

    Backward: dX = dY W from the same packed bytes, within the same bound with N for K; dbias = Σ dY in fp32;
    W is frozen. Saved: the packed weight, by reference; not x. First derivatives in reverse mode only: double
    backward and forward mode raise RuntimeError. Under torch.autocast x is cast as F.linear casts it.

    Raises TypeError or ValueError naming the argument; RuntimeError when a forced backend cannot run the
    call. Method: QLoRA, Dettmers et al., arXiv 2305.14314.
    """
    dtype = _check(x, weight, bias)
    if dtype is not x.dtype:
        x = x.to(dtype)
    return linear(x, weight, None, None, bias)
