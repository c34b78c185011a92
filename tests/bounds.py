"""How far a result may lie from the exact one: derived once, used by every test.

The exact result is the fp64 value of the formula on the given inputs, with W the fp32 numbers code · absmax
of a 4-bit weight. An `Approx` carries that value, a bound on the error of a correct implementation that holds
for every input and every order of summation (`error`), and the size that the error has when roundings are
independent (`typical`, a root mean square). A test passes when

    |actual - value| <= error                                 everywhere
    mean |actual - value| <= mean typical · (1 + 5 / √count)    for inputs of mixed signs

u is the unit roundoff: fp32 2^-24, fp16 2^-11, bf16 2^-8. Rounding v costs at most u|v|, and u|v|/√3 in root
mean square (an error uniform in ±u|v|). The mean of |e| is at most its root mean square (for a normal e it is
0.8 of it, which leaves 25 %); the 5 / √count is seven standard deviations (0.6 of the root mean square each)
of a mean over count elements, less that margin (where elements share errors, count is how many do not).

What a correct kernel may do, and nothing more:

- operands: brought to the compute type, bf16 for bf16 x and fp32 for fp32 and fp16 x, but fp16 for fp16 x on
  a GPU, whose tensor cores multiply it by its like. A 4-bit weight is the fp32 product code · absmax,
  rounded to the compute type; or the rounded code with absmax folded in
  afterwards, which costs two more fp32 roundings;
- sums: fp32, in any order, fused or not: n terms cost at most γ_n = n u / (1 - n u) of Σ|terms| (Higham,
  Accuracy and Stability of Numerical Algorithms, §3.1); typically √n u/√3 of the partial sums, which for
  mixed signs are about (Σ terms²)^½;
- one rounding to the output's dtype; the rank-R products T and G are outputs of x's dtype, so their error
  travels on;
- MoRA: z = compress(x) and g = compress(dY) are fp32 sums of x's columns (in type 6 rotated in fp32 by a
  table of fp32 cosines and sines), rounded to x's dtype, so their error travels on; z Mᵀ and g M are outputs
  of fp32, and enter the base product's sum as they are;
- MoRA of several blocks on triton: M instead of x is turned back for each block, in fp32, and rounded to the
  compute type; of dM the products of dY and x̃ are turned, in fp32, and neither is rounded before;
- values below fp32's smallest normal 2^-126 may be flushed to zero (AVX512_BF16 and AMX do so).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftkern import QuantizedWeight, dispatch, reference

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
# half the spacing of the smallest numbers, or what may be flushed
SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25, torch.float64: 0.0}
FLUSHED = 2.0**-126
U32 = UNIT[torch.float32]


@dataclass(frozen=True)
class Approx:
    value: Tensor  # fp64, exact
    error: Tensor  # fp64, at most
    typical: Tensor  # fp64, root mean square
    count: int = 0  # how many errors are independent; 0: as many as elements

    def t(self) -> Approx:
        return Approx(self.value.t(), self.error.t(), self.typical.t())

    def times(self, mask: Tensor | float) -> Approx:
        """By zeros and ones."""
        return Approx(self.value * mask, self.error * mask, self.typical * mask)

    def plus(self, relative: float, absolute: float = 0.0) -> Approx:
        """One more rounding."""
        size = self.value.abs() + self.error
        return Approx(
            self.value,
            self.error + relative * size + absolute,
            (self.typical.square() + (relative * size).square() / 3.0 + absolute**2).sqrt(),
        )

    def rounded(self, dtype: torch.dtype) -> Approx:
        return self.plus(UNIT[dtype], SMALLEST[dtype])


def exact(tensor: Tensor) -> Approx:
    value = tensor.detach().double()
    return Approx(value, torch.zeros_like(value), torch.zeros_like(value))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.float16 and dispatch.forced_backend() == "triton":
        return torch.float16
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def operand(tensor: Tensor | QuantizedWeight, compute: torch.dtype) -> Approx:
    """A matrix as the kernel multiplies it."""
    if isinstance(tensor, QuantizedWeight):
        value = exact(reference.dequantize_4bit(tensor, torch.float32)).plus(2.0 * U32)
        return value if compute is torch.float32 else value.rounded(compute)
    fits = tensor.dtype == compute or (
        compute == torch.float32 and tensor.dtype in (torch.bfloat16, torch.float16)
    )
    return exact(tensor) if fits else exact(tensor).rounded(compute)


def matmul(
    x: Approx,
    w: Approx,
    dtype: torch.dtype,
    alpha: float = 1.0,
    t: Approx | None = None,
    u: Approx | None = None,
    bias: Approx | None = None,
    addend: Approx | None = None,
) -> Approx:
    """alpha (x wᵀ + t uᵀ) + bias + addend, rounded to dtype. x [M, K], w [N, K], t [M, R], u [N, R], bias
    [N], addend [M, N]."""
    pairs = [(x, w)] if t is None or u is None else [(x, w), (t, u)]
    # alpha and its conversion to fp32, bias, addend
    count = sum(a.value.shape[1] for a, _ in pairs) + 3 + (addend is not None)
    gamma = count * U32 / (1.0 - count * U32)
    value = torch.zeros((), dtype=torch.float64)
    error, typical, squares, flushed = value, value, value, value
    for a, b in pairs:
        size_a, size_b = a.value.abs() + a.error, b.value.abs() + b.error
        value = value + a.value @ b.value.t()
        error = error + a.error @ b.value.abs().t() + size_a @ b.error.t() + gamma * (size_a @ size_b.t())
        square_a, square_b = a.value.square(), b.value.square()
        typical = typical + a.typical.square() @ square_b.t() + square_a @ b.typical.square().t()
        squares = squares + square_a @ square_b.t()
        flushed = flushed + size_a.sum(1, keepdim=True) + size_b.sum(1) + count
    error = abs(alpha) * (error + FLUSHED * flushed)
    typical = alpha**2 * (typical + count * U32**2 / 3.0 * torch.maximum(squares, value.square()))
    value = alpha * value
    for part in (bias, addend):
        if part is not None:
            error = error + part.error + gamma * (part.value.abs() + part.error)
            typical = typical + part.typical.square() + U32**2 * part.value.square()
            value = value + part.value
    return Approx(value, error, typical.sqrt()).rounded(dtype)


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    grad: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> dict[str, Approx]:
    """linear_4bit (no lora_A) and lora_linear: "y", and with grad = dL/dY also "x", "lora_A", "lora_B",
    "bias" where they are there.

    x [M, K], weight [N, K], bias [N], grad [M, N], lora_A [R, K], lora_B [N, R], mask [M, K] (True keeps).
    """
    dtype, compute = x.dtype, compute_dtype(x.dtype)
    X, W = operand(x, compute), operand(weight, compute)
    b = None if bias is None else exact(bias)
    T = G = A = B = None
    keep = 1.0 if mask is None else mask.double()
    dropped, alpha = X.times(keep), scaling / (1.0 - dropout)  # the mask rounds nothing
    if lora_A is not None and lora_B is not None:
        A, B = operand(lora_A, compute), operand(lora_B, compute)
        T = matmul(dropped, A, dtype, alpha)
    y = matmul(X, W, dtype, 1.0, T, B, b)
    if isinstance(weight, Tensor) and (T is not None or b is not None):
        # the addend T Bᵀ + b is rounded to x's dtype before torch's GEMM adds to it
        addend = torch.zeros_like(y.value) if T is None or B is None else T.value @ B.value.t()
        addend = addend if b is None else addend + b.value
        y = _also(y, addend, dtype)
    found = {"y": y}
    if grad is None:
        return found

    D = operand(grad, compute)
    if A is not None and B is not None and T is not None and lora_A is not None and lora_B is not None:
        G = matmul(D, B.t(), dtype, alpha)
        found["lora_A"] = matmul(G.t(), dropped.t(), lora_A.dtype)
        found["lora_B"] = matmul(D.t(), T.t(), lora_B.dtype)
    if G is None or A is None:
        dx = matmul(D, W.t(), dtype)
    elif mask is None:
        dx = matmul(D, W.t(), dtype, 1.0, G, A.t())
    else:
        # the mask falls between the adapter's sum, in fp32, and the frozen one
        dx = matmul(D, W.t(), dtype, addend=matmul(G, A.t(), torch.float32).times(keep))
    if isinstance(weight, Tensor) and G is not None and A is not None:
        dx = _also(dx, G.value @ A.value * keep, dtype)
    found["x"] = dx
    if bias is not None:
        found["bias"] = column_sums(grad, bias.dtype)
    return found


# ---- MoRA


def groups(columns: int, count: int) -> Tensor:
    """[count, columns] of 0 and 1: contiguous groups, the first columns % count hold one column more."""
    found = torch.zeros(count, columns, dtype=torch.float64)
    start = 0
    for group in range(count):
        size = columns // count + (group < columns % count)
        found[group, start : start + size] = 1.0
        start += size
    return found


def cycles(columns: int, count: int, length: int) -> Tensor:
    """[count, columns] of 0 and 1: p = 0 … length - 1 relates p mod count and p mod columns."""
    found = torch.zeros(count, columns, dtype=torch.float64)
    for p in range(length):
        found[p % count, p % columns] = 1.0
    return found


def mora_maps(
    columns: int, outputs: int, rank: int, mora_type: int | str
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """What the paper does to x and to the outputs, as matrices: compress [P, I], decompress [O, P], and the
    (cos, sin) [P] of type 6; P is r̂, or r̂ for each of the ceil(I / r̂) blocks."""
    blocks = -(-columns // rank)
    padded = blocks * rank
    if mora_type in (6, "rotation", "decoupling"):
        turns = None
        if mora_type != "decoupling":
            angle = torch.arange(blocks, dtype=torch.float64)[:, None] * torch.tensor(
                [10000.0 ** (-2.0 * j / rank) for j in range(rank // 2)], dtype=torch.float64
            ).repeat(2)
            turns = angle.cos().flatten(), angle.sin().flatten()
        return cycles(columns, padded, padded), cycles(outputs, padded, outputs).t(), turns
    if mora_type == "truncation":
        heads = cycles(columns, rank, min(columns, rank)), cycles(outputs, rank, min(outputs, rank)).t()
        return *heads, None
    strided = mora_type in (1, "sharing", 4)
    tiled = mora_type in (1, "sharing", 3)
    compress = cycles(columns, rank, padded) if strided else groups(columns, rank)
    decompress = cycles(outputs, rank, outputs) if tiled else groups(outputs, rank)
    return compress, decompress.t(), None


def gathered(a: Approx, related: Tensor) -> Approx:
    """Sums of columns in fp32: a [M, C], related [outputs, C] of 0 and 1 → [M, outputs]."""
    added = (related.sum(1) - 1.0).clamp(min=0.0)  # one term is a copy
    gamma = added * U32 / (1.0 - added * U32)
    size = (a.value.abs() + a.error) @ related.t()
    squares = a.value.square() @ related.t()
    typical = a.typical.square() @ related.t() + added * U32**2 / 3.0 * squares
    return Approx(a.value @ related.t(), a.error @ related.t() + gamma * size, typical.sqrt())


def rotated(a: Approx, rank: int, turns: tuple[Tensor, Tensor], inverse: bool = False) -> Approx:
    """Each pair (j, j + r̂/2) of each block turned by its angle: a cos ∓ a' sin. Four fp32 roundings: of the
    table, of both products, of the sum."""

    def swapped(tensor: Tensor) -> Tensor:
        return tensor.view(len(tensor), len(turns[0]) // rank, 2, rank // 2).flip(2).reshape(tensor.shape)

    cos, sin = turns
    sign = torch.ones(2, rank // 2, dtype=torch.float64)
    sign[0] = -1.0
    turn = sin * (sign if not inverse else -sign).flatten().repeat(len(sin) // rank)
    one, other = a.value * cos, swapped(a.value) * turn
    size = one.abs() + other.abs() + a.error * cos.abs() + swapped(a.error) * sin.abs()
    error = a.error * cos.abs() + swapped(a.error) * sin.abs() + 3.0 * (1.0 + 4.0 * U32) * U32 * size
    typical = a.typical.square() * cos.square() + swapped(a.typical).square() * sin.square()
    typical = typical + U32**2 * (one.square() + other.square())
    return Approx(one + other, error + 2.0 * FLUSHED, typical.sqrt())


def turned_grad(
    grad: Tensor, x: Tensor, rank: int, turns: tuple[Tensor, Tensor] | None, columns: int, scaling: float
) -> Approx:
    """dM of several blocks on triton, in fp32: r̂ columns of dY with the block of x̃ that they meet, turned.

    A term g x cos is rounded in its product, by at most M - 1 sums over the rows, by the turn's table,
    product and sum, by one sum for each part of the rows of each r̂ columns, and twice by scaling; where
    nothing is turned, one program may add up all rows of all blocks. The sizes are those of the terms,
    because parts are turned before they are added up.
    """
    (M, outputs), blocks = grad.shape, -(-grad.shape[1] // rank)
    D = torch.nn.functional.pad(grad.double(), (0, blocks * rank - outputs)).view(M, blocks, rank)
    x = x.double()[:, torch.arange(columns, device=x.device) % x.shape[1]]
    X = x.view(M, columns // rank, rank)[:, torch.arange(blocks, device=x.device) % (columns // rank)]
    cos, sin = torch.ones(columns, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64)
    cos, sin = (cos, sin) if turns is None else turns
    at = torch.arange(blocks) % (columns // rank)
    c, s = (part.view(columns // rank, 1, rank)[at] for part in (cos, sin))

    def product(power: float) -> tuple[Tensor, Tensor]:
        """Of the operands' powers, and with the halves swapped: [block, r̂, r̂]."""
        P = torch.einsum("mbi,mbj->bij", D.abs() ** power, X.abs() ** power)
        return P, P.roll(rank // 2, 2)

    one = torch.einsum("mbi,mbj->bij", D, X)
    sign = torch.ones(rank, dtype=torch.float64)
    sign[: rank // 2] = -1.0
    value = scaling * (one * c + one.roll(rank // 2, 2) * sign * s).sum(0)
    size, squares = (
        (P * c.abs() ** power + swapped * s.abs() ** power).sum(0)
        for power in (1.0, 2.0)
        for P, swapped in (product(power),)
    )
    parts = -(-M // 256)  # each of so many rows at least
    count = 5 + (M * blocks if turns is None else M + blocks * parts)
    gamma = count * U32 / (1.0 - count * U32)
    flushed = FLUSHED * (D.abs().sum((0, 1)).unsqueeze(1) + X.abs().sum((0, 1)) + count * blocks)
    error = abs(scaling) * (gamma * size + 2.0 * flushed)
    typical = count * U32**2 / 3.0 * torch.maximum(scaling**2 * squares, value.square())
    return Approx(value, error, typical.sqrt())


def mora(
    x: Tensor,
    matrix: Tensor,
    mora_type: int | str,
    outputs: int,
    weight: Tensor | QuantizedWeight | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    grad: Tensor | None = None,
) -> dict[str, Approx]:
    """mora (no weight) and mora_linear: "y", and with grad = dL/dY also "x", "matrix", "bias" where there is
    one, "weight" where it is dense. x [M, I], matrix [r̂, r̂], weight [O, I], bias [O], grad [M, O].

    The errors of z travel to every output made of it: only as many are independent as the middle has columns.
    """
    dtype, compute = x.dtype, compute_dtype(x.dtype)
    rank = matrix.shape[0]
    compress, decompress, turns = mora_maps(x.shape[-1], outputs, rank, mora_type)
    middle = compress.shape[0]

    def rounded(a: Approx, related: Tensor) -> Approx:
        copied = (related.sum(1) <= 1.0) & (turns is None or related is not compress)
        b = a.rounded(dtype)  # a copy of one column needs no rounding
        return Approx(
            a.value, torch.where(copied, a.error, b.error), torch.where(copied, a.typical, b.typical)
        )

    def blocks(a: Approx) -> Approx:
        count = a.value.shape[0] * middle // rank
        return Approx(*(part.reshape(count, rank) for part in (a.value, a.error, a.typical)))

    def rows(a: Approx) -> Approx:
        return Approx(*(part.view(x.shape[0], middle) for part in (a.value, a.error, a.typical)))

    def turned_product(a: Approx, adjoint: bool) -> Approx:
        """Each block of a times the matrix turned for it, or its adjoint."""
        count = middle // rank
        u = exact(matrix.double().repeat(1, count))
        u = u if turns is None else rotated(u, rank, turns, inverse=True)
        u = u.rounded(compute)

        def block(m: Approx, b: int) -> Approx:
            return Approx(*(part[:, b * rank : (b + 1) * rank] for part in (m.value, m.error, m.typical)))

        squares = [block(u, b).t() if adjoint else block(u, b) for b in range(count)]
        found = [matmul(block(a, b), square, torch.float32, scaling) for b, square in enumerate(squares)]
        return Approx(
            torch.cat([f.value for f in found], 1),
            torch.cat([f.error for f in found], 1),
            torch.cat([f.typical for f in found], 1),
        )

    def total(a: Approx, w: Approx | None, b: Approx | None, addend: Approx) -> Approx:
        if w is None:
            return addend.rounded(dtype)
        y = matmul(a, w, dtype, bias=b, addend=addend)
        if isinstance(weight, Tensor):  # torch's GEMM adds onto the addend, rounded to x's dtype
            y = _also(y, addend.value if b is None else addend.value + b.value, dtype)
        return y

    X, W = operand(x, compute), None if weight is None else operand(weight, compute)
    square, b = operand(matrix, compute), None if bias is None else exact(bias)
    unturned = gathered(X, compress)
    z = rounded(unturned if turns is None else rotated(unturned, rank, turns), compress)
    turns_matrix = middle > rank and dispatch.forced_backend() == "triton"
    if turns_matrix:
        v = turned_product(unturned, False)
    else:
        v = rows(matmul(blocks(z), square, torch.float32, scaling))
    y = total(X, W, b, gathered(v, decompress))
    found = {"y": replace(y, count=x.shape[0] * min(middle, outputs))}
    if grad is None:
        return found

    D = operand(grad, compute)
    g = rounded(gathered(D, decompress.t()), decompress.t())
    if turns_matrix:
        dM = turned_grad(grad, x, rank, turns, middle, scaling).rounded(matrix.dtype)
    else:
        dM = matmul(blocks(g).t(), blocks(z).t(), matrix.dtype, scaling)
    found["matrix"] = replace(dM, count=min(rank * rank, x.shape[0] * middle))
    if turns_matrix:
        v = turned_product(g, True)
    else:
        v = rows(matmul(blocks(g), square.t(), torch.float32, scaling))
        v = v if turns is None else rotated(v, rank, turns, inverse=True)
    dx = total(D, None if W is None else W.t(), None, gathered(v, compress.t()))
    found["x"] = replace(dx, count=x.shape[0] * min(middle, x.shape[-1]))
    if bias is not None:
        found["bias"] = column_sums(grad, bias.dtype)
    if isinstance(weight, Tensor):
        found["weight"] = matmul(D.t(), X.t(), dtype)
    return found


def column_sums(grad: Tensor, dtype: torch.dtype) -> Approx:
    ones = exact(torch.ones(1, grad.shape[0], dtype=torch.float64, device=grad.device))
    found = matmul(ones, exact(grad).t(), dtype)
    return Approx(found.value[0], found.error[0], found.typical[0])


# ---- merging


def merged(weight: Tensor | QuantizedWeight, delta: Approx) -> Approx:
    """W + ΔW as merge gives it: the fp32 sum, rounded to W's dtype, and quantized again where W is 4-bit.

    A code is the nearest one, so it errs by half a gap between neighbouring codes, times the block's absmax.
    A nested absmax errs by half a gap of its 8-bit code (0.9 / 64, and bins of 2^-15: formats.DYNAMIC_CODE),
    times the largest |absmax - offset| of its 256 blocks. delta [N, K].
    """
    values = weight if isinstance(weight, Tensor) else reference.dequantize_4bit(weight, torch.float32)
    total = Approx(exact(values).value + delta.value, delta.error, delta.typical)
    total = total.plus(U32).rounded(weight.dtype)
    if isinstance(weight, Tensor):
        return total
    numel = total.value.numel()
    pad = -numel % weight.blocksize
    size = torch.nn.functional.pad((total.value.abs() + total.error).flatten(), (0, pad))
    absmax = size.view(-1, weight.blocksize).amax(1)
    # the widest gap: -1 to -0.6962 of NF4, 2/3 to 1 of FP4
    error = {"nf4": 0.15191, "fp4": 0.16667}[weight.quant_type] * absmax
    if weight.nested is not None:
        centred = (absmax - absmax.mean()).abs() + 2.0 * total.error.max()
        groups = torch.nn.functional.pad(centred, (0, -absmax.numel() % 256)).view(-1, 256).amax(1)
        error = error + (0.9 / 128 + 2.0**-16) * groups.repeat_interleave(256)[: absmax.numel()]
    error = (error * (1 + 8 * U32)).repeat_interleave(weight.blocksize)[:numel].view(total.value.shape)
    return Approx(total.value, total.error + error, (total.typical.square() + error.square() / 3.0).sqrt())


def _also(result: Approx, part: Tensor, dtype: torch.dtype) -> Approx:
    """One more rounding, of a part of the sum."""
    unit = UNIT[dtype]
    return Approx(
        result.value,
        result.error + unit * part.abs() + SMALLEST[dtype],
        (result.typical.square() + (unit * part).square() / 3.0).sqrt(),
    )


def check(name: str, actual: Tensor, expected: Approx, mean: bool = True) -> None:
    """Assert both bounds; mean=False where roundings are not independent (constant or one-signed inputs)."""
    assert actual.shape == expected.value.shape, (
        f"{name}: shape {list(actual.shape)}, not {list(expected.value.shape)}"
    )
    if actual.numel() == 0:
        return
    distance = (actual.detach().double() - expected.value).abs()
    # NaN fails: it is not <= anything
    within = distance <= expected.error
    if not bool(within.all()):
        ratio = torch.where(within, 0.0, (distance / expected.error).nan_to_num(math.inf, math.inf))
        where = int(ratio.argmax())
        raise AssertionError(
            f"{name}: {int((~within).sum())} of {within.numel()} elements beyond their bound; the worst, "
            f"at flat index {where}, is {actual.flatten()[where].item():.9g}, exactly "
            f"{expected.value.flatten()[where].item():.9g} ± "
            f"{expected.error.flatten()[where].item():.3g} ({ratio.max().item():.3g} of the bound)"
        )
    if mean:
        limit = expected.typical.mean().item() * (1.0 + 5.0 / math.sqrt(expected.count or distance.numel()))
        assert distance.mean().item() <= limit, (
            f"{name}: mean error {distance.mean().item():.3g}, expected <= {limit:.3g}"
        )
