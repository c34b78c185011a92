"""mora_linear: the frozen product with a square adapter between a compression and a spreading; mora alone;
mora_rank and mora_delta.

Every type is y = spread(blocks(compress(x)) Mᵀ): the I columns of x are compressed to P = n r̂ in the middle,
n blocks of r̂ are each multiplied by Mᵀ, and the P results are spread over the O columns of y. The adjoint
swaps the ends, in the same row of a backend: dx = spread(blocks(compress(dy)) M).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern import dispatch, reference
from peftkern.backends import Call, Middle, Weight4
from peftkern.dispatch import find
from peftkern.formats import QuantizedWeight
from peftkern.ops.checks import (
    PLAIN,
    autocast_dtype,
    check_base,
    check_scaling,
    check_size,
    check_tensor,
    check_x,
    matrix_shape,
    refuse,
)
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
from peftkern.ops.linear import bias_grad
from peftkern.reference import mora_kind


class _Plan(NamedTuple):
    """How a type goes from I columns to the n blocks of r̂ in the middle, and from those to O columns."""

    blocks: int  # n
    rotated: bool
    inner: tuple[bool, int]  # grouped, length: between x and the middle
    outer: tuple[bool, int]  # between the middle and y


def _plan(kind: int | str, size: int, inputs: int, outputs: int) -> _Plan:
    if kind == "truncation":
        return _Plan(1, False, (False, min(inputs, size)), (False, min(outputs, size)))
    blocks = -(-inputs // size)
    strided, tiled, grouped = (False, blocks * size), (False, outputs), (True, 0)
    if kind in (6, "decoupling"):
        # a single block is turned by an angle of 0: it is type 1
        return _Plan(max(1, blocks), kind == 6 and blocks > 1, strided, tiled)
    return _Plan(1, False, strided if kind in (1, 4) else grouped, tiled if kind in (1, 3) else grouped)


@lru_cache(maxsize=64)
def _rotation(size: int, blocks: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return reference.rotation_table(size, blocks, device)


@lru_cache(maxsize=128)  # shapes of a model
def _middle(kind: int | str, size: int, inputs: int, outputs: int, device: torch.device) -> Middle:
    plan = _plan(kind, size, inputs, outputs)
    table = _rotation(size, plan.blocks, device) if plan.rotated else None
    return Middle(plan.inner, plan.outer, plan.blocks * size, table)


def _product(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    weight: Weight4 | Tensor | None,
    outputs: int,
    kind: int | str,
    scaling: float,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """x Wᵀ + bias + scaling · mora(x), [M, outputs]; z [M, r̂], to keep where there is one block."""
    size = matrix.shape[0]
    middle = _middle(kind, size, x.shape[1], outputs, x.device)
    out, z = _outputs(x, size, outputs, keep and middle.columns == size)
    find("mora", x.device, x.dtype)(out, z, x, weight, False, matrix, scaling, bias, middle)
    return out, z


def _outputs(x: Tensor, size: int, outputs: int, keep: bool) -> tuple[Tensor, Tensor | None]:
    rows = x.shape[0]
    return fresh(x, rows, outputs), fresh(x, rows, size) if keep else None


def _gradients(
    dY: Tensor,
    source: Tensor | None,
    matrix: Tensor | None,
    weight: Weight4 | Tensor | None,
    inputs: int,
    size: int,
    kind: int | str,
    scaling: float,
) -> tuple[Tensor | None, Tensor | None]:
    """Given M, dx = dY W + scaling · (mora's adjoint)(dY); given the source, which is z of one block and x of
    several, dM = scaling · Σ gᵀ z in fp32, over rows and blocks."""
    dx, dM = _empty_gradients(dY, source, matrix, inputs, size)
    rows, outputs = dY.shape
    inner, outer, columns, table = _middle(kind, size, inputs, outputs, dY.device)
    g = fresh(dY, rows, size) if columns == size and source is not None else None
    if matrix is not None:
        middle = Middle(outer, inner, columns, table)
        find("mora", dY.device, dY.dtype)(dx, g, dY, weight, True, matrix, scaling, None, middle)
    elif g is not None:
        find("compress", dY.device, dY.dtype)(g, dY, *outer, None, False)
    if source is not None:
        given = dY if g is None else g
        find("mora_grad", dY.device, dY.dtype)(dM, given, source, scaling, columns, table)
    return dx, dM


def _empty_gradients(
    dY: Tensor, source: Tensor | None, matrix: Tensor | None, inputs: int, size: int
) -> tuple[Tensor | None, Tensor | None]:
    """Memory for those that are asked for."""
    dx = None if matrix is None else fresh(dY, dY.shape[0], inputs)
    return dx, None if source is None else fresh(dY, size, size, torch.float32)


# ---- library ops


def _kind(name: str) -> int | str:
    """From what a schema takes: mora_kind's names as strings."""
    return int(name) if name.isdigit() else name


def _mora_op(x: Tensor, matrix: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *weight, outputs, kind, scaling, keep = args
    return full(x, _product(x, matrix, bias, unflat(*weight), outputs, _kind(kind), scaling, keep))


def _mora_op_fake(x: Tensor, matrix: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *_, outputs, kind, _, keep = args
    size = matrix.shape[0]
    kept = keep and _plan(_kind(kind), size, x.shape[1], outputs).blocks == 1
    return full(x, _outputs(x, size, outputs, kept))


def _mora_backward_op(
    dY: Tensor, source: Tensor | None, matrix: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    *weight, inputs, size, kind, scaling = args
    return full(dY, _gradients(dY, source, matrix, unflat(*weight), inputs, size, _kind(kind), scaling))


def _mora_backward_op_fake(
    dY: Tensor, source: Tensor | None, matrix: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    *_, inputs, size, _, _ = args
    return full(dY, _empty_gradients(dY, source, matrix, inputs, size))


register(
    f"mora(Tensor x, Tensor matrix, Tensor? bias, {FLAT}, SymInt outputs, str kind, float scaling, "
    "bool keep) -> (Tensor, Tensor)",
    _mora_op,
    _mora_op_fake,
)
register(
    f"mora_backward(Tensor dY, Tensor? source, Tensor? matrix, {FLAT}, SymInt inputs, SymInt size, "
    "str kind, float scaling) -> (Tensor, Tensor)",
    _mora_backward_op,
    _mora_backward_op_fake,
)


# ---- autograd


def _forward(
    traced: bool,
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    weight: Weight4 | Tensor | None,
    outputs: int,
    kind: int | str,
    scaling: float,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Y [..., O] and, to keep where there is one block, z = compress(x) [M, r̂], rounded to x's dtype."""
    rows = x if x.ndim == 2 else as_rows(x, x.shape[-1])
    if traced:
        y, z = OPS.mora(rows, matrix, bias, *flat(weight), outputs, str(kind), scaling, keep)
        z = z if z.ndim == 2 else None
    else:
        y, z = _product(rows, matrix, bias, weight, outputs, kind, scaling, keep)
    return like_rows(y, x), z


def _save(
    ctx: Any,
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    dense: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    spec: WeightSpec | None,
    kind: int | str,
    scaling: float,
    z: Tensor | None,
) -> None:
    """Only what the gradients that are asked for will read."""
    needs_x, needs_M, needs_bias, needs_W = ctx.needs_input_grad[:4]
    bias_dtype = bias.dtype if bias is not None and needs_bias else None
    ctx.settings = spec, kind, scaling, x.shape[-1], matrix.shape[0], matrix.dtype, bias_dtype
    ctx.save_for_backward(
        x if needs_W or (needs_M and z is None) else None,
        matrix if needs_x else None,
        z if needs_M else None,
        *((dense, *tensors) if needs_x else (None,) * 6),
    )


def _backward(ctx: Any, traced: bool, grad: Tensor) -> tuple[Any, ...]:
    """The gradients of x, matrix, bias and the dense W."""
    x, matrix, z, dense, packed, absmax, absmax2, code, offset = ctx.saved_tensors
    needs_x, needs_M, _, needs_W = ctx.needs_input_grad[:4]
    spec, kind, scaling, inputs, size, matrix_dtype, bias_dtype = ctx.settings
    dY = as_rows(grad, grad.shape[-1])
    weight = dense if packed is None else weight4(packed, absmax, absmax2, code, offset, spec)
    dx = dM = dW = None
    if needs_x or needs_M:
        source = None
        if needs_M:
            source = as_rows(x, inputs) if z is None else z
        if traced:
            settings = inputs, size, str(kind), scaling
            dx, dM = OPS.mora_backward(dY, source, matrix, *flat(weight), *settings)
            dx, dM = dx if needs_x else None, dM if needs_M else None
        else:
            dx, dM = _gradients(dY, source, matrix, weight, inputs, size, kind, scaling)
    if dM is not None:
        dM = dM.to(matrix_dtype)
    if dx is not None and grad.ndim != 2:
        dx = dx.view(*grad.shape[:-1], inputs)
    dbias = bias_grad(traced, dY, bias_dtype)
    if needs_W:
        dW = torch.mm(dY.t(), as_rows(x, inputs))
    return dx, dM, dbias, dW


class _MoraLinear(torch.autograd.Function):
    """Direct."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        dense: Tensor | None,
        quantized: QuantizedWeight | None,
        outputs: int,
        kind: int | str,
        scaling: float,
    ) -> Tensor:
        weight: Any = dense if quantized is None else quantized.kernel_args
        y, z = _forward(False, x, matrix, bias, weight, outputs, kind, scaling, ctx.needs_input_grad[1])
        ctx.op = "mora" if weight is None else "mora_linear"
        tensors, spec = NO_WEIGHT if quantized is None else flatten_weight(quantized)
        _save(ctx, x, matrix, bias, dense, tensors, spec, kind, scaling, z)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        no_double_backward(ctx, grad, ctx.op)
        return *_backward(ctx, not is_direct(grad), grad), None, None, None, None


_apply_direct: Any = super(torch.autograd.Function, _MoraLinear).apply  # as in linear.py


class _MoraLinearTraced(torch.autograd.Function):
    """z is a second output, if there is one: functorch saves nothing but inputs and outputs. It stays
    differentiable, so that dM, which is made of it, raises when it is differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        dense: Tensor | None,
        packed: Tensor | None,
        absmax: Tensor | None,
        absmax2: Tensor | None,
        code: Tensor | None,
        offset: Tensor | None,
        spec: WeightSpec | None,
        outputs: int,
        kind: int | str,
        scaling: float,
    ) -> tuple[Tensor, ...]:
        weight: Weight4 | Tensor | None = dense
        if packed is not None and absmax is not None and spec is not None:
            weight = weight4(packed, absmax, absmax2, code, offset, spec)
        y, z = _forward(True, x, matrix, bias, weight, outputs, kind, scaling, True)
        return (y,) if z is None else (y, z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, matrix, bias, dense, *tensors, spec, _, kind, scaling = inputs
        z = output[1] if len(output) == 2 else None
        _save(ctx, x, matrix, bias, dense, tuple(tensors), spec, kind, scaling, z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return *_backward(ctx, True, grad), None, None, None, None, None, None, None, None, None


def _apply(
    x: Tensor,
    weight: QuantizedWeight | Tensor | None,
    matrix: Tensor,
    outputs: int,
    kind: int | str,
    scaling: float,
    bias: Tensor | None,
) -> Tensor:
    if isinstance(weight, QuantizedWeight):
        quantized, dense = weight, None
        direct = is_direct(x, matrix, bias) and type(weight.packed) in PLAIN
    else:
        quantized, dense = None, weight if weight is None or weight.dtype is x.dtype else weight.to(x.dtype)
        direct = is_direct(x, matrix, bias, dense)
    if not direct:
        tensors, spec = NO_WEIGHT if quantized is None else flatten_weight(quantized)
        y, *_ = _MoraLinearTraced.apply(  # type: ignore[no-untyped-call]
            x, matrix, bias, dense, *tensors, spec, outputs, kind, scaling
        )
        return y  # type: ignore[no-any-return]
    if needs_graph(x, matrix, bias, dense):
        return _apply_direct(  # type: ignore[no-any-return]
            x, matrix, bias, dense, quantized, outputs, kind, scaling
        )
    operand: Any = dense if quantized is None else quantized.kernel_args
    return _forward(False, x, matrix, bias, operand, outputs, kind, scaling, False)[0]


# ---- the public ops


def _check_matrix(matrix: Tensor, kind: int | str, device: torch.device) -> None:
    shape = matrix_shape(matrix)
    if shape is None or shape[0] != shape[1] or not shape[0]:
        refuse("matrix", matrix, "shape [r̂, r̂], r̂ ≥ 1", None, device)
    check_tensor("matrix", matrix, shape, device)
    if kind == 6 and shape[0] % 2:
        raise ValueError(f"matrix: expected an even size for mora_type 6, got shape {list(matrix.shape)}")


def mora_rank(in_features: int, out_features: int, r: int, mora_type: int | str = 1) -> int:
    """r̂ = ⌊√((I + O) r) + ½⌋: the size of the square matrix with about the parameters of a LoRA of rank r.

    For type 6 ("rotation") the even number 2 ⌊r̂ / 2⌋. At least 1, and 2 for type 6. in_features, out_features
    and r are integers from 1 to 2⁴⁸; raises TypeError or ValueError naming the argument. Source: the MoRA
    authors' code (github.com/kongds/MoRA).
    """
    for name, value in (("in_features", in_features), ("out_features", out_features), ("r", r)):
        check_size(name, value, 1)
    return reference.mora_rank(in_features, out_features, r, mora_type)


def _check_mora(
    x: Tensor, matrix: Tensor, out_features: int, mora_type: int | str
) -> tuple[torch.dtype, int | str]:
    kind = mora_kind(mora_type)
    if not isinstance(x, Tensor) or x.dim() < 1:
        refuse("x", x, "shape [..., I]", None, None)
    check_x(x, x.shape[-1], x.device)
    _check_matrix(matrix, kind, x.device)
    check_size("out_features", out_features, 0)
    return autocast_dtype(x), kind


def _mora_calls(x: Tensor, *rest: Any) -> tuple[Call, ...]:
    dtype, _ = _check_mora(x, *rest)
    return (call("mora", x, dtype, None),)


@dispatch.explained_by(_mora_calls)
def mora(x: Tensor, matrix: Tensor, out_features: int, mora_type: int | str = 1) -> Tensor:
    """Y = decompress(compress(X) Mᵀ): a square matrix as a linear layer from I to O features.

    x [..., I] fp32, bf16 or fp16, any strides, any batch shape, empty too; matrix M [r̂, r̂], r̂ ≥ 1, of any of
    these dtypes. Returns [..., O = out_features ≤ 2⁴⁸] of x's dtype, contiguous. For every I, O and r̂; with
    n = ⌈I / r̂⌉, x̃[p] = x[p mod I] for p < n r̂, g(i) the group of i in r̂ contiguous groups (the first ones
    longer by one where they cannot be equal) and u = z Mᵀ:

        1 "sharing"     z[q] = Σ x̃[p], p mod r̂ = q          y[i] = u[i mod r̂]
        2               z[q] = Σ x[j], g(j) = q              y[i] = u[g(i)]
        3               z as in 2                            y as in 1
        4               z as in 1                            y as in 2
        6 "rotation"    x̃ as n blocks of r̂; in block b the halves (s, t) become (s cos φ - t sin φ, t cos φ +
                        s sin φ), φ[j] = b · 10000^(-2j / r̂), j < r̂ / 2; r̂ even. u: the n blocks, each times
                        Mᵀ, in a row of L = n r̂; y[i] = u[i mod L]
        "decoupling"    6 with nothing turned
        "truncation"    z = the first r̂ columns of x         y = u in the first r̂ columns, 0 beyond

    z is rounded to x's dtype; M is brought to it inside the product; u stays in fp32, every sum runs in fp32
    and y is rounded once. cos and sin are fp32 numbers, computed in fp64. (On triton, with n > 1, M times
    each block's turn is rounded to x's dtype instead, and z is x̃.)

    Backward, with g the compression of dY as y's spreading has it: dX = the spreading of g M as x's
    compression has it, dM = Σ gᵀ z over the rows, in M's dtype; only what is asked for. Saved: z [M, r̂], not
    x, and M; for 6 and "decoupling" with n > 1, x by reference and M. What lies between, as wide as x, is
    never made as a whole: on cpu y, dX and dM come from a pass over x, over dY and over both, some rows at a
    time on their way through the L2 cache (dM with at most 16 matrices of sums, 8 MB of them); where M is
    large for so few rows, for dM from r̂ = 513 on, and on reference, of parts in at most 2 MB, dX in 4 (a row
    where that is more); on triton dM takes an fp32 matrix of sums for each r̂ columns of dY, more
    where parts of the rows fill the GPU, and y and dX n matrices M, turned by each block.
    First derivatives in reverse mode only: double backward and forward mode raise RuntimeError. Under
    torch.autocast x is cast as F.linear casts it.

    Raises TypeError or ValueError naming the argument; RuntimeError when a forced backend cannot run the
    call. Method: MoRA, Jiang et al., arXiv 2405.12130; the types' numbers are those of its authors' code
    (github.com/kongds/MoRA), whose forward fails where x's padding is longer than x, r̂ > 2 I (types 1, 4, 6):
    here x is repeated further.
    """
    dtype, kind = _check_mora(x, matrix, out_features, mora_type)
    if dtype is not x.dtype:
        x = x.to(dtype)
    return _apply(x, None, matrix, out_features, kind, 1.0, None)


def _check_linear(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    matrix: Tensor,
    mora_type: int | str,
    scaling: float,
    bias: Tensor | None,
) -> tuple[torch.dtype, int | str]:
    """Raises for anything that the op does not take; returns the dtype to compute in and the type's name."""
    kind = mora_kind(mora_type)
    rows, _, device, dtype = check_base(x, weight)
    _check_matrix(matrix, kind, device)
    check_scaling(scaling)
    if bias is not None:
        check_tensor("bias", bias, (rows,), device)
    return dtype, kind


def _linear_calls(x: Tensor, weight: QuantizedWeight | Tensor, *rest: Any) -> tuple[Call, ...]:
    dtype, _ = _check_linear(x, weight, *rest)
    return (call("mora", x, dtype, weight),)


@dispatch.explained_by(_linear_calls)
def mora_linear(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    matrix: Tensor,
    mora_type: int | str = 1,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Y = X Wᵀ + s · mora(X) + b, the adapter added in the epilogue of the frozen product, which with a 4-bit
    W writes Y once.

    x [..., K] fp32, bf16 or fp16, any strides, any batch shape, empty too (copied where its strides allow no
    view of it as rows); weight a dense [N, K] of x's dtype or a QuantizedWeight; matrix [r̂, r̂] and bias [N]
    of any of these dtypes. Returns [..., N] of x's dtype, contiguous. mora_type and the formula of each type:
    `mora`, with I = K and O = N.

    The roundings are those of `mora`, with one of Y at the end. With a dense W, the addend is written to Y
    first and torch's own GEMM adds to it, which costs one more rounding to x's dtype; its bits are torch's,
    and in fp32 they may depend on the thread count, while with a QuantizedWeight they do not.

    Backward: dX = dY W + s · spread(g M), dM = s · Σ gᵀ z (g, z: `mora`), dbias = Σ dY, each in its own
    parameter's dtype, and only those that are asked for. A QuantizedWeight is frozen; a dense W that requires
    grad gets dW = dYᵀ X. Saved: z [M, r̂], M and the weight by reference, never a dequantized W, and x only
    for a dense W that requires grad; for type 6 and "decoupling" with K > r̂, x by reference instead of z,
    and u, as wide as x and in fp32, exists for at most 384 rows at a time (for all where there are fewer),
    beside what `mora` says (on triton no u; on cpu a thread keeps the memory of its last u, up to 64
    MiB). First derivatives in reverse mode only: double backward and forward mode raise RuntimeError.
    Under torch.autocast x and a dense W are cast as F.linear casts them; the matrix is brought to that
    dtype inside the product and keeps its own for its gradient.

    Raises TypeError or ValueError naming the argument; RuntimeError when a forced backend cannot run the
    call. Method: MoRA, Jiang et al., arXiv 2405.12130, whose scaling is 1; QLoRA, Dettmers et al., arXiv
    2305.14314.
    """
    dtype, kind = _check_linear(x, weight, matrix, mora_type, scaling, bias)
    if dtype is not x.dtype:
        x = x.to(dtype)
    return _apply(x, weight, matrix, weight.shape[0], kind, scaling, bias)


def _check_delta(
    matrix: Tensor, in_features: int, out_features: int, mora_type: int | str
) -> tuple[Call, ...]:
    kind = mora_kind(mora_type)
    if not isinstance(matrix, Tensor):
        refuse("matrix", matrix, "", None, None)
    _check_matrix(matrix, kind, matrix.device)
    check_size("in_features", in_features, 0)
    check_size("out_features", out_features, 0)
    return ()


@dispatch.explained_by(_check_delta)
def mora_delta(matrix: Tensor, in_features: int, out_features: int, mora_type: int | str = 1) -> Tensor:
    """ΔW [O, I] with mora(x) = x ΔWᵀ: what the adapter adds to W, but for mora_linear's scaling.

    matrix [r̂, r̂] fp32, bf16 or fp16; mora_type as in `mora`, of which this is the matrix for every I, O and
    r̂: ΔW's elements are elements of M, turned by the forward's own cos and sin for type 6, and sums of those
    where x is repeated more than once onto a column. In matrix's dtype, summed in fp32 and rounded once;
    differentiable to any order. Gathered from M, without a product. Raises TypeError or ValueError naming
    the argument.
    """
    _check_delta(matrix, in_features, out_features, mora_type)
    size, device = matrix.shape[0], matrix.device
    plan = _plan(mora_kind(mora_type), size, in_features, out_features)
    M = matrix.float()
    if plan.blocks == 1:
        columns = reference.spread_out(M, in_features, *plan.inner)  # [r̂, I]
        delta = _spread_rows(columns, out_features, *plan.outer)
        return delta.to(matrix.dtype)
    blocks = plan.blocks
    if plan.rotated:
        cos, sin = reference.rotation_table(size, blocks, device).unsqueeze(2).unbind(1)  # [n, 1, r̂ / 2]
        s, t = M.chunk(2, 1)
        turned = torch.cat((s * cos + t * sin, t * cos - s * sin), 2)  # [n, r̂, r̂]: M times each block's turn
    else:
        turned = M.expand(blocks, size, size)
    # rows b r̂ … (b + 1) r̂ of the n r̂ that are then repeated: block b, at the columns that it reads
    at = torch.arange(blocks * size, device=device) % in_features
    delta = M.new_zeros(blocks, size, in_features)
    delta = delta.scatter_add(2, at.view(blocks, 1, size).expand(-1, size, -1), turned)
    return _spread_rows(delta.view(blocks * size, in_features), out_features, *plan.outer).to(matrix.dtype)


def _spread_rows(values: Tensor, rows: int, grouped: bool, length: int) -> Tensor:
    """[P, I] → [rows, I], as reference.spread_out does to columns; length ≤ rows."""
    size, device = values.shape[0], values.device
    if grouped:
        return values.index_select(0, reference.group_of(rows, size, device))
    if length <= size:
        spread = values[:length]
    else:
        spread = values.index_select(0, torch.arange(length, device=device) % size)
    if length == rows:
        return spread
    return torch.nn.functional.pad(spread, (0, 0, 0, rows - length))
