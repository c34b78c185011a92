"""The two ways of a call, which every op shares.

An eager call on plain tensors goes straight to the backend ("direct"). A call that something watches or
rewrites (torch.compile, export, functorch, a dispatch mode, a tensor subclass, the meta device) goes through
torch.library ops ("traced"), which have fake kernels, and a batching rule in torch's per-sample fallback.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from peftkern.backends import Call, Weight4
from peftkern.formats import QuantizedWeight
from peftkern.ops.checks import PLAIN

_unsafe_view: Any = torch.ops.aten._unsafe_view.default
# (size, stride, dtype); what inductor's code allocates by, where this torch has it
_empty_strided_cpu: Any = getattr(
    torch._C._dynamo.guards,
    "_empty_strided_cpu",
    lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="cpu"),
)
_is_included: Any = torch._C._dispatch_tls_is_dispatch_key_included
_PYTHON, _FUNCTORCH, _VMAP_MODE, _TRACER = (
    torch._C._parse_dispatch_key(key)
    for key in ("Python", "FuncTorchDynamicLayerFrontMode", "VmapMode", "Tracer")
)

# packed, absmax, absmax2, code, offset: as a library op and save_for_backward take a 4-bit weight
WeightTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
# quant_type, blocksize, blocksize2 (0: not nested), N, K
WeightSpec = tuple[str, int, int, int, int]
# both, where there is no 4-bit weight
NO_WEIGHT: tuple[tuple[None, ...], None] = ((None,) * 5, None)


def is_direct(first: Tensor, *others: Tensor | None) -> bool:
    """Plain tensors that nothing watches: their memory may be handed to a kernel as it is."""
    # One function asked four times, not four of them: where a layer's weights have gone through the caches, a
    # call into code that was not called just before costs 2 µs.
    if (
        torch.compiler.is_dynamo_compiling()
        or _is_included(_PYTHON)  # a dispatch mode: export, make_fx, FakeTensorMode
        or _is_included(_FUNCTORCH)  # vmap, grad, jvp
        or _is_included(_VMAP_MODE)  # autograd.grad(is_grads_batched=True)
        or _is_included(_TRACER)  # torch.jit.trace
        or forward_ad._current_level >= 0
    ):
        return False
    # a negative-bit view (z.conj().imag) shares its memory with its negation
    if type(first) not in PLAIN or first.is_neg() or first.is_meta:
        return False
    for tensor in others:
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_neg()):
            return False
    return True


def fresh(like: Tensor, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result [rows, columns] where `like` is, of its dtype if none is given."""
    dtype = like.dtype if dtype is None else dtype
    if like.is_cpu and type(like) in PLAIN:  # half of new_empty's time
        return _empty_strided_cpu((rows, columns), (columns, 1), dtype)  # type: ignore[no-any-return]
    return like.new_empty(rows, columns, dtype=dtype)


def call(primitive: str, x: Tensor, dtype: torch.dtype, weight: QuantizedWeight | Tensor | None) -> Call:
    """Of a layer with x as input, for `explain`."""
    operand = weight.kernel_args if isinstance(weight, QuantizedWeight) else weight
    return Call(primitive, x.device, dtype, x.shape[:-1].numel(), operand)


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


# ---- library ops

LIBRARY = Library("peftkern", "FRAGMENT")  # type: ignore[no-untyped-call]
OPS: Any = torch.ops.peftkern


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


def full(like: Tensor, results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """A library op returns tensors only: what there is not is empty."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _tangent(tensor: Tensor) -> bool:
    level = forward_ad._current_level
    if level < 0:
        return False
    return forward_ad.unpack_dual(tensor, level=level).tangent is not None  # type: ignore[no-untyped-call]


def _undifferentiable(name: str) -> Any:
    """The library op as autograd sees it: only the Functions have a derivative, here it is an error."""
    op = getattr(OPS, name).default
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


def no_double_backward(ctx: Any, grad: Tensor, op: str) -> None:
    """create_graph asks for a graph of the gradients: raise if anything they are made of requires grad."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (grad, *ctx.saved_tensors)
    ):
        raise RuntimeError(f"{op}: double backward is not implemented")
