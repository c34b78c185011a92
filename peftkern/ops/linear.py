"""The frozen linear layer: linear_4bit; and with its low-rank adapter, for lora.py, what the two share.

An eager call on plain tensors goes straight to the backend ("direct"). A call that something watches or
rewrites (torch.compile, export, functorch, a dispatch mode, a tensor subclass, the meta device) goes through
torch.library ops ("traced"), which have fake kernels, and a batching rule in torch's per-sample fallback.
"""

from __future__ import annotations

import numbers
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from peftkern import dispatch
from peftkern.backends import Call, Weight4
from peftkern.dispatch import find
from peftkern.formats import QuantizedWeight
from peftkern.reference import adapter_scale

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
PLAIN = frozenset((Tensor, torch.nn.Parameter))
_REAL: tuple[type, ...] = (float, int, numbers.Real)
_INTEGER: tuple[type, ...] = (int, torch.SymInt)
_FLOAT32_MAX = float(torch.finfo(torch.float32).max)
_MOST = 1 << 48  # features, ranks: the compiled modules' own limit, far past any memory
_STRIDED = torch.strided
_unsafe_view: Any = torch.ops.aten._unsafe_view.default
_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")

# packed, absmax, absmax2, code, offset: as a library op and save_for_backward take a 4-bit weight
WeightTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
# quant_type, blocksize, blocksize2 (0: not nested), N, K
WeightSpec = tuple[str, int, int, int, int]
# both, where there is no 4-bit weight
NO_WEIGHT: tuple[tuple[None, ...], None] = ((None,) * 5, None)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """A strided fp32, bf16 or fp16 tensor of exactly this shape, on this device."""
    if (
        (type(tensor) in PLAIN or isinstance(tensor, Tensor))
        and tensor.shape == shape
        and tensor.dtype in DTYPES
        and tensor.device == device
        and tensor.layout is _STRIDED
    ):
        return
    refuse(name, tensor, f"shape {list(shape)}", None, device)


def check_x(x: Tensor, columns: int, device: torch.device) -> None:
    if (
        (type(x) in PLAIN or isinstance(x, Tensor))
        and x.ndim > 0
        and x.shape[-1] == columns
        and x.dtype in DTYPES
        and x.device == device
        and x.layout is _STRIDED
    ):
        return
    refuse("x", x, f"shape [..., {columns}]", None, device)


def check_base(x: Tensor, weight: QuantizedWeight | Tensor) -> tuple[int, int, torch.device, torch.dtype]:
    """N, K, the device and the dtype to compute in, of a frozen W [N, K], dense or 4-bit, and an x for it."""
    if isinstance(weight, QuantizedWeight):
        rows, columns = weight.shape
        device = weight.packed.device
        check_x(x, columns, device)
        return rows, columns, device, autocast_dtype(x)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor or a QuantizedWeight, got {type(weight).__name__}")
    if weight.dim() != 2:
        refuse("weight", weight, "a QuantizedWeight or shape [N, K]", None, None)
    rows, columns = weight.shape
    device = weight.device
    check_tensor("weight", weight, (rows, columns), device)
    check_x(x, columns, device)
    dtype = autocast_dtype(x)
    if weight.dtype is not dtype and not is_autocast(x):
        refuse("weight", weight, "", x.dtype, device)
    return rows, columns, device, dtype


def check_size(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, _INTEGER):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if value > _MOST:
        raise ValueError(f"{name}: expected at most 2^48, got {value}")


def check_scaling(scaling: float) -> None:
    if not isinstance(scaling, _REAL):
        raise TypeError(f"scaling: expected a number, got {type(scaling).__name__}")
    if not -_FLOAT32_MAX <= scaling <= _FLOAT32_MAX:
        raise ValueError(f"scaling: expected a finite number in float32's range, got {scaling}")


def check_dropout(dropout: float, scaling: float = 1.0) -> None:
    if not isinstance(dropout, _REAL):
        raise TypeError(f"dropout: expected a number, got {type(dropout).__name__}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")
    if abs(adapter_scale(scaling, dropout)) > _FLOAT32_MAX:
        raise ValueError(
            f"scaling: expected scaling / (1 - dropout) in float32's range, got {scaling} and {dropout}"
        )


def refuse(
    name: str, value: Any, shape: str, dtype: torch.dtype | None, device: torch.device | None
) -> NoReturn:
    """Raise for an argument that failed its check, naming it, what was expected and what came."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout is not _STRIDED:
        raise TypeError(f"{name}: expected a strided tensor, got layout {value.layout}")
    if value.dtype not in DTYPES or (dtype is not None and value.dtype != dtype):
        wanted = "float32, bfloat16 or float16" if dtype is None else f"{_short(dtype)} as x's"
        raise TypeError(f"{name}: expected dtype {wanted}, got {_short(value.dtype)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device} as the weight's, got {value.device}")
    raise ValueError(f"{name}: expected {shape}, got shape {list(value.shape)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_direct(first: Tensor, *others: Tensor | None) -> bool:
    """Plain tensors that nothing watches: their memory may be handed to a kernel as it is."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)  # autograd.grad(is_grads_batched=True)
        or torch._C._is_tracing()  # torch.jit.trace
    ):
        return False
    # a negative-bit view (z.conj().imag) shares its memory with its negation
    if type(first) not in PLAIN or first.is_neg() or first.is_meta:
        return False
    for tensor in others:
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_neg()):
            return False
    return True


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that F.linear would compute in: autocast's where that is on, else the tensor's."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def is_autocast(x: Tensor) -> bool:
    kind = "cpu" if x.is_cpu else x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def as_rows(x: Tensor, columns: int) -> Tensor:
    """[..., K] → [M, K], a view wherever the strides allow one."""
    if x.ndim == 2:
        return x
    # the number of rows is said, not inferred: x may be empty
    return x.reshape(x.shape[:-1].numel(), columns)


def like_rows(y: Tensor, x: Tensor) -> Tensor:
    """[M, N] → [..., N] in x's batch shape, of a fresh y: not a view to autograd, which lets no one change a
    view that a Function returns in place, as models do to a linear layer's output."""
    if x.ndim == 2:
        return y
    return _unsafe_view(y, (*x.shape[:-1], y.shape[1]))  # type: ignore[no-any-return]


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd is to follow an op of these."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110, any() costs several times as much
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def flatten_weight(weight: QuantizedWeight) -> tuple[WeightTensors, WeightSpec]:
    rows, columns = weight.shape
    nested = weight.nested
    if nested is None:
        spec = (weight.quant_type, weight.blocksize, 0, rows, columns)
        return (weight.packed, weight.absmax, None, None, None), spec
    spec = (weight.quant_type, weight.blocksize, nested.blocksize, rows, columns)
    return (weight.packed, weight.absmax, nested.absmax, nested.code, nested.offset), spec


def weight4(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code: Tensor | None,
    offset: Tensor | None,
    spec: WeightSpec,
) -> Weight4:
    """What a backend takes, from what flatten_weight gave."""
    quant_type, blocksize, blocksize2, rows, columns = spec
    if absmax2 is None or code is None or offset is None:
        return packed, absmax, None, quant_type, blocksize, rows, columns
    return packed, absmax, (absmax2, code, offset, blocksize2), quant_type, blocksize, rows, columns


def _product(
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    weight: Weight4 | Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Y = X Wᵀ + T Bᵀ + b [M, N]; T = s / (1 - p) · dropout(X) Aᵀ [M, R], None where there is no adapter."""
    y, T = _outputs(x, A, weight)
    dropout = None if seed is None else (p, seed)
    find("linear", x.device, x.dtype)(y, T, x, weight, A, B, adapter_scale(scaling, p), dropout, bias)
    return y, T


def _outputs(x: Tensor, A: Tensor | None, weight: Weight4 | Tensor) -> tuple[Tensor, Tensor | None]:
    rows = x.shape[0]
    y = x.new_empty(rows, weight[5] if isinstance(weight, tuple) else weight.shape[0])
    return y, None if A is None else x.new_empty(rows, A.shape[0])


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
    found = _gradients_of(dY, x, B, T, dtypes, weight)
    dropout = None if seed is None else (p, seed)
    row = find("linear_grad", dY.device, dY.dtype)
    row(*found, dY, x, weight, A, B, T, adapter_scale(scaling, p), dropout)
    return found


def _gradients_of(
    dY: Tensor,
    x: Tensor | None,
    B: Tensor | None,
    T: Tensor | None,
    dtypes: Dtypes,
    weight: Weight4 | Tensor | None,
) -> Gradients:
    """Their memory."""
    rows, outputs = dY.shape
    A_dtype, B_dtype, bias_dtype = dtypes
    dx = dA = dB = dbias = None
    if weight is not None:
        dx = dY.new_empty(rows, weight[6] if isinstance(weight, tuple) else weight.shape[1])
    if x is not None and B is not None:
        dA = dY.new_empty(B.shape[1], x.shape[1], dtype=A_dtype)
    if T is not None:
        dB = dY.new_empty(outputs, T.shape[1], dtype=B_dtype)
    if bias_dtype is not None:
        dbias = dY.new_empty(outputs, dtype=bias_dtype)
    return dx, dA, dB, dbias


def bias_grad(traced: bool, dY: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Σ dY [N] in dtype, summed in fp32; None for None."""
    if dtype is None:
        return None
    nothing = None, None, None, None
    if traced:
        *_, dbias = _OPS.linear_backward(dY, *nothing, None, None, dtype, *flat(None), 1.0, 0.0, None)
    else:
        *_, dbias = _gradients(dY, *nothing, (None, None, dtype), None, 1.0, 0.0, None)
    return dbias  # type: ignore[no-any-return]


# ---- library ops

LIBRARY = Library("peftkern", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPS: Any = torch.ops.peftkern


def flat(weight: Weight4 | Tensor | None) -> tuple[Any, ...]:
    """dense, packed, absmax, absmax2, code, offset, quant_type, blocksize, blocksize2, rows, columns."""
    if not isinstance(weight, tuple):
        return weight, None, None, None, None, None, "", 0, 0, 0, 0
    packed, absmax, nested, quant_type, blocksize, rows, columns = weight
    absmax2, code, offset, blocksize2 = (None, None, None, 0) if nested is None else nested
    return None, packed, absmax, absmax2, code, offset, quant_type, blocksize, blocksize2, rows, columns


def unflat(dense: Tensor | None, packed: Tensor | None, *rest: Any) -> Weight4 | Tensor | None:
    if packed is None:
        return dense
    absmax, absmax2, code, offset, *spec = rest
    return weight4(packed, absmax, absmax2, code, offset, tuple(spec))


FLAT = (
    "Tensor? dense, Tensor? packed, Tensor? absmax, Tensor? absmax2, Tensor? code, Tensor? offset, "
    "str quant_type, int blocksize, int blocksize2, int rows, int columns"
)


def _linear_op(x: Tensor, A: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    B, bias, *weight, scaling, p, seed = args
    return _full(x, _product(x, A, B, bias, unflat(*weight), scaling, p, seed))  # type: ignore[arg-type]


def _linear_op_fake(x: Tensor, A: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    _, _, *weight, _, _, _ = args
    return _full(x, _outputs(x, A, unflat(*weight)))  # type: ignore[arg-type]


def _linear_backward_op(dY: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, A, B, T, A_dtype, B_dtype, bias_dtype, *weight, scaling, p, seed = args
    dtypes = A_dtype, B_dtype, bias_dtype
    return _full(dY, _gradients(dY, x, A, B, T, dtypes, unflat(*weight), scaling, p, seed))


def _linear_backward_op_fake(dY: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, _, B, T, A_dtype, B_dtype, bias_dtype, *weight, _, _, _ = args
    return _full(dY, _gradients_of(dY, x, B, T, (A_dtype, B_dtype, bias_dtype), unflat(*weight)))


def _full(like: Tensor, results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """A library op returns tensors only: what there is not is empty."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _tangent(tensor: Tensor) -> bool:
    level = forward_ad._current_level
    if level < 0:
        return False
    return forward_ad.unpack_dual(tensor, level=level).tangent is not None  # type: ignore[no-untyped-call]


def _undifferentiable(name: str) -> Any:
    """The library op as autograd sees it: only the Functions have a derivative, here it is an error."""
    op = getattr(_OPS, name).default
    missing = "double backward and forward mode are not implemented"
    message = f"peftkern::{name} has no derivative of its own: {missing}"

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if any(_tangent(tensor) for tensor in tensors):
            raise RuntimeError(message)
        with torch._C._AutoDispatchBelowAutograd():
            result = op.redispatch(keys & torch._C._after_autograd_keyset, *args)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return result
        results = list(result) if isinstance(result, tuple) else [result]
        # as once_differentiable does: the graph goes on, into a node that raises
        error = torch._C._functions.DelayedError(message.encode(), len(results) + len(tensors))
        raising = error(*results, *tensors)
        return tuple(raising[: len(results)]) if isinstance(result, tuple) else raising[0]

    return kernel


def register(schema: str, implementation: Any, fake: Any) -> None:
    """A library op: out of place, flat tensors and numbers in, contiguous results out, no derivative."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, _undifferentiable(name), "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"peftkern::{name}", fake, lib=LIBRARY)


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


def no_double_backward(ctx: Any, grad: Tensor, op: str) -> None:
    """create_graph asks for a graph of the gradients: raise if anything they are made of requires grad."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (grad, *ctx.saved_tensors)
    ):
        raise RuntimeError(f"{op}: double backward is not implemented")


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
) -> tuple[Tensor, Tensor | None]:
    """Y [..., N] and T [M, R]."""
    rows = x if x.ndim == 2 else as_rows(x, x.shape[-1])
    if traced:
        y, T = _OPS.linear(rows, A, B, bias, *flat(weight), scaling, p, seed)
        T = None if A is None else T
    else:
        y, T = _product(rows, A, B, bias, weight, scaling, p, seed)
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
        found = _OPS.linear_backward(dY, *given, *dtypes, *flat(weight), scaling, p, seed)
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
        y, T = _forward(False, x, A, B, bias, weight, scaling, p, seed)
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
    return _forward(False, x, A, B, bias, operand, scaling, p, seed)[0]


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


def linear_4bit(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Y = X Wᵀ + b with W in 4 bits, decoded from its packed bytes inside the product.

    x [..., K] fp32, bf16 or fp16, any strides, any batch shape, empty too; weight QuantizedWeight [N, K];
    bias [N] of any of these dtypes. Returns [..., N] of x's dtype, contiguous.

    fp32 accumulation and one rounding at the end. The weight's values are the fp32 code · absmax, rounded to
    what the backend multiplies: for bf16 x to bf16 (as dequantize_4bit gives them) or not at all; for fp16 x
    not at all on cpu and reference, and to fp16, which tensor cores take, on triton; for fp32 x not at all
    (on a GPU x and W to TF32 where torch.backends.cuda.matmul.allow_tf32 asks for it). With u the unit
    roundoff of that type (bf16 2^-8, fp16 2^-11, unrounded 0) and v that of x's dtype, to first order

        |y - exact| ≤ (u + (K + 6) 2^-24) (Σ|x||W| + |b|) + v |y|

    and where triton hands a dequantized W and many rows to cuBLAS (explain says from how many on) b is
    rounded to x's dtype before: v |b| more.

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


def _calls(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> tuple[Call, ...]:
    dtype = _check(x, weight, bias)
    return (Call("linear", x.device, dtype),)


dispatch.CALLS["linear_4bit"] = _calls
