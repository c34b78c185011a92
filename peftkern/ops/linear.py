"""linear_4bit, and what every linear op is made of: checks, the base and thin products, their library ops.

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
from peftkern.backends import Call, Primitive, Weight4
from peftkern.dispatch import find
from peftkern.formats import QuantizedWeight

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


def check_dropout(dropout: float) -> None:
    if not isinstance(dropout, _REAL):
        raise TypeError(f"dropout: expected a number, got {type(dropout).__name__}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")


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


def flatten4(weight: Weight4) -> tuple[WeightTensors, WeightSpec]:
    """What flatten_weight gave, from what a backend takes."""
    packed, absmax, nested, quant_type, blocksize, rows, columns = weight
    absmax2, code, offset, blocksize2 = (None, None, None, 0) if nested is None else nested
    return (packed, absmax, absmax2, code, offset), (quant_type, blocksize, blocksize2, rows, columns)


def matmul_row(traced: bool, x: Tensor) -> Primitive | None:
    """The backend's matmul for x, looked up once for a whole pass; None: go through the library ops."""
    return None if traced else find("matmul", x.device, x.dtype)


def base_matmul(
    row: Primitive | None,
    x: Tensor,
    weight: Weight4 | Tensor,
    transposed: bool,
    t: Tensor | None = None,
    u: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x Wᵀ, or x W when transposed, + t uᵀ + bias: one pass over W, dense or 4-bit. [M, outputs]"""
    if row is None:
        if isinstance(weight, tuple):
            tensors, spec = flatten4(weight)
            return _OPS.matmul_4bit(x, *tensors, *spec, transposed, t, u, bias)  # type: ignore[no-any-return]
        return _OPS.matmul_dense(x, weight, transposed, t, u, bias)  # type: ignore[no-any-return]
    if isinstance(weight, tuple):
        out = x.new_empty(x.shape[0], weight[6] if transposed else weight[5])
        row(out, x, weight, transposed, 1.0, t, u, bias)
    else:
        out = x.new_empty(x.shape[0], weight.shape[1] if transposed else weight.shape[0])
        find("matmul_dense", x.device, x.dtype)(out, x, weight, transposed, t, u, bias)
    return out


def thin_matmul(
    row: Primitive | None,
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """alpha x Wᵀ, or alpha x W when transposed, one side a rank: fp32 sums, one rounding to dtype (x's)."""
    if row is None:
        return _OPS.matmul_thin(  # type: ignore[no-any-return]
            x, weight, transposed, alpha, x.dtype if dtype is None else dtype
        )
    result = x.new_empty(x.shape[0], weight.shape[1] if transposed else weight.shape[0], dtype=dtype)
    row(result, x, weight, transposed, alpha, None, None, None)
    return result


def output_grads(
    traced: bool,
    dY: Tensor,
    B: Tensor | None,
    T: Tensor | None,
    alpha: float,
    B_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """G = alpha dY B [M, R] where there is a B, dB = dYᵀ T [N, R] of B_dtype where there is a T, and
    dbias = Σ dY [N] where it has a dtype; the others None."""
    if B is None and T is None and bias_dtype is None:
        return None, None, None
    if traced:
        G, dB, dbias = _OPS.output_grads(dY, B, T, alpha, B_dtype, bias_dtype)
        return (
            None if B is None else G,
            None if T is None else dB,
            None if bias_dtype is None else dbias,
        )
    rows, columns = dY.shape
    G = None if B is None else dY.new_empty(rows, B.shape[1])
    dB = None if T is None else dY.new_empty(columns, T.shape[1], dtype=B_dtype)
    dbias = None if bias_dtype is None else dY.new_empty(columns, dtype=bias_dtype)
    find("output_grads", dY.device, dY.dtype)(G, dB, dbias, dY, B, T, alpha)
    return G, dB, dbias


def dropout(traced: bool, x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x where kept, else 0; unscaled, hence exact. Backward repeats the mask from (seed, element)."""
    if traced:
        return _OPS.dropout(x, p, seed)  # type: ignore[no-any-return]
    out = x.new_empty(x.shape)
    find("dropout", x.device, x.dtype)(out, x, p, seed)
    return out


LIBRARY = Library("peftkern", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPS: Any = torch.ops.peftkern


def _matmul_4bit(
    x: Tensor,
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
    transposed: bool,
    t: Tensor | None,
    u: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    spec = (quant_type, blocksize, blocksize2, rows, columns)
    weight = weight4(packed, absmax, absmax2, code, offset, spec)
    return base_matmul(matmul_row(False, x), x, weight, transposed, t, u, bias)


def _matmul_4bit_fake(x: Tensor, *args: Any) -> Tensor:
    rows, columns, transposed = args[8:11]
    return x.new_empty((x.shape[0], columns if transposed else rows))


def _matmul_dense(
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    t: Tensor | None,
    u: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return base_matmul(matmul_row(False, x), x, weight, transposed, t, u, bias)


def _matmul_dense_fake(x: Tensor, weight: Tensor, transposed: bool, *args: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1] if transposed else weight.shape[0]))


def _matmul_thin(x: Tensor, weight: Tensor, transposed: bool, alpha: float, dtype: torch.dtype) -> Tensor:
    return thin_matmul(matmul_row(False, x), x, weight, transposed, alpha, dtype)


def _matmul_thin_fake(
    x: Tensor, weight: Tensor, transposed: bool, alpha: float, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1] if transposed else weight.shape[0]), dtype=dtype)


def _output_grads(dY: Tensor, *args: Any) -> tuple[Tensor, ...]:
    # a library op returns tensors only: what is not asked for is empty
    return tuple(dY.new_empty(0) if out is None else out for out in output_grads(False, dY, *args))


def _output_grads_fake(
    dY: Tensor,
    B: Tensor | None,
    T: Tensor | None,
    alpha: float,
    B_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    rows, columns = dY.shape
    return (
        dY.new_empty(0 if B is None else (rows, B.shape[1])),
        dY.new_empty(0) if T is None else dY.new_empty((columns, T.shape[1]), dtype=B_dtype),
        dY.new_empty(0) if bias_dtype is None else dY.new_empty(columns, dtype=bias_dtype),
    )


def _dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return dropout(False, x, p, seed)


def _dropout_fake(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


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
    "matmul_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? code, Tensor? offset, "
    "str quant_type, int blocksize, int blocksize2, int rows, int columns, bool transposed, "
    "Tensor? t, Tensor? u, Tensor? bias) -> Tensor",
    _matmul_4bit,
    _matmul_4bit_fake,
)
register(
    "matmul_dense(Tensor x, Tensor weight, bool transposed, Tensor? t, Tensor? u, Tensor? bias) -> Tensor",
    _matmul_dense,
    _matmul_dense_fake,
)
register(
    "matmul_thin(Tensor x, Tensor weight, bool transposed, float alpha, ScalarType dtype) -> Tensor",
    _matmul_thin,
    _matmul_thin_fake,
)
register(
    "output_grads(Tensor dY, Tensor? B, Tensor? T, float alpha, ScalarType? B_dtype, ScalarType? bias_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _output_grads,
    _output_grads_fake,
)
register("dropout(Tensor x, float p, Tensor seed) -> Tensor", _dropout, _dropout_fake)


def no_double_backward(ctx: Any, grad: Tensor, op: str) -> None:
    """create_graph asks for a graph of the gradients: raise if anything they are made of requires grad."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (grad, *ctx.saved_tensors)
    ):
        raise RuntimeError(f"{op}: double backward is not implemented")


def _forward(traced: bool, x: Tensor, weight: Weight4, bias: Tensor | None) -> Tensor:
    y = base_matmul(matmul_row(traced, x), as_rows(x, weight[6]), weight, False, None, None, bias)
    return like_rows(y, x)


def _backward(ctx: Any, traced: bool, grad: Tensor) -> tuple[Any, ...]:
    packed, absmax, absmax2, code, offset = ctx.saved_tensors
    weight = weight4(packed, absmax, absmax2, code, offset, ctx.spec)
    dY = as_rows(grad, weight[5])
    needs_x, needs_bias = ctx.needs_input_grad[:2]
    dx = base_matmul(matmul_row(traced, dY), dY, weight, True) if needs_x else None
    if dx is not None and grad.ndim != 2:
        dx = dx.view(*grad.shape[:-1], weight[6])
    _, _, dbias = output_grads(traced, dY, None, None, 1.0, None, ctx.bias_dtype if needs_bias else None)
    return dx, dbias, None, None, None, None, None, None


class _Linear4bit(torch.autograd.Function):
    """Direct."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        absmax: Tensor,
        absmax2: Tensor | None,
        code: Tensor | None,
        offset: Tensor | None,
        spec: WeightSpec,
    ) -> Tensor:
        ctx.spec = spec
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(packed, absmax, absmax2, code, offset)
        return _forward(False, x, weight4(packed, absmax, absmax2, code, offset, spec), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        no_double_backward(ctx, grad, "linear_4bit")
        return _backward(ctx, not is_direct(grad), grad)


class _Linear4bitTraced(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        absmax: Tensor,
        absmax2: Tensor | None,
        code: Tensor | None,
        offset: Tensor | None,
        spec: WeightSpec,
    ) -> Tensor:
        return _forward(True, x, weight4(packed, absmax, absmax2, code, offset, spec), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bias, *tensors, spec = inputs
        ctx.spec = spec
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _backward(ctx, True, grad)


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
    if not is_direct(x, bias) or type(weight.packed) not in PLAIN:
        tensors, spec = flatten_weight(weight)
        return _Linear4bitTraced.apply(x, bias, *tensors, spec)  # type: ignore[no-any-return,no-untyped-call]
    if needs_graph(x, bias):
        tensors, spec = flatten_weight(weight)
        return _Linear4bit.apply(x, bias, *tensors, spec)  # type: ignore[no-any-return,no-untyped-call]
    return _forward(False, x, weight.kernel_args, bias)


def _calls(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> tuple[Call, ...]:
    dtype = _check(x, weight, bias)
    return (Call("matmul", x.device, dtype),)


dispatch.CALLS["linear_4bit"] = _calls
