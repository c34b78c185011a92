"""Every public op in plain PyTorch: same names, same arguments, differentiable, on any device. The oracle of
the other backends.

x may also be fp64 here; then everything is computed in fp64, from the fp32 values of the decoded weight.
Otherwise everything is computed in fp32 and rounded once, to x's dtype, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from peftkern.formats import QuantizedWeight, code_table, double_quantize

_UINT32 = 0xFFFFFFFF
# bitsandbytes divides by no less than this; as fp32 it is the subnormal 9.9999994e-39.
_SMALLEST_SCALE = 1e-38


# ---- quantization


def quantize_4bit(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False
) -> QuantizedWeight:
    """The nearest code to weight / absmax(block), block by block of the row-major index. weight [N, K].

        absmax = max |w| over the block
        v      = clamp(w * (1 / max(absmax, 1e-38)), -1, 1) in fp32
                 clamp(w / max(absmax, 1e-38), -1, 1) in the short last block
        q      = the code whose interval holds v; intervals end at the fp32 midpoints of neighbouring codes

    Bit for bit what bitsandbytes 0.50.2 does on the CPU: `peftkern.quantize_4bit` says what that means for
    ties, zeros, NaN and Inf. double_quant: see `formats.double_quantize`.
    """
    flat = weight.detach().reshape(-1).float()
    numel = flat.numel()
    full = numel - numel % blocksize
    blocks = flat[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    unit = (blocks * absmax.clamp(min=_SMALLEST_SCALE).reciprocal()[:, None]).view(-1)
    if full < numel:
        scale = flat[full:].abs().amax().clamp(min=_SMALLEST_SCALE)
        absmax = torch.cat((absmax, scale[None]))
        unit = torch.cat((unit, flat[full:] / scale))
    if numel % 2:
        unit = torch.nn.functional.pad(unit, (0, 1))

    values, order = code_table(quant_type, flat.device).sort(stable=True)
    thresholds = (values[:-1] + values[1:]) / 2
    codes = order.to(torch.uint8)[torch.bucketize(unit.clamp(-1.0, 1.0), thresholds, out_int32=True)]
    packed = codes[::2] << 4 | codes[1::2]
    nested = None
    if double_quant:
        absmax, nested = double_quantize(absmax)
    shape = (weight.shape[0], weight.shape[1])
    return QuantizedWeight(packed, absmax, shape, quant_type, blocksize, weight.dtype, nested)


def absmax_values(weight: QuantizedWeight) -> Tensor:
    """fp32 [ceil(N K / blocksize)]: the scale of each block, decoded from its 8 bits when nested."""
    nested = weight.nested
    if nested is None:
        return weight.absmax
    scales = nested.absmax.repeat_interleave(nested.blocksize)[: weight.absmax.shape[0]]
    return nested.code[weight.absmax.int()] * scales + nested.offset


def dequantize_4bit(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """[N, K]: round(code[q] * absmax), an fp32 product and one rounding to dtype (weight.dtype when None)."""
    rows, columns = weight.shape
    numel = rows * columns
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), 1).view(-1)[:numel]
    values = code_table(weight.quant_type, weight.device)[codes.int()]
    scales = absmax_values(weight).repeat_interleave(weight.blocksize)[:numel]
    return (values * scales).to(weight.dtype if dtype is None else dtype).view(rows, columns)


# ---- linear


def _dense(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return (
        weight.to(dtype) if isinstance(weight, Tensor) else dequantize_4bit(weight, torch.float32).to(dtype)
    )


def matmul(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    transposed: bool = False,
    alpha: float = 1.0,
    t: Tensor | None = None,
    u: Tensor | None = None,
    bias: Tensor | None = None,
    spread: Spread | None = None,
) -> Tensor:
    """out[m, o] = alpha * (sum_c x[m, c] w(o, c) + sum_r t[m, r] u[o, r]) + bias[o] + spread(v)[m, o], in
    x's dtype: the one primitive.

    w(o, c) = W[o, c], W [outputs, inner]; transposed: w(o, c) = W[c, o], W [inner, outputs]. x [..., inner],
    t [..., R], u [outputs, R]. `spread` = (v [..., P], grouped, length): see `spread_out`.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        w = _dense(weight, dtype)
        out = x.to(dtype) @ (w if transposed else w.t())
        if t is not None and u is not None:
            out = out + t.to(dtype) @ u.to(dtype).t()
        out = out * float(alpha)  # of any size: an int past 64 bits too
        if bias is not None:
            out = out + bias.to(dtype)
        if spread is not None:
            values, grouped, length = spread
            out = out + spread_out(values.to(dtype), out.shape[-1], grouped, length)
        return out.to(x.dtype)


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def linear_4bit(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Y = X Wᵀ + b. x [..., K], weight [N, K], bias [N] → [..., N] of x's dtype (or autocast's)."""
    return matmul(_autocast(x), weight, bias=bias)


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Y = X Wᵀ + scaling · drop(X) Aᵀ Bᵀ + b. x [..., K], weight [N, K], lora_A [R, K], lora_B [N, R], bias
    [N] → [..., N].

    drop(x) = where(keep, x, 0) / (1 - dropout) with the mask of `dropout_mask(seed, x.shape, dropout)`; a
    dropped NaN or Inf is 0; dropout = 1 leaves the base product alone. Without a seed it takes one from
    torch's generator of x's device. W may be dense, and gets a gradient then if it asks for one. T = X Aᵀ is
    not rounded.

    Raises ValueError for a dropout outside [0, 1].
    """
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: expected 0 <= dropout <= 1, got {dropout}")
    x = _autocast(x)
    # one cast for both branches, so that dX too is rounded once
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    dropped = wide
    if dropout > 0.0:
        mask = dropout_mask(draw_seed(x.device) if seed is None else seed, x.shape, dropout, x.device)
        dropped = torch.where(mask, wide, 0.0)
    t = matmul(dropped, lora_A, alpha=adapter_scale(scaling, dropout))
    return matmul(wide, weight, t=t, u=lora_B, bias=bias).to(x.dtype)


def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """ΔW = scaling · B A. lora_A [R, K], lora_B [N, R] → [N, K] in the two dtypes' common one."""
    common = torch.promote_types(lora_A.dtype, lora_B.dtype)
    dtype = torch.float64 if common == torch.float64 else torch.float32
    with torch.autocast(lora_A.device.type, enabled=False):
        return (lora_B.to(dtype) @ lora_A.to(dtype) * float(scaling)).to(common)


_Weight = TypeVar("_Weight", Tensor, QuantizedWeight)


def merge(weight: _Weight, delta: Tensor) -> _Weight:
    """W + ΔW, summed in fp32 (fp64 for fp64) and rounded to W's dtype; a 4-bit W is quantized again."""
    if isinstance(weight, Tensor):
        dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
        return (weight.to(dtype) + delta.to(dtype)).to(weight.dtype)
    merged = (dequantize_4bit(weight, torch.float32) + delta.float()).to(weight.dtype)
    return quantize_4bit(merged, weight.quant_type, weight.blocksize, weight.nested is not None)


class MergeError(NamedTuple):
    """How far a merged weight is from W + ΔW, with E = merged - (W + ΔW) over all its elements.

    maximum   max |E|
    rms       the root mean square of E
    relative  ‖E‖ / ‖ΔW‖ (Frobenius): the merge's error, measured in updates; above 1 it is larger than the
              update itself
    kept      ⟨merged - W, ΔW⟩ / ‖ΔW‖²: the share of the update that W moved along it. 1: all of it arrived,
              beside whatever noise; 0: none, as when every code of a 4-bit weight stayed what it was

    relative and kept are NaN for ΔW = 0; all four are NaN where an element is.
    """

    maximum: float
    rms: float
    relative: float
    kept: float


def merge_error(
    weight: Tensor | QuantizedWeight, delta: Tensor, merged: Tensor | QuantizedWeight
) -> MergeError:
    """How far `merged` is from W + ΔW, in fp64. weight, delta, merged [N, K]."""
    W, merged = (_dense(w.detach() if isinstance(w, Tensor) else w, torch.float64) for w in (weight, merged))
    delta = delta.detach().double()
    error = merged - (W + delta)
    if not error.numel():
        return MergeError(0.0, 0.0, math.nan, math.nan)
    size = delta.square().sum()
    return MergeError(
        error.abs().max().item(),
        error.square().mean().sqrt().item(),
        (error.square().sum() / size).sqrt().item(),
        (((merged - W) * delta).sum() / size).item(),
    )


# ---- MoRA

MORA_TYPES: dict[int | str, int | str] = {
    1: 1, 2: 2, 3: 3, 4: 4, 6: 6, "sharing": 1, "rotation": 6,
    "truncation": "truncation", "decoupling": "decoupling",
}  # fmt: skip


def mora_kind(mora_type: int | str) -> int | str:
    """mora_type by its one name: 1, 2, 3, 4, 6, "truncation" or "decoupling"."""
    # True == 1 and 1.0 == 1, but neither names a type
    kind = MORA_TYPES.get(mora_type) if type(mora_type) in (int, str) else None
    if kind is None:
        names = ", ".join(repr(name) for name in MORA_TYPES)
        raise ValueError(f"mora_type: expected one of {names}, got {mora_type!r}")
    return kind


def mora_rank(in_features: int, out_features: int, r: int, mora_type: int | str = 1) -> int:
    """r̂ = ⌊√((I + O) r) + ½⌋, the size of the square matrix that has about the parameters of a LoRA of rank
    r; for type 6 the even number 2 ⌊r̂ / 2⌋. At least 1, or 2."""
    rank = int(math.sqrt((in_features + out_features) * r) + 0.5)
    return max(2, rank - rank % 2) if mora_kind(mora_type) == 6 else max(1, rank)


def group_of(columns: int, groups: int, device: torch.device | str | None = None) -> Tensor:
    """g(0), …, g(columns - 1): contiguous groups, the first columns mod groups of them one longer."""
    short, longer = divmod(columns, groups)
    sizes = torch.full((groups,), short, device=device)
    sizes[:longer] += 1
    return torch.arange(groups, device=device).repeat_interleave(sizes)


def rotation_table(
    size: int,
    blocks: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[blocks, 2, size / 2]: cos φ and sin φ, φ[b, j] = b · 10000^(-2j / size), computed in fp64."""
    j = torch.arange(size // 2, dtype=torch.float64, device=device)
    b = torch.arange(blocks, dtype=torch.float64, device=device)
    angle = b[:, None] * 10000.0 ** (-2.0 * j / size)
    return torch.stack((angle.cos(), angle.sin()), 1).to(dtype)


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    """x [..., n, 2h] by table [n, 2, h]: (x1, x2) → (x1 cos φ - x2 sin φ, x2 cos φ + x1 sin φ), x1 and x2 the
    halves of a block."""
    cos, sin = table.to(x.dtype).unbind(1)
    one, two = x.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


def compress(
    x: Tensor,
    columns: int,
    grouped: bool,
    length: int,
    rotation: Tensor | None = None,
    inverse: bool = False,
) -> Tensor:
    """z[m, q] = the sum of those columns of x that go with column q: [..., I] → [..., P = columns], in x's
    dtype.

        grouped:  x's columns i of the q-th of P contiguous groups, g(i) = q
        cyclic:   x[m, p mod I] for every p < length with p mod P = q

    then with `rotation` [n, 2, h], n · 2h = P, each of the n blocks turns by its own angles, or back by them
    when inverse.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs, wide = x.shape[-1], x.to(dtype)
    if grouped:
        target = group_of(inputs, columns, x.device)
    else:
        p = torch.arange(length, device=x.device)
        wide, target = wide.index_select(-1, p % inputs), p % columns
    z = wide.new_zeros(*x.shape[:-1], columns).index_add(-1, target, wide)
    if rotation is not None:
        table = torch.stack((rotation[:, 0], -rotation[:, 1]), 1) if inverse else rotation
        z = _rotate(torch.unflatten(z, -1, (table.shape[0], 2 * table.shape[2])), table).flatten(-2)
    return z.to(x.dtype)


# values [..., P], grouped, length
Spread = tuple[Tensor, bool, int]


def spread_out(values: Tensor, columns: int, grouped: bool, length: int) -> Tensor:
    """y[m, o] = the sum of those columns of values that go with column o: [..., P] → [..., O = columns]; the
    adjoint of `compress` from O to P columns.

        grouped:  values[m, g(o)], O columns in P contiguous groups
        cyclic:   values[m, p mod P] for every p < length with p mod O = o
    """
    size = values.shape[-1]
    if grouped:
        return values.index_select(-1, group_of(columns, size, values.device))
    p = torch.arange(length, device=values.device)
    y = values.new_zeros(*values.shape[:-1], columns)
    return y.index_add(-1, p % columns, values.index_select(-1, p % size))


def _repeat(x: Tensor, length: int) -> Tensor:
    """x[..., p mod columns] for p < length; zeros where there is no column."""
    columns = x.shape[-1]
    if not columns:
        return x.new_zeros(*x.shape[:-1], length)
    return x.index_select(-1, torch.arange(length, device=x.device) % columns)


def _mora(x: Tensor, matrix: Tensor, outputs: int, kind: int | str) -> Tensor:
    size, inputs, device = matrix.shape[0], x.shape[-1], x.device
    blocks = -(-inputs // size)
    padded = torch.unflatten(_repeat(x, blocks * size), -1, (blocks, size))  # x̃, in blocks of r̂
    with torch.autocast(device.type, enabled=False):
        if kind in (6, "decoupling"):
            turned = padded
            if kind == 6:
                turned = _rotate(padded, rotation_table(size, blocks, device, x.dtype))
            return _repeat((turned @ matrix.t()).flatten(-2), outputs)
        if kind == "truncation":
            z = torch.nn.functional.pad(x[..., :size], (0, max(0, size - inputs)))
            return torch.nn.functional.pad((z @ matrix.t())[..., :outputs], (0, max(0, outputs - size)))
        if kind in (1, 4):
            z = padded.sum(-2)
        else:
            z = x.new_zeros(*x.shape[:-1], size).index_add(-1, group_of(inputs, size, device), x)
        u = z @ matrix.t()
        return _repeat(u, outputs) if kind in (1, 3) else u[..., group_of(outputs, size, device)]


def _mora_operands(x: Tensor, matrix: Tensor, mora_type: int | str) -> tuple[Tensor, Tensor, int | str]:
    kind = mora_kind(mora_type)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.shape[0]:
        raise ValueError(f"matrix: expected shape [r̂, r̂], r̂ ≥ 1, got shape {list(matrix.shape)}")
    if kind == 6 and matrix.shape[0] % 2:
        raise ValueError(f"matrix: expected an even size for mora_type 6, got {matrix.shape[0]}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(dtype), matrix.to(dtype), kind


def mora(x: Tensor, matrix: Tensor, out_features: int, mora_type: int | str = 1) -> Tensor:
    """Y = decompress(compress(X) Mᵀ). x [..., I], matrix [r̂, r̂] → [..., O] of x's dtype (or autocast's).

    With n = ⌈I / r̂⌉ and x̃ = x repeated up to n r̂ columns, x̃[p] = x[p mod I]; g cuts columns into r̂
    contiguous groups (`group_of`); u = z Mᵀ:

        1 "sharing"     z[q] = Σ x̃[p], p mod r̂ = q          y[i] = u[i mod r̂]
        2               z[q] = Σ x[j], g(j) = q              y[i] = u[g(i)]
        3               z as in 2                            y as in 1
        4               z as in 1                            y as in 2
        6 "rotation"    x̃ in n blocks of r̂; block b turned by φ[b, j] = b · 10000^(-2j / r̂), halves against
                        each other; each times Mᵀ; the n r̂ results in a row, Y: y[i] = Y[i mod n r̂]
        "decoupling"    6 with nothing turned
        "truncation"    z = the first r̂ columns of x         y = u in the first r̂ columns, then zeros

    Raises ValueError for another type, a matrix that is not square, an odd size for type 6.
    """
    x = _autocast(x)
    wide, square, kind = _mora_operands(x, matrix, mora_type)
    return _mora(wide, square, out_features, kind).to(x.dtype)


def mora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    matrix: Tensor,
    mora_type: int | str = 1,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Y = X Wᵀ + scaling · mora(X) + b. x [..., K], weight [N, K], matrix [r̂, r̂], bias [N] → [..., N]."""
    x = _autocast(x)
    wide, square, kind = _mora_operands(x, matrix, mora_type)
    base = matmul(wide, weight, bias=bias)
    return (base + float(scaling) * _mora(wide, square, weight.shape[0], kind)).to(x.dtype)


def mora_delta(matrix: Tensor, in_features: int, out_features: int, mora_type: int | str = 1) -> Tensor:
    """ΔW [O, I] with mora(x) = x ΔWᵀ, in matrix's dtype: what mora makes of the identity's rows."""
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    eye = torch.eye(in_features, dtype=dtype, device=matrix.device)
    _, square, kind = _mora_operands(eye, matrix, mora_type)
    return _mora(eye, square, out_features, kind).t().contiguous().to(matrix.dtype)


# ---- seeded dropout


def draw_seed(device: torch.device | str | None = None) -> Tensor:
    """An int64 scalar tensor from torch's generator of the device: torch.manual_seed repeats it."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=device)


def _mix(x: Tensor) -> Tensor:
    # int64 lanes hold uint32 values; an int64 product wraps, and its low 32 bits are right all the same
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _UINT32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)


def keep_threshold(p: float) -> int:
    """How many of the 2^32 hash values are kept: round((1 - p) 2^32)."""
    return round((1.0 - p) * 2.0**32)


def adapter_scale(scaling: float, p: float) -> float:
    """s / (1 - p), 0 where nothing is kept: dropout's scale rides along with the adapter's, so that the mask
    itself rounds nothing."""
    if p == 0.0:
        return scaling
    return scaling / (1.0 - p) if keep_threshold(p) else 0.0


def dropout_mask(
    seed: int | Tensor, shape: Sequence[int], p: float, device: torch.device | str | None = None
) -> Tensor:
    """bool of `shape`: True keeps the element, with probability 1 - p. Depends on the seed and the row-major
    index alone.

    seed: any 64-bit integer, or an int64 scalar tensor. For x [M, K] the index is i = m K + k, in 64 bits.
    Every operation is on unsigned 32-bit integers that wrap; seed_lo, i_lo are the low and seed_hi, i_hi the
    high halves (two's complement):

        mix(x):  x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16
        k0   = mix(seed_lo + mix(seed_hi + 0x9E3779B9))
        k1   = mix(k0 + i_hi + 0x85EBCA6B)
        h    = mix(mix(i_lo ^ k0) + k1)
        keep = h < round((1 - p) 2^32)          compared as 64-bit numbers: p = 0 keeps all, p = 1 none

    mix is a bijection with good avalanche ("lowbias32" of C. Wellons' hash-prospector, public domain). There
    are two rounds with two keys because one round, mix(i + key), would give any two seeds shifted copies of
    one sequence.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    k0 = _mix(((seed & _UINT32) + _mix(((seed >> 32 & _UINT32) + 0x9E3779B9) & _UINT32)) & _UINT32)
    index = torch.arange(math.prod(shape), dtype=torch.int64, device=seed.device)
    k1 = _mix((k0 + (index >> 32) + 0x85EBCA6B) & _UINT32)
    h = _mix((_mix((index & _UINT32) ^ k0) + k1) & _UINT32)
    return (h < keep_threshold(p)).view(tuple(shape))
