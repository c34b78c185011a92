"""linear_4bit, and what every linear op is made of: argument checks, the base and thin products, their library ops.

An eager call on plain tensors goes straight to the backend ("direct"). A call that something watches or rewrites
(torch.compile, export, functorch, a dispatch mode, a tensor subclass, the meta device) goes through torch.library ops
("traced"), which have fake kernels and a batching rule by torch's per-sample fallback.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from peftkern import dispatch
from peftkern.backends import Call, Weight4
from peftkern.dispatch import find
from peftkern.formats import QuantizedWeight

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_STRIDED = torch.strided

# ---- arguments: a fast accepting path, and a slow one that says what was wrong


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """A strided fp32, bf16 or fp16 tensor of exactly this shape, on this device."""
    if (
        (type(tensor) in _PLAIN or isinstance(tensor, Tensor))
        and tensor.shape == shape
        and tensor.dtype in DTYPES
        and tensor.device == device
        and tensor.layout is _STRIDED
    ):
        return
    refuse(name, tensor, f"shape {list(shape)}", None, device)


def check_x(x: Tensor, columns: int, device: torch.device) -> None:
    if (
        (type(x) in _PLAIN or isinstance(x, Tensor))
        and x.dim() > 0
        and x.shape[-1] == columns
        and x.dtype in DTYPES
        and x.device == device
        and x.layout is _STRIDED
    ):
        return
    refuse("x", x, f"shape [..., {columns}]", None, device)


def refuse(name: str, value: Any, shape: str, dtype: torch.dtype | None, device: torch.device | None) -> NoReturn:
    """Raise for an argument that failed its check, naming it, what was expected and what came."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout is not _STRIDED:
        raise TypeError(f"{name}: expected a strided tensor, got layout {value.layout}")
    if value.dtype not in DTYPES or (dtype is not None and value.dtype != dtype):
        wanted = "float32, bfloat16 or float16" if dtype is None else str(dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device} as the weight's, got {value.device}")
    raise ValueError(f"{name}: expected {shape}, got shape {list(value.shape)}")


# ---- which path


def is_direct(*tensors: Tensor | None) -> bool:
    """Plain tensors that nothing watches: their memory may be handed to a kernel as it is."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        # a negative-bit view (z.conj().imag) shares memory with its negation
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return False
    return True


# ---- the products

# W as a traced op can take it: the dense matrix or packed bytes, then absmax, absmax2, code, offset
WeightTensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# quant_type, blocksize, blocksize2, N, K; None for a dense W
WeightSpec = tuple[str, int, int, int, int] | None


def flatten_weight(weight: QuantizedWeight | Tensor) -> tuple[WeightTensors, WeightSpec]:
    if isinstance(weight, Tensor):
        return (weight, None, None, None, None), None
    rows, columns = weight.shape
    nested = weight.nested
    if nested is None:
        return (weight.packed, weight.absmax, None, None, None), (weight.quant_type, weight.blocksize, 0, rows, columns)
    return (
        (weight.packed, weight.absmax, nested.absmax, nested.code, nested.offset),
        (weight.quant_type, weight.blocksize, nested.blocksize, rows, columns),
    )


def _weight4(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code: Tensor | None,
    offset: Tensor | None,
    spec: tuple[str, int, int, int, int],
) -> Weight4:
    quant_type, blocksize, blocksize2, rows, columns = spec
    if absmax2 is None or code is None or offset is None:
        return packed, absmax, None, quant_type, blocksize, rows, columns
    return packed, absmax, (absmax2, code, offset, blocksize2), quant_type, blocksize, rows, columns


def base_matmul(
    traced: bool,
    x: Tensor,
    weight: WeightTensors,
    spec: WeightSpec,
    transposed: bool,
    t: Tensor | None = None,
    u: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + t uᵀ + bias, or x W + t uᵀ when transposed: one pass over the frozen W, dense or 4-bit. [M, outputs]"""
    w, absmax, absmax2, code, offset = weight
    if traced:
        if spec is None:
            return _OPS.matmul_dense(x, w, transposed, t, u, bias)
        return _OPS.matmul_4bit(x, w, absmax, absmax2, code, offset, *spec, transposed, t, u, bias)
    if spec is None:
        out = x.new_empty((x.shape[0], w.shape[1] if transposed else w.shape[0]))
        find("matmul_dense", x.device, x.dtype)(out, x, w, transposed, t, u, bias)
        return out
    assert absmax is not None
    out = x.new_empty((x.shape[0], spec[4] if transposed else spec[3]))
    weight4 = _weight4(w, absmax, absmax2, code, offset, spec)
    find("matmul", x.device, x.dtype)(out, x, weight4, transposed, 1.0, t, u, bias)
    return out


def thin_matmul(
    traced: bool,
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
    columns_first: bool = False,
) -> Tensor:
    """alpha x Wᵀ (or alpha x W when transposed) where one side of W is a rank. fp32 sums, one rounding to dtype.

    columns_first gives the transpose of the product, contiguous: [outputs, rows].
    """
    if dtype is None:
        dtype = x.dtype
    if traced:
        return _OPS.matmul_thin(x, weight, transposed, alpha, dtype, columns_first)
    rows, outputs = x.shape[0], weight.shape[1] if transposed else weight.shape[0]
    if columns_first:
        result = torch.empty((outputs, rows), dtype=dtype, device=x.device)
        out = result.t()
    else:
        result = out = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    find("matmul", x.device, x.dtype)(out, x, weight, transposed, alpha, None, None, None)
    return result


def dropout(traced: bool, x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x where kept, else 0; unscaled, hence exact. The mask is a function of (seed, element), so backward repeats it."""
    if traced:
        return _OPS.dropout(x, p, seed)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    find("dropout", x.device, x.dtype)(out, x, p, seed)
    return out


# ---- library ops: out of place, flat tensors and numbers, contiguous results

LIBRARY = Library("peftkern", "FRAGMENT")
_OPS: Any = torch.ops.peftkern
_TAGS = (torch.Tag.pt2_compliant_tag,)


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
    return base_matmul(False, x, (packed, absmax, absmax2, code, offset), spec, transposed, t, u, bias)


def _matmul_4bit_fake(x: Tensor, *args: Any) -> Tensor:
    rows, columns, transposed = args[8:11]
    return x.new_empty((x.shape[0], columns if transposed else rows))


def _matmul_dense(
    x: Tensor, weight: Tensor, transposed: bool, t: Tensor | None, u: Tensor | None, bias: Tensor | None
) -> Tensor:
    return base_matmul(False, x, (weight, None, None, None, None), None, transposed, t, u, bias)


def _matmul_dense_fake(x: Tensor, weight: Tensor, transposed: bool, *args: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1] if transposed else weight.shape[0]))


def _matmul_thin(
    x: Tensor, weight: Tensor, transposed: bool, alpha: float, dtype: torch.dtype, columns_first: bool
) -> Tensor:
    return thin_matmul(False, x, weight, transposed, alpha, dtype, columns_first)


def _matmul_thin_fake(
    x: Tensor, weight: Tensor, transposed: bool, alpha: float, dtype: torch.dtype, columns_first: bool
) -> Tensor:
    rows, outputs = x.shape[0], weight.shape[1] if transposed else weight.shape[0]
    return x.new_empty((outputs, rows) if columns_first else (rows, outputs), dtype=dtype)


def _dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return dropout(False, x, p, seed)


def _dropout_fake(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _undifferentiable(name: str) -> Any:
    """The library op as autograd sees it. The public Functions call it with autograd off; nobody differentiates it."""
    op = getattr(_OPS, name).default

    def kernel(keys: torch.DispatchKeySet, *args: Any) -> Tensor:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        level = forward_ad._current_level
        if (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)) or (
            level >= 0 and any(forward_ad.unpack_dual(tensor, level=level).tangent is not None for tensor in tensors)
        ):
            raise RuntimeError(
                f"peftkern::{name} has no derivative of its own: call the public op instead. The public ops have a first "
                "derivative in reverse mode; double backward and forward mode are not implemented."
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    return kernel


def _register(schema: str, implementation: Any, fake: Any) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=_TAGS)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    LIBRARY.impl(name, _undifferentiable(name), "Autograd", with_keyset=True)
    torch.library.register_fake(f"peftkern::{name}", fake, lib=LIBRARY)


_register(
    "matmul_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? code, Tensor? offset, str quant_type, "
    "int blocksize, int blocksize2, int rows, int columns, bool transposed, Tensor? t, Tensor? u, Tensor? bias) -> Tensor",
    _matmul_4bit,
    _matmul_4bit_fake,
)
_register(
    "matmul_dense(Tensor x, Tensor weight, bool transposed, Tensor? t, Tensor? u, Tensor? bias) -> Tensor",
    _matmul_dense,
    _matmul_dense_fake,
)
_register(
    "matmul_thin(Tensor x, Tensor weight, bool transposed, float alpha, ScalarType dtype, bool columns_first) -> Tensor",
    _matmul_thin,
    _matmul_thin_fake,
)
_register("dropout(Tensor x, float p, Tensor seed) -> Tensor", _dropout, _dropout_fake)


# ---- linear_4bit


def no_double_backward(grad: Tensor, op: str) -> None:
    """First-order only: W's and the adapters' second derivatives would need every intermediate kept."""
    if grad.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: double backward is not implemented (its backward was asked for a graph)")


def as_rows(x: Tensor, columns: int) -> Tensor:
    """[..., K] → [M, K], a view wherever the strides allow one."""
    return x if x.dim() == 2 else x.reshape(-1, columns)


def _forward(traced: bool, x: Tensor, bias: Tensor | None, weight: WeightTensors, spec: WeightSpec) -> Tensor:
    assert spec is not None
    y = base_matmul(traced, as_rows(x, spec[4]), weight, spec, False, None, None, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], spec[3])


def _backward(ctx: Any, traced: bool, grad: Tensor, weight: WeightTensors) -> tuple[Tensor | None, Tensor | None]:
    spec = ctx.spec
    rows = as_rows(grad, spec[3])
    needs_x, needs_bias = ctx.needs_input_grad[:2]
    dx = None
    if needs_x:
        dx = base_matmul(traced, rows, weight, spec, True)
        dx = dx if grad.dim() == 2 else dx.view(*grad.shape[:-1], spec[4])
    return dx, rows.sum(0, dtype=ctx.bias_dtype) if needs_bias else None


_NONES = (None,) * 6  # for packed, absmax, absmax2, code, offset, spec


class _Linear4bit(torch.autograd.Function):
    """Direct."""

    @staticmethod
    def forward(  # type: ignore[override]
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
        weight = (packed, absmax, absmax2, code, offset)
        ctx.save_for_backward(*weight)
        return _forward(False, x, bias, weight, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            no_double_backward(grad, "linear_4bit")
        return *_backward(ctx, not is_direct(grad), grad, ctx.saved_tensors), *_NONES


class _Linear4bitTraced(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        absmax: Tensor,
        absmax2: Tensor | None,
        code: Tensor | None,
        offset: Tensor | None,
        spec: WeightSpec,
    ) -> Tensor:
        return _forward(True, x, bias, (packed, absmax, absmax2, code, offset), spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[override]
        _, bias, packed, absmax, absmax2, code, offset, spec = inputs
        ctx.spec = spec
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(packed, absmax, absmax2, code, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return *_backward(ctx, True, grad, ctx.saved_tensors), *_NONES


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that F.linear would compute in here: autocast's where it is on for the device, else the tensor's."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def _check(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> None:
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight: expected a QuantizedWeight, got {type(weight).__name__}")
    rows, columns = weight.shape
    device = weight.packed.device
    check_x(x, columns, device)
    if bias is not None:
        check_tensor("bias", bias, (rows,), device)


def linear_4bit(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Y = X Wᵀ + b with W in 4 bits, decoded from its packed bytes inside the product.

    x [..., K] fp32, bf16 or fp16, any strides, any batch shape, empty too; weight QuantizedWeight [N, K];
    bias [N] of any of these dtypes. Returns [..., N] of x's dtype, contiguous.

    fp32 accumulation and one rounding at the end. For bf16 x the weight's values are rounded to bf16 (as dequantize_4bit
    gives them) or better; for fp32 and fp16 x they are the unrounded fp32 code · absmax.

    Backward: dX = dY W from the same packed bytes, dbias = Σ dY in fp32; W is frozen. Saved: the packed weight, by
    reference; not x. First derivatives in reverse mode only: double backward and forward mode raise RuntimeError.
    Under torch.autocast x is cast as F.linear casts it.

    Raises TypeError or ValueError naming the argument; RuntimeError when a forced backend cannot run the call.
    Method: QLoRA, Dettmers et al., arXiv 2305.14314.
    """
    _check(x, weight, bias)
    dtype = autocast_dtype(x.device, x.dtype)
    if dtype is not x.dtype:
        x = x.to(dtype)
    tensors, spec = flatten_weight(weight)
    if not is_direct(x, bias, *tensors):
        return _Linear4bitTraced.apply(x, bias, *tensors, spec)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear4bit.apply(x, bias, *tensors, spec)  # type: ignore[no-any-return]
    return _forward(False, x, bias, tensors, spec)


def _calls(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> tuple[Call, ...]:
    _check(x, weight, bias)
    return (Call("matmul", x.device, autocast_dtype(x.device, x.dtype)),)


dispatch.CALLS["linear_4bit"] = _calls
