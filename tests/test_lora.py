"""lora_linear, lora_delta and merge: values, every gradient by name, and everything around the numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import bounds
import numpy as np
import pytest
import torch
from cases import DTYPES, Case, cases, operands, unbatched
from hypothesis import given, settings
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import QuantizedWeight, dispatch, lora_delta, lora_linear, merge, reference
from peftkern.backends import dropout as dropped_by_rows
from peftkern.backends import parts


def make(
    N: int = 40, K: int = 96, R: int = 8, M: int = 6, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    return {
        "x": torch.randn(M, K).to(dtype).requires_grad_(),
        "lora_A": torch.randn(R, K).requires_grad_(),
        "lora_B": torch.randn(N, R).requires_grad_(),
        "bias": torch.randn(N).requires_grad_(),
    }


def quantized(N: int = 40, K: int = 96, **settings: object) -> QuantizedWeight:
    return peftkern.quantize_4bit(torch.randn(N, K), **settings)  # type: ignore[arg-type]


@settings(max_examples=30)
@given(case=cases(dense=True))
def test_values_and_gradients(case: Case, backend: str) -> None:
    o = operands(case)
    y = lora_linear(o.x, o.weight, o.lora_A, o.lora_B, 0.75, o.bias)
    assert y.dtype == case.dtype
    assert y.is_contiguous()
    assert y.shape == (*o.x.shape[:-1], case.N)
    inputs = {"x": o.x, "lora_A": o.lora_A, "lora_B": o.lora_B}
    if o.bias is not None:
        inputs["bias"] = o.bias
    found = torch.autograd.grad(y, list(inputs.values()), o.grad.view(y.shape))
    expected = bounds.linear(unbatched(o.x), o.weight, o.bias, o.grad, o.lora_A, o.lora_B, 0.75)
    bounds.check("y", unbatched(y), expected["y"], case.independent)
    for (name, tensor), gradient in zip(inputs.items(), found, strict=True):
        assert gradient.dtype == tensor.dtype, name
        bounds.check(name, unbatched(gradient) if name == "x" else gradient, expected[name], case.independent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("most", [1, 4, 7])
def test_dropout_in_parts(
    most: int, dense: bool, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most so many of 17 rows go through a buffer at a time, as thousands of a layer do: the last part is
    a shorter one, and each has its own place in the mask."""
    whole = parts.split
    monkeypatch.setattr(dropped_by_rows, "split", lambda rows, limit: whole(rows, min(limit, most)))
    o = make(M=17, dtype=dtype)
    W = torch.randn(40, 96).to(dtype)
    weight = W if dense else peftkern.quantize_4bit(W)
    grad, found = torch.randn(17, 40).to(dtype), []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(7)
            y = lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], 0.75, None, 0.3)
            torch.manual_seed(7)
            mask = reference.dropout_mask(reference.draw_seed(y.device), (17, 96), 0.3, y.device)
            wanted = [o[name] for name in ("x", "lora_A", "lora_B")]
            found.append([y.detach(), *torch.autograd.grad(y, wanted, grad)])
        finally:
            torch.set_num_threads(before)
    expected = bounds.linear(o["x"], weight, None, grad, o["lora_A"], o["lora_B"], 0.75, 0.3, mask)
    for name, one, two in zip(("y", "x", "lora_A", "lora_B"), *found, strict=True):
        bounds.check(name, one, expected[name])
        assert dense or backend == "reference" or torch.equal(one, two), name


@settings(max_examples=15)
@given(case=cases(dense=True))
def test_dropout_values_and_gradients(case: Case, backend: str) -> None:
    """The mask is reference.dropout_mask of the drawn seed, in forward and in backward."""
    o = operands(case)
    inputs = {"x": o.x, "lora_A": o.lora_A, "lora_B": o.lora_B}
    torch.manual_seed(case.seed)
    y = lora_linear(o.x, o.weight, o.lora_A, o.lora_B, 0.75, None, 0.3)
    torch.manual_seed(case.seed)
    mask = reference.dropout_mask(reference.draw_seed(), (case.M, case.K), 0.3)
    found = torch.autograd.grad(y, list(inputs.values()), o.grad.view(y.shape))
    expected = bounds.linear(unbatched(o.x), o.weight, None, o.grad, o.lora_A, o.lora_B, 0.75, 0.3, mask)
    bounds.check("y", unbatched(y), expected["y"], case.independent)
    for (name, _), gradient in zip(inputs.items(), found, strict=True):
        bounds.check(name, unbatched(gradient) if name == "x" else gradient, expected[name], case.independent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trained_dense_weight(dtype: torch.dtype, backend: str) -> None:
    """A dense W that asks for its gradient gets dW = dYᵀ X; a frozen one costs nothing."""
    o = make(dtype=dtype)
    weight = torch.randn(40, 96).to(dtype).requires_grad_()
    y = lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], 0.5, o["bias"])
    grad = torch.randn_like(y)
    (dW,) = torch.autograd.grad(y, weight, grad)
    expected = bounds.matmul(bounds.exact(grad).t(), bounds.exact(o["x"]).t(), dtype)
    bounds.check("weight", dW, expected)


def test_rank_zero_and_no_rows(backend: str) -> None:
    """An empty adapter is the base alone; an empty batch gives zero gradients, not NaN."""
    weight = quantized()
    x = torch.randn(3, 96, requires_grad=True)
    A, B = torch.empty(0, 96, requires_grad=True), torch.empty(40, 0, requires_grad=True)
    y = lora_linear(x, weight, A, B)
    assert torch.equal(y, peftkern.linear_4bit(x, weight))
    gA, gB = torch.autograd.grad(y.sum(), (A, B))
    assert (gA.shape, gB.shape) == (A.shape, B.shape)
    for W in (weight, torch.randn(40, 96)):
        o = make(M=0)
        y = lora_linear(o["x"], W, o["lora_A"], o["lora_B"], 1.0, o["bias"])
        assert y.shape == (0, 40)
        for name, gradient in zip(o, torch.autograd.grad(y.sum(), list(o.values())), strict=True):
            assert not bool(gradient.any()), name
            assert gradient.shape == o[name].shape, name


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B", "bias"])
@pytest.mark.parametrize("dense", [False, True])
def test_each_gradient_alone(wanted: str, dense: bool, backend: str) -> None:
    """Asking for one gradient gives the bits that asking for all gives."""
    o = make()
    weight = torch.randn(40, 96) if dense else quantized()
    grad = torch.randn(6, 40)
    every = torch.autograd.grad(
        lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], 0.5, o["bias"]), list(o.values()), grad
    )
    alone = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in o.items()}
    y = lora_linear(alone["x"], weight, alone["lora_A"], alone["lora_B"], 0.5, alone["bias"])
    (found,) = torch.autograd.grad(y, alone[wanted], grad)
    assert torch.equal(found, every[list(o).index(wanted)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("M", "N", "R"), [(1, 1, 1), (70, 300, 16), (33, 130, 20), (65, 70, 64), (5, 40, 70)]
)
def test_gradients_row(
    M: int, N: int, R: int, dropout: float, adapter: torch.dtype, dtype: torch.dtype, backend: str
) -> None:
    """The row linear_grad: any strides, into any strides, within the bounds; each alone has the bits that it
    has with the others, given only what it needs."""
    K, device = 64, torch.empty(0).device
    x, dY = torch.randn(M, 2 * K).to(dtype)[:, ::2], torch.randn(N, M).to(dtype).t()
    A, B = torch.randn(K, R).to(adapter).t(), torch.randn(2 * N, R + 3).to(adapter)[::2, 3:]
    T = torch.randn(M, R).to(dtype)
    weight = quantized(N, K)
    seed = torch.tensor(5)
    mask = reference.dropout_mask(seed, (M, K), dropout) if dropout else None
    expected = bounds.linear(x, weight, torch.zeros(N), dY, A, B, 0.75, dropout, mask)
    compute = bounds.compute_dtype(dtype)
    given = bounds.operand(dY, compute), bounds.operand(T, compute)
    expected["lora_B"] = bounds.matmul(given[0].t(), given[1].t(), adapter)
    expected["bias"] = bounds.column_sums(dY, adapter)
    row = dispatch.find("linear_grad", device, dtype)
    first: list[Tensor | None] = [None] * 4
    for asked in (15, 1, 2, 4, 8, 3, 12, 7):
        outs: list[Tensor | None] = [
            torch.full((K, M), torch.nan, dtype=dtype).t(),
            torch.full((K, R), torch.nan, dtype=adapter).t(),
            torch.full((N, 2 * R), torch.nan, dtype=adapter)[:, ::2],
            torch.full((2 * N,), torch.nan, dtype=adapter)[::2],
        ]
        outs = [out if asked >> i & 1 else None for i, out in enumerate(outs)]
        dx, dA, dB, _ = outs
        row(
            *outs,
            dY,
            None if dA is None else x,
            None if dx is None else weight.kernel_args,
            None if dx is None else A,
            None if dx is None and dA is None else B,
            None if dB is None else T,
            0.75 / (1.0 - dropout),
            (dropout, seed) if dropout else None,
        )
        for i, (name, out) in enumerate(zip(("x", "lora_A", "lora_B", "bias"), outs, strict=True)):
            if out is not None and first[i] is None:
                first[i] = out
                bounds.check(name, out, expected[name])
            elif out is not None:
                assert torch.equal(out, first[i]), f"{name} of {asked:04b}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [None, 0.5])
@pytest.mark.parametrize("dense", [False, True])
def test_rows_of_nothing(dense: bool, dropout: float | None, dtype: torch.dtype, backend: str) -> None:
    """No rows, outputs, inputs or rank: zeros where a sum is of nothing, and no number left unwritten."""
    device, seed = torch.empty(0).device, torch.tensor(5)
    masked = None if dropout is None else (dropout, seed)
    for M, N, K, R in ((0, 5, 64, 3), (4, 0, 64, 3), (4, 5, 0, 3), (4, 5, 64, 0), (0, 0, 0, 0)):
        W = torch.ones(N, K, dtype=dtype)
        weight: Any = W if dense else peftkern.quantize_4bit(W).kernel_args
        x, dY = torch.ones(M, K, dtype=dtype), torch.ones(M, N, dtype=dtype)
        A, B = torch.ones(R, K), torch.ones(N, R)
        y, T = (torch.full(shape, torch.nan, dtype=dtype) for shape in ((M, N), (M, R)))
        dispatch.find("linear", device, dtype)(y, T, x, weight, A, B, 1.0, masked, torch.ones(N))
        if masked is None:
            assert torch.equal(T, torch.full((M, R), float(K), dtype=dtype))
            assert torch.equal(y, torch.full((M, N), 1.0 + K + K * R, dtype=dtype))
        dx = torch.full((M, K), torch.nan, dtype=dtype)
        dA, dB, dbias = (torch.full(shape, torch.nan) for shape in ((R, K), (N, R), (N,)))
        outs = [dx, dA, dB, dbias]
        row = dispatch.find("linear_grad", device, dtype)
        row(*outs, dY, x, weight, A, B, torch.ones(M, R, dtype=dtype), 1.0, masked)
        if masked is None:
            assert torch.equal(dx, torch.full((M, K), float(N + N * R), dtype=dtype))
            assert torch.equal(dA, torch.full((R, K), float(M * N)))
        assert not any(bool(out.isnan().any()) for out in (y, T, *outs))
        assert torch.equal(dB, torch.full((N, R), float(M)))
        assert torch.equal(dbias, torch.full((N,), float(M)))


def test_what_backward_keeps() -> None:
    """x, A, B, T and the packed weight by reference, as the gradients need them; never a dequantized W."""
    weight = quantized(double_quant=True)
    o = make()

    def saved(**frozen: bool) -> list[Tensor]:
        kept: list[Tensor] = []
        a = {name: tensor.detach().requires_grad_(not frozen.get(name, False)) for name, tensor in o.items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            lora_linear(a["x"], weight, a["lora_A"], a["lora_B"], 0.5, a["bias"])
        return kept

    nested = weight.nested
    assert nested is not None
    inputs = [
        o["x"],
        o["lora_A"],
        o["lora_B"],
        weight.packed,
        weight.absmax,
        nested.absmax,
        nested.code,
        nested.offset,
    ]
    kept = saved()
    others = [t for t in kept if t.data_ptr() not in {i.data_ptr() for i in inputs}]
    assert len(kept) == len(inputs) + 1
    assert [tuple(t.shape) for t in others] == [(6, 8)]  # T
    no_dx = {t.data_ptr() for t in saved(x=True)}
    assert weight.packed.data_ptr() not in no_dx
    assert o["lora_A"].data_ptr() not in no_dx
    only_dx = {t.data_ptr() for t in saved(lora_A=True, lora_B=True, bias=True)}
    assert o["x"].data_ptr() not in only_dx


@pytest.mark.parametrize("changed", ["x", "lora_A", "lora_B", "weight"])
def test_changed_operands_are_noticed(changed: str) -> None:
    """Changed in place between forward and backward: autograd's version counter says so."""
    weight = quantized()
    o = {name: tensor * 1.0 for name, tensor in make().items()}  # no leaves, so that they may be changed
    y = lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], 0.5)
    with torch.no_grad():
        (weight.packed if changed == "weight" else o[changed]).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_dropout_is_repeatable() -> None:
    o, weight = make(), quantized()

    def run() -> Tensor:
        return lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], 1.0, None, 0.5)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    assert torch.equal(run(), second)
    assert not torch.equal(first, second)


def test_dropout_keeps_its_share() -> None:
    """E[dropout(x)] = x: with W = 0 and an identity adapter, Y is dropout(x) itself."""
    K = 64
    x = torch.ones(4000, K)
    y = lora_linear(x, torch.zeros(K, K), torch.eye(K), torch.eye(K), 1.0, None, 0.25)
    kept = y != 0
    assert y[kept].unique().tolist() == [torch.tensor(4 / 3).item()]
    # 256 000 draws of variance 0.1875: five standard deviations of the mean
    assert abs(kept.double().mean().item() - 0.75) < 5 * (0.1875 / kept.numel()) ** 0.5


@pytest.mark.parametrize(("dropout", "scaling"), [(1.0, 1.0), (1.0 - 2.0**-53, 1e30)])
def test_dropout_of_one_is_the_base_alone(dropout: float, scaling: float, backend: str) -> None:
    """Or so near to one that nothing is kept."""
    o, weight = make(), quantized()
    y = lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], scaling, o["bias"], dropout)
    assert torch.equal(y, peftkern.linear_4bit(o["x"], weight, o["bias"]))
    oracle = reference.lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], scaling, o["bias"], dropout)
    assert torch.equal(oracle, reference.linear_4bit(o["x"], weight, o["bias"]))
    for name, gradient in zip(o, torch.autograd.grad(y.sum(), list(o.values())), strict=True):
        assert bool(gradient.isfinite().all()), name
        if name.startswith("lora"):
            assert not bool(gradient.any()), name


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, dropout: float) -> None:
    """Recomputed in backward with the same mask: the bits of the plain run."""
    o, weight = make(), quantized()

    def block(x: Tensor) -> Tensor:
        y = lora_linear(x, weight, o["lora_A"], o["lora_B"], 0.5, o["bias"], dropout)
        return torch.nn.functional.silu(y)

    torch.manual_seed(5)
    plain = block(o["x"])
    expected = torch.autograd.grad(plain.square().sum(), list(o.values()))
    for tensor in o.values():
        tensor.grad = None
    torch.manual_seed(5)
    y = checkpoint(block, o["x"], use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    assert torch.equal(y, plain)
    y.square().sum().backward()
    for (name, tensor), gradient in zip(o.items(), expected, strict=True):
        assert tensor.grad is not None, name
        assert torch.equal(tensor.grad, gradient), name


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast(cast: torch.dtype, dense: bool) -> None:
    """As F.linear: x (and a dense W) in autocast's dtype, gradients in their parameters' own."""
    o = make()
    weight = torch.randn(40, 96) if dense else quantized()
    with torch.autocast("cpu", dtype=cast):
        y = lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], 0.5, o["bias"])
        assert (
            peftkern.explain(lora_linear, o["x"], weight, o["lora_A"], o["lora_B"]).choices[0].call.dtype
            == cast
        )
    assert y.dtype == cast
    low = o["x"].detach().to(cast).requires_grad_()
    W = weight.to(cast) if isinstance(weight, Tensor) else weight
    expected = lora_linear(low, W, o["lora_A"], o["lora_B"], 0.5, o["bias"])
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, list(o.values()), grad)
    wanted = torch.autograd.grad(expected, [low, *list(o.values())[1:]], grad)
    for name, a, b in zip(o, found, wanted, strict=True):
        assert a.dtype == torch.float32, name
        assert torch.equal(a, b.float()), name


def test_autocast_of_a_trained_dense_weight() -> None:
    """dW passes through the cast: the bf16 gradient, in W's own dtype."""
    o, weight = make(), torch.randn(40, 96, requires_grad=True)
    low = weight.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(o["x"], weight, o["lora_A"], o["lora_B"])
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, weight, grad)
    (expected,) = torch.autograd.grad(
        lora_linear(o["x"].bfloat16(), low, o["lora_A"], o["lora_B"]), low, grad
    )
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("dense", [False, True])
def test_autocast_of_two_layers(dense: bool) -> None:
    """The second layer's x has autocast's dtype already: its fp32 W is cast all the same, as F.linear's."""
    weight = torch.randn(96, 96) if dense else quantized(96, 96)
    x, A, B = torch.randn(6, 96), torch.randn(8, 96), torch.randn(96, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = lora_linear(x, weight, A, B, 0.5)
        second = lora_linear(first, weight, A, B, 0.5)
    assert first.dtype == second.dtype == torch.bfloat16
    W = weight.bfloat16() if isinstance(weight, Tensor) else weight
    assert torch.equal(second, lora_linear(lora_linear(x.bfloat16(), W, A, B, 0.5), W, A, B, 0.5))


def test_double_backward_raises() -> None:
    o = make()
    for weight in (quantized(), torch.randn(40, 96)):
        y = lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], 0.5, o["bias"])
        with pytest.raises(RuntimeError, match="lora_linear: double backward is not implemented"):
            torch.autograd.grad(y.square().sum(), o["x"], create_graph=True)
    y = peftkern.linear_4bit(o["x"], quantized())
    with pytest.raises(RuntimeError, match="linear_4bit: double backward is not implemented"):
        torch.autograd.grad(y.square().sum(), o["x"], create_graph=True)


@pytest.mark.parametrize("first", ["x", "lora_A", "lora_B"])
@pytest.mark.parametrize("second", ["x", "lora_A", "lora_B"])
def test_penalty_on_a_gradient_raises(first: str, second: str) -> None:
    """Each gradient is made of the other two operands: a graph of it without them would be silently wrong,
    even where dY itself is constant. With those frozen it is a constant, as it should be."""
    o = {name: tensor.detach().requires_grad_(name in (first, second)) for name, tensor in make().items()}
    y = lora_linear(o["x"], quantized(), o["lora_A"], o["lora_B"], 0.5)
    if first == second:
        (gradient,) = torch.autograd.grad(y.sum(), o[first], create_graph=True)
        assert not gradient.requires_grad
        return
    with pytest.raises(RuntimeError, match="lora_linear: double backward is not implemented"):
        torch.autograd.grad(y.sum(), o[first], create_graph=True)


def _everything(
    dtype: torch.dtype, M: int, weight: Tensor | QuantizedWeight, o: dict[str, Tensor]
) -> list[Tensor]:
    y = lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], 0.5, o["bias"])
    torch.manual_seed(1)
    return [y.detach(), *torch.autograd.grad(y, list(o.values()), torch.randn_like(y))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_do_not_depend_on_the_thread_count(dtype: torch.dtype, isa: str) -> None:
    """Promise 3, on the package's own kernels: large enough that every thread gets work."""
    before = torch.get_num_threads()
    try:
        for M in (1, 5, 70):
            o = make(N=300, K=520, R=16, M=M, dtype=dtype)
            weight = quantized(300, 520)
            runs = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                runs.append(_everything(dtype, M, weight, o))
            for run in runs[1:]:
                for name, a, b in zip(("y", *o), run, runs[0], strict=True):
                    assert torch.equal(a, b), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("M", "N", "K", "R"),
    [
        (3, 33, 192, 8),  # an odd number of blocks in a row: absmax of the next one is at any address
        (11, 70, 1344, 70),
        (20, 70, 1344, 8),
        (260, 449, 704, 40),
        (520, 192, 330, 16),
    ],
)
@pytest.mark.parametrize("double_quant", [False, True])
def test_more_than_a_kernel_takes_at_a_time(
    M: int, N: int, K: int, R: int, double_quant: bool, dtype: torch.dtype, isa: str
) -> None:
    """Several blocks of rows, chunks of the contraction and panels of outputs, each with a ragged end: right,
    and the same bits from any number of threads and beside any other rows."""
    o = make(N, K, R, M, dtype)
    grad = torch.randn(M, N).to(dtype)
    weight = quantized(N, K, double_quant=double_quant)

    def step(x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        inputs = {**o, "x": x}
        y = lora_linear(x, weight, o["lora_A"], o["lora_B"], 0.75, o["bias"])
        return {"y": y, **dict(zip(o, torch.autograd.grad(y, list(inputs.values()), grad), strict=True))}

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = step(o["x"], grad)
        expected = bounds.linear(o["x"], weight, o["bias"], grad, o["lora_A"], o["lora_B"], 0.75)
        for name, tensor in first.items():
            bounds.check(name, tensor, expected[name])
        torch.set_num_threads(3)
        for name, tensor in step(o["x"], grad).items():
            assert torch.equal(tensor, first[name]), name
        kept = (torch.arange(M) % 37 == 2)[:, None]
        dirty = torch.where(kept, o["x"].detach(), torch.nan).requires_grad_()
        second = step(dirty, torch.where(kept, grad, torch.inf))
        for name in ("y", "x"):
            assert torch.equal(second[name][kept[:, 0]], first[name][kept[:, 0]]), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_stays_alone(value: float, dtype: torch.dtype, isa: str) -> None:
    """NaN or Inf in one row of x or dY: Y and dX of the other rows keep their bits."""
    weight = quantized()
    for M in (2, 17, 70):
        o = make(M=M, dtype=dtype)
        clean = o["x"]
        dirty = clean.detach().clone()
        dirty[M // 2, 50] = value
        dirty.requires_grad_()
        grad = torch.randn(M, 40).to(dtype)
        bad_grad = grad.clone()
        bad_grad[M // 2] = value
        others = torch.arange(M) != M // 2
        y = lora_linear(clean, weight, o["lora_A"], o["lora_B"])
        bad_y = lora_linear(dirty, weight, o["lora_A"], o["lora_B"])
        assert torch.equal(y[others], bad_y[others])
        (dx,) = torch.autograd.grad(y, clean, grad)
        (bad_dx,) = torch.autograd.grad(bad_y, dirty, bad_grad)
        assert torch.equal(dx[others], bad_dx[others])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_inputs_stay_as_they_are(dense: bool, dropout: float, backend: str) -> None:
    o = make(dtype=torch.bfloat16)
    weight = torch.randn(40, 96).bfloat16() if dense else quantized(double_quant=True)
    leaves, _ = torch.utils._pytree.tree_flatten((o, weight))
    before = [leaf.detach().clone() for leaf in leaves]
    versions = [leaf._version for leaf in leaves]
    y = lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], 0.5, o["bias"], dropout)
    grad = torch.randn_like(y)
    kept = grad.clone()
    torch.autograd.grad(y, list(o.values()), grad)
    assert torch.equal(grad, kept)
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves, before, strict=True))
    assert [leaf._version for leaf in leaves] == versions


def test_wide_strides_of_everything(backend: str) -> None:
    """Adapters, bias and a dense W as transposed and sliced views: the bits of their contiguous copies, and
    the stated bound where torch's own GEMM may sum transposed operands in another order."""
    for dense in (False, True):
        o = make()
        W: Tensor | QuantizedWeight = torch.randn(96, 40).t() if dense else quantized()
        views = {
            "x": torch.randn(96, 6).t(),
            "lora_A": torch.randn(96, 16)[:, ::2].t(),
            "lora_B": torch.randn(80, 11)[::2, 3:],
            "bias": torch.randn(120)[::3],
        }
        views = {name: view.requires_grad_() for name, view in views.items()}
        copies = {name: view.detach().contiguous().requires_grad_() for name, view in views.items()}
        plain = W.contiguous() if isinstance(W, Tensor) else W
        grad = torch.randn(40, 6).t()
        results = []
        for a, w in ((views, W), (copies, plain)):
            y = lora_linear(a["x"], w, a["lora_A"], a["lora_B"], 0.5, a["bias"])
            results.append([y.detach(), *torch.autograd.grad(y, list(a.values()), grad)])
        c = copies
        expected = bounds.linear(c["x"], plain, c["bias"], grad, c["lora_A"], c["lora_B"], 0.5)
        for name, of_views, of_copies in zip(("y", *o), *results, strict=True):
            bounds.check(name, of_views, expected[name])
            if not dense and backend != "reference":
                assert torch.equal(of_views, of_copies), name


@pytest.mark.parametrize("negated", ["x", "lora_A", "lora_B", "bias", "weight", "grad"])
def test_negative_bit_views(negated: str) -> None:
    """z.conj().imag is a real tensor whose memory holds its negation."""
    o = {**{name: tensor.detach() for name, tensor in make().items()}, "weight": torch.randn(40, 96)}
    o["grad"] = torch.randn(6, 40)
    o[negated] = torch.complex(o[negated], o[negated]).conj().imag
    assert o[negated].is_neg()
    results = []
    for a in (o, {name: tensor.resolve_neg() for name, tensor in o.items()}):
        x = a["x"].requires_grad_()
        y = lora_linear(x, a["weight"], a["lora_A"], a["lora_B"], 0.5, a["bias"])
        results.append((y.detach(), *torch.autograd.grad(y, x, a["grad"])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


FORK = """
    import os, sys, threading, torch, peftkern
    torch.set_num_threads(2)
    weight = peftkern.quantize_4bit(torch.randn(512, 512))
    A, B = torch.randn(16, 512, requires_grad=True), torch.randn(512, 16, requires_grad=True)
    x = torch.randn(16, 512)  # torch's own loops stay serial on so little: in a forked child they would hang
    def run():
        y = peftkern.lora_linear(x, weight, A, B)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (A, B))
    expected = run()
    def same():
        return all(torch.equal(a, b) for a, b in zip(run(), expected))
    failed = []
    def many():
        failed.extend(not same() for _ in range(20))
    threads = [threading.Thread(target=many) for _ in range(4)]
    [t.start() for t in threads]; [t.join() for t in threads]
    assert len(failed) == 80 and not any(failed)
    child = os.fork()
    if child == 0:
        os._exit(0 if same() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same()
    print("done")
"""


def test_threads_and_fork() -> None:
    """Four threads at once, then a fork after the OpenMP pool exists: same bits, and no hang."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORK)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.stdout.strip() == "done", run.stderr


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, that they are a prototype
    NESTED = torch.nested.nested_tensor([torch.zeros(96), torch.zeros(40)])  # two dimensions, of no shape

BAD: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
    (
        {"x": torch.zeros(2, 96, dtype=torch.float64)},
        TypeError,
        "x: expected dtype float32, bfloat16 or float16, got",
    ),
    ({"x": torch.zeros(2, 95)}, ValueError, r"x: expected shape \[\.\.\., 96\], got shape \[2, 95\]"),
    ({"weight": "nf4"}, TypeError, "weight: expected a tensor or a QuantizedWeight, got str"),
    (
        {"weight": torch.zeros(96)},
        ValueError,
        r"weight: expected a QuantizedWeight or shape \[N, K\], got shape \[96\]",
    ),
    (
        {"weight": torch.zeros(40, 96).bfloat16()},
        TypeError,
        "weight: expected dtype float32 as x's, got bfloat16",
    ),
    ({"weight": torch.zeros(40, 96).char()}, TypeError, "weight: expected dtype .* got int8"),
    (
        {"weight": torch.zeros(40, 96, device="meta")},
        ValueError,
        "x: expected device meta, got cpu",
    ),
    ({"lora_A": torch.zeros(8, 95)}, ValueError, r"lora_A: expected shape \[8, 96\], got shape \[8, 95\]"),
    ({"lora_A": torch.zeros(96)}, ValueError, r"lora_A: expected shape \[R, 96\], got shape \[96\]"),
    ({"lora_A": 3}, TypeError, "lora_A: expected a tensor, got int"),
    ({"lora_A": torch.zeros(8, 96).long()}, TypeError, "lora_A: expected dtype .* got int64"),
    ({"lora_B": torch.zeros(40, 7)}, ValueError, r"lora_B: expected shape \[40, 8\], got shape \[40, 7\]"),
    ({"lora_B": torch.zeros(8, 40)}, ValueError, r"lora_B: expected shape \[40, 8\], got shape \[8, 40\]"),
    (
        {"lora_B": torch.zeros(40, 8, device="meta")},
        ValueError,
        "lora_B: expected device cpu, got",
    ),
    ({"lora_B": torch.zeros(40, 8).to_sparse()}, TypeError, "lora_B: expected a strided tensor"),
    ({"bias": torch.zeros(41)}, ValueError, r"bias: expected shape \[40\], got shape \[41\]"),
    ({"scaling": torch.nan}, ValueError, "scaling: expected a finite number in float32's range, got nan"),
    ({"scaling": -torch.inf}, ValueError, "scaling: expected a finite number in float32's range, got -inf"),
    ({"scaling": 1e300}, ValueError, "scaling: expected a finite number in float32's range, got 1e"),
    ({"scaling": "2"}, TypeError, "scaling: expected a number, got str"),
    ({"scaling": torch.tensor(2.0)}, TypeError, "scaling: expected a number, got Tensor"),
    ({"dropout": -0.1}, ValueError, r"dropout: expected a probability in \[0, 1\], got -0.1"),
    ({"dropout": 1.1}, ValueError, r"dropout: expected a probability in \[0, 1\], got 1.1"),
    ({"dropout": torch.nan}, ValueError, r"dropout: expected a probability in \[0, 1\], got nan"),
    ({"dropout": None}, TypeError, "dropout: expected a number, got NoneType"),
    ({"dropout": True}, TypeError, "dropout: expected a number, got bool"),
    ({"scaling": True}, TypeError, "scaling: expected a number, got bool"),
    ({"x": NESTED}, TypeError, "x: expected a strided tensor, got a nested one"),
    ({"weight": NESTED}, TypeError, "weight: expected a strided tensor, got a nested one"),
    ({"lora_A": NESTED}, TypeError, "lora_A: expected a strided tensor, got a nested one"),
    ({"lora_B": NESTED}, TypeError, "lora_B: expected a strided tensor, got a nested one"),
    (
        {"dropout": 0.99, "scaling": 1e37},
        ValueError,
        r"scaling: expected scaling / \(1 - dropout\) in float32",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    weight = quantized()
    arguments: dict[str, object] = {
        "x": torch.zeros(2, 96),
        "weight": weight,
        "lora_A": torch.zeros(8, 96),
        "lora_B": torch.zeros(40, 8),
        **change,
    }
    calls: list[Callable[..., object]] = [lora_linear, lambda **a: peftkern.explain("lora_linear", **a)]
    for call in calls:
        with pytest.raises(error, match=message):
            call(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_and_dense_merge(dtype: torch.dtype) -> None:
    """ΔW within its bound; W + ΔW summed in fp32 and rounded to W's dtype, differentiable."""
    o = make()
    delta = lora_delta(o["lora_A"], o["lora_B"], 0.5)
    bounds.check(
        "delta",
        delta,
        bounds.matmul(bounds.exact(o["lora_B"]), bounds.exact(o["lora_A"]).t(), torch.float32, 0.5),
    )
    W = torch.randn(40, 96).to(dtype)
    before = W.clone()
    merged = merge(W, delta)
    assert torch.equal(W, before)
    assert merged.dtype == dtype
    assert torch.equal(merged, (W.float() + delta).to(dtype))
    (dA,) = torch.autograd.grad(merged.float().sum(), o["lora_A"])  # s Bᵀ 1; its columns round alike
    ones = bounds.exact(torch.ones(96, 40))
    bounds.check("lora_A", dA, bounds.matmul(bounds.exact(o["lora_B"]).t(), ones, torch.float32, 0.5), False)


@pytest.mark.parametrize("settings", [
    {}, {"quant_type": "fp4", "blocksize": 32}, {"blocksize": 4096, "double_quant": True},
])  # fmt: skip
def test_quantized_merge_keeps_its_settings(settings: dict[str, object], backend: str) -> None:
    """Re-quantized with its own settings: the bytes that quantize_4bit gives for W + ΔW."""
    o, weight = make(), quantized(**settings)
    copy = weight.packed.clone()
    delta = lora_delta(o["lora_A"], o["lora_B"], 0.5).detach()
    merged = merge(weight, delta)
    expected = peftkern.quantize_4bit(peftkern.dequantize_4bit(weight, torch.float32) + delta, **settings)  # type: ignore[arg-type]
    assert torch.equal(weight.packed, copy)
    assert (merged.quant_type, merged.blocksize, merged.dtype) == (
        weight.quant_type,
        weight.blocksize,
        weight.dtype,
    )
    assert (merged.nested is None) == (weight.nested is None)
    assert torch.equal(merged.packed, expected.packed)
    assert torch.equal(merged.absmax, expected.absmax)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantized_merge_keeps_its_dtype(dtype: torch.dtype, double_quant: bool) -> None:
    """The reference's merge, byte for byte: W + ΔW in fp32, rounded to the weight's dtype, quantized."""
    weight = peftkern.quantize_4bit(torch.randn(40, 96).to(dtype), double_quant=double_quant)
    delta = torch.randn(40, 96)
    merged, expected = merge(weight, delta), reference.merge(weight, delta)
    assert merged.dtype == expected.dtype == dtype
    assert torch.equal(merged.packed, expected.packed)
    assert torch.equal(merged.absmax, expected.absmax)
    rounded = (peftkern.dequantize_4bit(weight, torch.float32) + delta).to(dtype)
    assert torch.equal(merged.packed, peftkern.quantize_4bit(rounded, double_quant=double_quant).packed)


BAD_MERGES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: merge(torch.zeros(3), torch.zeros(3)),
        ValueError,
        "weight: expected a QuantizedWeight or shape",
    ),
    (lambda: merge(torch.zeros(3, 4), torch.zeros(4, 3)), ValueError, r"delta: expected shape \[3, 4\], got"),
    (lambda: merge(quantized(), torch.zeros(96, 40)), ValueError, r"delta: expected shape \[40, 96\]"),
    (lambda: merge(quantized(), None), TypeError, "delta: expected a tensor, got NoneType"),
    (lambda: lora_delta(torch.ones(8, 9), torch.ones(4, 7)), ValueError, r"lora_B: expected shape \[4, 8\]"),
    (lambda: lora_delta(torch.ones(8), torch.ones(4, 7)), ValueError, r"lora_A: expected shape \[R, K\]"),
    (
        lambda: lora_delta(torch.ones(8, 9), torch.ones(4, 8), torch.inf),
        ValueError,
        "scaling: expected a finite",
    ),
]


@pytest.mark.parametrize("scaling", [Fraction(1, 2), np.float32(0.5), 2])
def test_any_real_number_scales(scaling: float) -> None:
    o, weight = make(), quantized()
    adapter = o["lora_A"].detach(), o["lora_B"].detach()
    assert torch.equal(lora_delta(*adapter, scaling), lora_delta(*adapter, float(scaling)))
    for module in (peftkern, reference):
        found = [module.lora_linear(o["x"].detach(), weight, *adapter, s) for s in (scaling, float(scaling))]
        assert torch.equal(*found)
        M = torch.randn(8, 8)
        found = [module.mora_linear(o["x"].detach(), weight, M, 1, s) for s in (scaling, float(scaling))]
        assert torch.equal(*found)


@pytest.mark.parametrize(("call", "error", "message"), BAD_MERGES)
def test_bad_arguments_of_merging(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
