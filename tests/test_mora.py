"""MoRA: the truth entry by entry from the paper's formulas; values, every gradient by name, and merging."""

from __future__ import annotations

import math
from collections.abc import Iterator

import bounds
import pytest
import torch
from cases import (
    DTYPES,
    MORA_SHAPES,
    MORA_TYPES,
    MoraCase,
    fitting,
    mora_cases,
    mora_operands,
    mora_size,
    unbatched,
)
from cases import mora_base as base
from cases import mora_inputs as make
from cases import mora_run as run
from cases import mora_step as step
from hypothesis import given, settings
from torch import Tensor

import peftkern
from peftkern import QuantizedWeight, merge, mora, mora_delta, mora_linear, mora_rank, reference
from peftkern.backends import cpu
from peftkern.backends import mora as composed

TYPES = pytest.mark.parametrize("mora_type", MORA_TYPES)
SHAPES = pytest.mark.parametrize("shape", MORA_SHAPES)
# the identity's K and N rows pass through these
SHAPES_OF_ROWS = pytest.mark.parametrize(
    "shape", fitting(MORA_SHAPES, tuple(shape for shape in MORA_SHAPES if max(shape) <= 33))
)
SHARING = (1, 2, 3, 4, "truncation")  # one block in the middle: ΔW's rank is at most r̂


# ---- the truth


def group(column: int, columns: int, groups: int) -> int:
    """g: the first columns % groups of the contiguous groups hold one column more."""
    start = 0
    for g in range(groups):
        start += columns // groups + (1 if g < columns % groups else 0)
        if column < start:
            return g
    raise AssertionError


def entries(matrix: Tensor, K: int, N: int, mora_type: int | str, size: bool = False) -> Tensor:
    """ΔW [N, K] in fp64, entry by entry: x̃[p] = x[p mod K] for p < n r̂, so that M[·, p mod r̂] falls on
    column p mod K; the wrap-around goes on for as long as p does. size: the sum of the terms' sizes."""
    M, r = matrix.double().tolist(), matrix.shape[0]
    n = -(-K // r)
    delta = [[0.0] * K for _ in range(N)]

    def add(i: int, j: int, term: float) -> None:
        delta[i][j] += abs(term) if size else term

    for i in range(N):
        if mora_type in (1, "sharing"):  # y[i] = u[i mod r̂], z[q] = Σ x̃[p], p ≡ q
            for p in range(n * r):
                add(i, p % K, M[i % r][p % r])
        elif mora_type == 2:  # y[i] = u[g(i)], z[q] = Σ x[j], g(j) = q
            for j in range(K):
                add(i, j, M[group(i, N, r)][group(j, K, r)])
        elif mora_type == 3:
            for j in range(K):
                add(i, j, M[i % r][group(j, K, r)])
        elif mora_type == 4:
            for p in range(n * r):
                add(i, p % K, M[group(i, N, r)][p % r])
        elif mora_type in (6, "rotation"):
            block, k = divmod(i % (n * r), r)  # y[i] = Y[i mod L], L = n r̂
            h = r // 2
            for j in range(h):
                phi = block * 10000.0 ** (-2 * j / r)
                one, two = (block * r + j) % K, (block * r + j + h) % K  # X[b, j] and X[b, j + h]
                add(i, one, M[k][j] * math.cos(phi))  # a[b, j] = X[b, j] cos φ - X[b, j + h] sin φ
                add(i, two, -M[k][j] * math.sin(phi))
                add(i, two, M[k][j + h] * math.cos(phi))  # a[b, j + h] = X[b, j + h] cos φ + X[b, j] sin φ
                add(i, one, M[k][j + h] * math.sin(phi))
        elif mora_type == "decoupling":
            block, k = divmod(i % (n * r), r)
            for q in range(r):
                add(i, (block * r + q) % K, M[k][q])
        elif mora_type == "truncation":
            for j in range(min(K, r)):
                if i < r:
                    add(i, j, M[i][j])
        else:
            raise AssertionError(mora_type)
    return torch.tensor(delta, dtype=torch.float64).view(N, K)


def square(shape: tuple[int, int, int], mora_type: int | str, whole: bool = False) -> Tensor:
    """M, of whole numbers if asked: their sums are exact in every dtype."""
    size = mora_size(shape[2], mora_type)
    return torch.randint(-8, 9, (size, size)).float() if whole else torch.randn(size, size)


@SHAPES
def test_the_entries_are_those_of_the_papers_code(shape: tuple[int, int, int]) -> None:
    """Where the original runs (r̂ <= 2 K), its closed forms with one wrap; truncation's holds everywhere."""
    K, N, r = shape
    matrix = torch.randn(r, r, dtype=torch.float64)
    pad = -(-K // r) * r - K
    sharing, truncation = (entries(matrix, K, N, kind).tolist() for kind in (1, "truncation"))
    M = matrix.tolist()
    for i in range(N):
        for j in range(K):
            if r <= 2 * K:
                wrapped = M[i % r][(K + j) % r] if j < pad else 0.0
                assert sharing[i][j] == M[i % r][j % r] + wrapped
            assert truncation[i][j] == (M[i][j] if i < r and j < r else 0.0)


@TYPES
@SHAPES
def test_the_bounds_start_from_the_same_matrix(shape: tuple[int, int, int], mora_type: int | str) -> None:
    """bounds.mora's exact value, made of compression, rotation, products and spreading, is X ΔWᵀ."""
    K, N, _ = shape
    M = square(shape, mora_type)
    found = bounds.mora(torch.eye(K), M, mora_type, N)["y"].value.t()
    # at most two roundings of each term, in fp64
    assert bool(
        ((found - entries(M, K, N, mora_type)).abs() <= 1e-15 * entries(M, K, N, mora_type, True)).all()
    )


@TYPES
@SHAPES
def test_the_reference_applies_the_truth(shape: tuple[int, int, int], mora_type: int | str) -> None:
    """mora and mora_linear in fp64 are X ΔWᵀ, and X (W + s ΔW)ᵀ + b; gradcheck confirms every derivative."""
    K, N, _ = shape
    M = square(shape, mora_type).double()
    x, W, b = torch.randn(3, K).double(), torch.randn(N, K).double(), torch.randn(N).double()
    delta, size = entries(M, K, N, mora_type), entries(M, K, N, mora_type, True)
    # fp64's rounding of no more terms than these, three times each
    unit = (K + 2 * len(M) + 8) * 3 * 2.0**-53
    within = unit * (x.abs() @ size.t())
    assert bool(((reference.mora(x, M, N, mora_type) - x @ delta.t()).abs() <= within).all())
    assert bool(((reference.mora_delta(M, K, N, mora_type) - delta).abs() <= unit * size).all())
    y = reference.mora_linear(x, W, M, mora_type, -1.5, b)
    within = unit * (x.abs() @ (W.abs() + 1.5 * size).t() + b.abs())
    assert bool(((y - (x @ (W - 1.5 * delta).t() + b)).abs() <= within).all())
    if K * N * len(M) <= 1000:  # the others take seconds
        tensors = [tensor.requires_grad_() for tensor in (x, M, b)]
        assert torch.autograd.gradcheck(
            lambda x, M, b: reference.mora_linear(x, W, M, mora_type, -1.5, b), tensors
        )
        assert torch.autograd.gradcheck(lambda x, M: reference.mora(x, M, N, mora_type), (x, M))
        assert torch.autograd.gradcheck(lambda M: reference.mora_delta(M, K, N, mora_type), M)


@pytest.mark.parametrize("name", ["sharing", "rotation", "truncation", "decoupling"])
def test_names(name: str) -> None:
    """The paper's names: the bits of the number, where there is one."""
    x, M = torch.randn(4, 20), torch.randn(6, 6)
    number = {"sharing": 1, "rotation": 6}.get(name, name)
    assert torch.equal(mora(x, M, 30, name), mora(x, M, 30, number))
    bounds.check("y", mora(x, M, 30, name), bounds.mora(x, M, number, 30)["y"])
    assert mora_rank(20, 30, 4, name) == mora_rank(20, 30, 4, number)


@pytest.mark.parametrize(("K", "N", "r", "mora_type", "expected"), [
    (4096, 4096, 8, 1, 256),
    (4096, 1024, 8, 1, 202),
    (4096, 11008, 8, 1, 348),
    (4096, 4096, 256, 1, 1448),
    (4096, 11008, 8, 2, 348),
    (4096, 11008, 8, "truncation", 348),
    (4096, 4096, 8, 6, 256),
    (100, 101, 1, 1, 14),  # √201 = 14.18
    (110, 101, 1, 1, 15),  # √211 = 14.53, rounded up
    (110, 101, 1, "decoupling", 15),
    (110, 101, 1, 6, 14),  # and down to an even number
    (110, 101, 1, "rotation", 14),
    (1, 1, 1, 1, 1),  # √2
    (1, 1, 1, 6, 2),  # at least 2
])  # fmt: skip
def test_rank(K: int, N: int, r: int, mora_type: int | str, expected: int) -> None:
    assert mora_rank(K, N, r, mora_type) == reference.mora_rank(K, N, r, mora_type) == expected


# ---- ΔW


@TYPES
@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
def test_delta(shape: tuple[int, int, int], mora_type: int | str, dtype: torch.dtype) -> None:
    """The truth, exactly, where its numbers are; type 6's cosines cost an fp32 rounding each."""
    K, N, _ = shape
    M = square(shape, mora_type, whole=True).to(dtype)
    for found in (mora_delta(M, K, N, mora_type), reference.mora_delta(M, K, N, mora_type)):
        truth, size = entries(M, K, N, mora_type), entries(M, K, N, mora_type, True)
        assert found.dtype == dtype
        assert found.is_contiguous()
        if mora_type == 6:
            # table, product, and at most as many sums as terms meet at an entry
            error = (3 + 2 * -(-len(M) // K)) * bounds.U32 * size
            off = torch.zeros_like(error)
            bounds.check("delta", found, bounds.Approx(truth, error, off).rounded(dtype), mean=False)
        else:
            assert torch.equal(found.double(), truth)


@TYPES
@SHAPES_OF_ROWS
def test_delta_is_what_is_applied(shape: tuple[int, int, int], mora_type: int | str, backend: str) -> None:
    """To the identity's rows forward, ΔWᵀ, and backward, ΔW: to the bit where no cosine is involved."""
    K, N, _ = shape
    M, x, grad = square(shape, mora_type, whole=True).requires_grad_(), torch.eye(K), torch.eye(N)
    y = mora(x, M, N, mora_type)
    bounds.check("y", y, bounds.mora(x, M, mora_type, N)["y"], mean=False)
    x = torch.zeros(N, K, requires_grad=True)
    (dx,) = torch.autograd.grad(mora(x, M, N, mora_type), x, grad)
    bounds.check("x", dx, bounds.mora(x, M, mora_type, N, grad=grad)["x"], mean=False)
    if mora_type != 6:
        delta = mora_delta(M, K, N, mora_type)
        assert torch.equal(y, delta.t())
        assert torch.equal(dx, delta)
    x, grad = torch.randn(3, K), torch.randn(3, N)
    (dM,) = torch.autograd.grad(mora(x, M, N, mora_type), M, grad)
    bounds.check("matrix", dM, bounds.mora(x, M, mora_type, N, grad=grad)["matrix"])


@TYPES
def test_rank_of_delta(mora_type: int | str) -> None:
    """At most r̂ where one vector passes through the middle; up to min(K, N) where each block has its own."""
    for K, N, r in ((24, 24, 4), (24, 36, 4), (36, 24, 4), (26, 20, 6), (5, 7, 10)):
        rank = int(torch.linalg.matrix_rank(mora_delta(torch.randn(r, r), K, N, mora_type).double()))
        if mora_type in SHARING:
            assert rank == min(r, K, N)
        else:
            assert rank == min(K, N)


@TYPES
def test_delta_has_derivatives_of_any_order(mora_type: int | str) -> None:
    """dM of Σ (G ∘ ΔW)³: by hand from ΔW's linearity, twice."""
    M, G = torch.randint(-3, 4, (4, 4)).float().requires_grad_(), torch.randint(-2, 3, (9, 13)).float()

    def loss(M: Tensor) -> Tensor:
        return (G * mora_delta(M, 13, 9, mora_type)).double().pow(3).sum()

    (first,) = torch.autograd.grad(loss(M), M, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), M)

    def derivatives(M: Tensor, G: Tensor, size: bool) -> tuple[Tensor, Tensor]:
        one_hot = torch.eye(16, dtype=torch.float64).view(16, 4, 4)
        basis = torch.stack([entries(hot, 13, 9, mora_type, size) for hot in one_hot])
        exact = (G * torch.einsum("p,poi->oi", M.double().flatten(), basis)).pow(3).sum()
        (first,) = torch.autograd.grad(exact, M, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), M)
        return first.detach(), second

    # whole numbers are exact. Type 6, in units of the terms' sizes, which are the derivatives of positive
    # operands: an entry times G has 4 roundings (table, product, sum, G), its square 8; then the cast to
    # fp32, G, table, product and at most 6 sums: 18, and as many again on the way back through that. The rest
    # up to 40 is for the roundings' products.
    error = 40 * bounds.U32 if mora_type == 6 else 0.0
    sizes = derivatives(M.detach().abs().requires_grad_(), G.abs(), True)
    for found, expected, terms in zip((first, second), derivatives(M, G, False), sizes, strict=True):
        assert bool(((found.double() - expected).abs() <= error * terms).all())


# ---- values and gradients


@settings(max_examples=40)
@given(case=mora_cases())
def test_values_and_gradients(case: MoraCase, backend: str) -> None:
    o = mora_operands(case)
    outputs, scaling = case.shape[1], 1.0 if o.weight is None else case.scaling
    inputs = {"x": o.x, "matrix": o.matrix}
    if o.bias is not None:
        inputs["bias"] = o.bias
    y = run(inputs, o.weight, case.mora_type, outputs, scaling)
    assert y.dtype == case.dtype
    assert y.is_contiguous()
    assert y.shape == (*o.x.shape[:-1], outputs)
    found = torch.autograd.grad(y, list(inputs.values()), o.grad.view(y.shape))
    expected = bounds.mora(
        unbatched(o.x), o.matrix, case.mora_type, outputs, o.weight, scaling, o.bias, o.grad
    )
    bounds.check("y", unbatched(y), expected["y"], case.independent)
    for (name, tensor), gradient in zip(inputs.items(), found, strict=True):
        assert gradient.dtype == tensor.dtype, name
        bounds.check(name, unbatched(gradient) if name == "x" else gradient, expected[name], case.independent)


BASES = pytest.mark.parametrize("kind", ["plain", "nested", "dense", "none"])


def each_way(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """More than 8 rows go through the base in blocks, and each of these through what is composed in parts, as
    1000 of a layer do. On the CPU then all through the composition, where that takes large matrices."""
    whole = composed.split
    monkeypatch.setattr(composed, "split", lambda rows, most: whole(rows, min(most, 8 if rows > 8 else 3)))
    yield
    if backend.startswith("cpu"):
        monkeypatch.setattr(cpu, "_in_one_pass", lambda rows, size: False)
        yield


@TYPES
@BASES
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_base_and_dtype(
    dtype: torch.dtype, kind: str, mora_type: int | str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it left to chance: 10 rows in two blocks of two parts, the last one ragged; odd columns."""
    K, N, r = 75, 34, 10
    o, weight, grad = make(10, dtype, K, N, r), base(kind, dtype, N, K), torch.randn(10, N).to(dtype)
    bias, scaling = (None, 1.0) if weight is None else (o["bias"], 0.75)
    expected = bounds.mora(o["x"], o["matrix"], mora_type, N, weight, scaling, bias, grad)
    for _ in each_way(backend, monkeypatch):
        for name, tensor in step(o, weight, mora_type, grad).items():
            bounds.check(name, tensor, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nested", "dense", "none"])
@pytest.mark.parametrize(
    ("M", "K", "N", "r", "mora_type"),
    [
        (300, 192, 330, 70, 1),
        (300, 330, 192, 70, 2),
        (40, 300, 500, 3, 2),
        (150, 449, 704, 33, 3),
        (150, 704, 449, 129, 4),
        (800, 200, 330, 32, 6),
        (1000, 330, 64, 20, 6),  # both row blocks and the last one ragged
        (500, 96, 300, 47, "decoupling"),
        (70, 300, 300, 128, "truncation"),
    ],
)
def test_more_than_a_kernel_takes_at_a_time(
    M: int,
    K: int,
    N: int,
    r: int,
    mora_type: int | str,
    kind: str,
    dtype: torch.dtype,
    isa: str,
) -> None:
    """Several blocks of rows, chunks of the contraction and panels of outputs, each with a ragged end: right,
    and the same bits from any number of threads and beside any other rows (with a dense W: torch's)."""
    o, weight = make(M, dtype, K, N, r), base(kind, dtype, N, K)
    grad = torch.randn(M, N).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = step(o, weight, mora_type, grad)
        bias, scaling = (None, 1.0) if weight is None else (o["bias"], 0.75)
        expected = bounds.mora(o["x"], o["matrix"], mora_type, N, weight, scaling, bias, grad)
        for name, tensor in first.items():
            bounds.check(name, tensor, expected[name])
        if kind == "dense":
            return
        torch.set_num_threads(3)
        for name, tensor in step(o, weight, mora_type, grad).items():
            assert torch.equal(tensor, first[name]), name
        kept = (torch.arange(M) % 37 == 2)[:, None]
        dirty = torch.where(kept, o["x"].detach(), torch.nan).requires_grad_()
        second = step({**o, "x": dirty}, weight, mora_type, torch.where(kept, grad, torch.inf))
        for name in ("y", "x"):
            assert torch.equal(second[name][kept[:, 0]], first[name][kept[:, 0]]), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("K", "N", "r", "mora_type"),
    [(1500, 1300, 600, 1), (1300, 1500, 600, 4), (1300, 700, 1100, 6), (100, 130, 700, 1), (150, 90, 600, 6)],
)
def test_a_wide_middle(K: int, N: int, r: int, mora_type: int | str, dtype: torch.dtype, isa: str) -> None:
    """More columns in a block than compress takes at a time, with x repeated within them or not."""
    o, grad = make(3, dtype, K, N, r), torch.randn(3, N).to(dtype)
    expected = bounds.mora(o["x"], o["matrix"], mora_type, N, grad=grad)
    for name, tensor in step(o, None, mora_type, grad).items():
        bounds.check(name, tensor, expected[name])


@pytest.mark.parametrize("mora_type", [6, "decoupling"])
def test_many_small_blocks(mora_type: int | str, backend: str) -> None:
    """n = 1500 blocks of 2: angles up to 1499 radians, whose cosines fp32 arithmetic would get wrong."""
    x, M, grad = (
        torch.randn(3, 3000, requires_grad=True),
        torch.randn(2, 2, requires_grad=True),
        torch.randn(3, 3100),
    )
    y = mora(x, M, 3100, mora_type)
    found = dict(zip(("x", "matrix"), torch.autograd.grad(y, (x, M), grad), strict=True))
    expected = bounds.mora(x, M, mora_type, 3100, grad=grad)
    for name, tensor in {"y": y, **found}.items():
        bounds.check(name, tensor, expected[name])


@TYPES
@pytest.mark.parametrize("dtype", DTYPES)
def test_trained_dense_weight(dtype: torch.dtype, mora_type: int | str, backend: str) -> None:
    """A dense W that asks for its gradient gets dW = dYᵀ X, and the others' bits stay what they are."""
    o = make(dtype=dtype)
    weight = base("dense", dtype)
    assert isinstance(weight, Tensor)
    grad = torch.randn(6, 56).to(dtype)
    expected = step(o, weight, mora_type, grad)
    found = step({**o, "weight": weight.requires_grad_()}, weight, mora_type, grad)
    bounds.check(
        "weight", found.pop("weight"), bounds.matmul(bounds.exact(grad).t(), bounds.exact(o["x"]).t(), dtype)
    )
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@TYPES
def test_the_zero_matrix_is_the_base_alone(mora_type: int | str, backend: str) -> None:
    """As an adapter starts: to the bit for a 4-bit weight; and scaling 0 gives dM = 0."""
    weight, x, b = base("plain"), torch.randn(5, 40), torch.randn(56)
    assert isinstance(weight, QuantizedWeight)
    y = mora_linear(x, weight, torch.zeros(10, 10), mora_type, 1.0, b)
    assert torch.equal(y, peftkern.linear_4bit(x, weight, b))
    o = make()
    found = step(o, weight, mora_type, torch.randn(6, 56), scaling=0.0)
    assert torch.equal(found["y"], peftkern.linear_4bit(o["x"], weight, o["bias"]))
    assert not bool(found["matrix"].any())


@TYPES
@BASES
def test_no_rows_and_batches(kind: str, mora_type: int | str, backend: str) -> None:
    """An empty batch gives zero gradients, not NaN; a batch of any shape is its rows, to the bit."""
    weight = base(kind)
    for shape in ((0, 40), (2, 0, 40)):
        o = {**make(), "x": torch.randn(shape, requires_grad=True)}
        found = step(o, weight, mora_type, torch.randn(*shape[:-1], 56))
        assert found["y"].shape == (*shape[:-1], 56)
        assert found["x"].shape == shape
        for name in found.keys() - {"y", "x"}:
            assert found[name].shape == o[name].shape, name
            assert not bool(found[name].any()), name
    o, grad = make(M=12), torch.randn(12, 56)
    flat = step(o, weight, mora_type, grad)
    for batch in ((3, 4), (2, 3, 2), (12, 1)):
        x = o["x"].detach().view(*batch, 40).requires_grad_()
        found = step({**o, "x": x}, weight, mora_type, grad.view(*batch, 56))
        assert found["y"].shape == (*batch, 56)
        assert found["x"].shape == x.shape
        for name, tensor in found.items():
            assert torch.equal(tensor.view(flat[name].shape), flat[name]), name
    row = {**o, "x": o["x"].detach()[0].requires_grad_()}
    assert torch.equal(
        step(row, weight, mora_type, grad[0])["y"],
        run({**o, "x": o["x"][:1]}, weight, mora_type)[0],
    )


@TYPES
@pytest.mark.parametrize("kind", ["dense", "none"])
@pytest.mark.parametrize(("K", "N"), [(0, 5), (5, 0), (0, 0)])
def test_no_columns(K: int, N: int, kind: str, mora_type: int | str, backend: str) -> None:
    """Without inputs the bias alone, without outputs nothing; zero gradients, not NaN."""
    o = make(columns=K, outputs=N, size=4)
    found = step(o, base(kind, outputs=N, columns=K), mora_type, torch.randn(6, N))
    assert torch.equal(found["y"], (o["bias"] if kind == "dense" else torch.zeros(N)).expand(6, N))
    assert mora_delta(o["matrix"], K, N, mora_type).shape == (N, K)
    assert torch.equal(found["x"], torch.zeros(6, K))
    assert torch.equal(found["matrix"], torch.zeros(4, 4))


@pytest.mark.parametrize("kind", ["plain", "dense", "none"])
@pytest.mark.parametrize(
    ("M", "K", "mora_type"),
    [
        (6, 40, 1),
        (6, 40, 2),
        (6, 40, 6),
        (6, 40, "truncation"),
        # several row blocks
        (20, 30, 1),
        (20, 30, 6),
        (20, 30, "decoupling"),
        (20, 60, 6),
    ],
)
def test_each_gradient_alone(
    M: int, K: int, mora_type: int | str, kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking for one gradient gives the bits that asking for all gives."""
    o, weight, grad = make(M, columns=K), base(kind, columns=K), torch.randn(M, 56)
    for _ in each_way(backend, monkeypatch):
        every = step(o, weight, mora_type, grad)
        for wanted in every.keys() - {"y"}:
            alone = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in o.items()}
            (found,) = torch.autograd.grad(run(alone, weight, mora_type), alone[wanted], grad)
            assert torch.equal(found, every[wanted]), wanted


@TYPES
@pytest.mark.parametrize("dense", [False, True])
def test_wide_strides_of_everything(dense: bool, mora_type: int | str, backend: str) -> None:
    """Matrix, bias and a dense W as transposed and sliced views: the bits of their contiguous copies, and the
    stated bound where torch's own GEMM may sum transposed operands in another order."""
    weight = torch.randn(40, 56).t() if dense else base("plain")
    views = {
        "x": torch.randn(40, 6).t(),
        "matrix": torch.randn(10, 25)[:, 3::2][:, :10].t(),
        "bias": torch.randn(168)[::3],
    }
    views = {name: view.requires_grad_() for name, view in views.items()}
    copies = {name: view.detach().contiguous().requires_grad_() for name, view in views.items()}
    plain = weight.contiguous() if isinstance(weight, Tensor) else weight
    grad = torch.randn(56, 6).t()
    of_views = step(views, weight, mora_type, grad)
    of_copies = step(copies, plain, mora_type, grad)
    expected = bounds.mora(copies["x"], copies["matrix"], mora_type, 56, plain, 0.75, copies["bias"], grad)
    for name, tensor in of_views.items():
        bounds.check(name, tensor, expected[name])
        if not dense and backend != "reference":
            assert torch.equal(tensor, of_copies[name]), name


# ---- merging


@TYPES
@pytest.mark.parametrize("kind", ["plain", "nested", "dense"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_then_running_is_running_unmerged(
    dtype: torch.dtype, kind: str, mora_type: int | str, each_backend: str
) -> None:
    """Within the merge's rounding: of W + ΔW, and of its 4-bit code where W is quantized."""
    for K, N, r in fitting(((64, 48, 10), (33, 70, 12), (5, 9, 12)), ((13, 20, 6), (5, 9, 12))):
        W = torch.randn(N, K).to(dtype)
        weight = W if kind == "dense" else peftkern.quantize_4bit(W, "fp4", 32, double_quant=kind == "nested")
        matrix, x, b = torch.randn(r, r) * 0.3, torch.randn(6, K).to(dtype), torch.randn(N)
        delta = mora_delta(matrix, K, N, mora_type)
        merged = merge(weight, delta)
        assert type(merged) is type(weight)
        # a turned entry: table, two products, a sum; a wrapped one: as many sums as terms meet
        error = (4 + 2 * -(-r // K)) * bounds.U32 * entries(matrix, K, N, mora_type, True)
        truth = bounds.Approx(entries(matrix, K, N, mora_type), error, error)
        allowed = bounds.merged(weight, truth)
        values = merged if isinstance(merged, Tensor) else peftkern.dequantize_4bit(merged, torch.float32)
        bounds.check("merged", values, allowed, mean=False)
        # run merged: exactly W + ΔW's product, within what merging may move, plus the product's own rounding
        y = run_base(x, merged, b)
        compute = bounds.compute_dtype(dtype)
        expected = bounds.matmul(
            bounds.exact(x), allowed.plus(bounds.UNIT[compute]), dtype, bias=bounds.exact(b)
        )
        if isinstance(merged, Tensor):
            expected = expected.rounded(dtype)  # torch rounds the bias before it adds it
        bounds.check("y", y, expected, mean=False)
        unmerged = mora_linear(x, weight, matrix, mora_type, 1.0, b)
        bounds.check("unmerged", unmerged, bounds.mora(x, matrix, mora_type, N, weight, 1.0, b)["y"])


def run_base(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return torch.nn.functional.linear(x, weight, bias.to(x.dtype))
    return peftkern.linear_4bit(x, weight, bias)
