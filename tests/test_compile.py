"""What torch does to a function: compile, export, opcheck, functorch, modes. It works, or it raises."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import peftkern
from peftkern import QuantizedWeight, linear_4bit, lora_linear
from peftkern.nn import LoRALinear
from peftkern.ops.library import flat

N, K, R = 40, 96, 8


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def weight_of(kind: str, dtype: torch.dtype = torch.float32) -> Tensor | QuantizedWeight:
    W = torch.randn(N, K).to(dtype)
    return W if kind == "dense" else peftkern.quantize_4bit(W, double_quant=kind == "nested")


def operands(M: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shapes = ((M, K), (R, K), (N, R), (N,))
    x, A, B, bias = (torch.randn(shape) for shape in shapes)
    return tuple(tensor.requires_grad_() for tensor in (x.to(dtype), A, B, bias))


def model(
    x: Tensor, weight: Tensor | QuantizedWeight, A: Tensor, B: Tensor, bias: Tensor, p: float = 0.0
) -> Tensor:
    # neighbours that every compiler computes to the bit
    return torch.nn.functional.relu(lora_linear(x * 1.5, weight, A, B, 0.5, bias, p))


def value_and_gradients(f: Callable[..., Tensor], weight: Any, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    x, *rest = tensors
    y = f(x, weight, *rest)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), tensors)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("y", "x", "lora_A", "lora_B", "bias"), found, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["plain", "nested", "dense"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiled_is_eager(compiler: str, kind: str) -> None:
    """fullgraph, forward and backward: the same bits, those of torch's GEMM beside a dense W included."""
    weight, tensors = weight_of(kind), operands()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    expected = value_and_gradients(model, weight, tensors)
    assert_same(value_and_gradients(compiled, weight, tensors), expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_dynamic_rows(compiler: str) -> None:
    """One graph for every M, empty and single rows too."""
    weight = weight_of("plain")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler)
    for M in (6, 17, 1, 0, 70):
        tensors = operands(M)
        expected = value_and_gradients(model, weight, tensors)
        assert_same(value_and_gradients(compiled, weight, tensors), expected)


def test_mixed_dtypes_and_batches_compiled() -> None:
    """PEFT's default: fp32 adapters beside bf16 activations; x [B, S, K], permuted."""
    weight = weight_of("nested", torch.bfloat16)
    _, A, B, bias = operands()
    x = torch.randn(3, 5, K).bfloat16().transpose(0, 1).requires_grad_()

    def f(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return lora_linear(x, weight, A, B, 0.5, bias)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    results = []
    for g in (f, compiled):
        y = g(x, A, B, bias)
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, A, B, bias))])
    assert_same(results[1], results[0])


def test_autocast_compiled() -> None:
    weight, tensors = weight_of("plain"), operands()

    def f(x: Tensor, weight: Any, *rest: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return lora_linear(x, weight, rest[0], rest[1], 0.5, rest[2])

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    found, expected = (value_and_gradients(g, weight, tensors) for g in (compiled, f))
    assert found[0].dtype == torch.bfloat16
    assert_same(found, expected)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_dropout_compiled(compiler: str) -> None:
    """Backward sees forward's mask: with W = 0 and an identity adapter, y = dx · x element by element."""
    x = torch.randn(50, 32, requires_grad=True)
    # dynamo refuses one tensor as two arguments of a Function
    zero, eye, eye_too = torch.zeros(32, 32), torch.eye(32), torch.eye(32)

    def f(x: Tensor) -> Tensor:
        return lora_linear(x, zero, eye, eye_too, 1.0, None, 0.5)

    y = torch.compile(f, fullgraph=True, backend=compiler)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, dx * x)
    assert sorted(dx.unique().tolist()) == [0.0, 2.0]


@pytest.mark.parametrize("compiler", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("shape", [(K,), (6, K), (2, 3, K)])
def test_outputs_may_be_changed_in_place(shape: tuple[int, ...], compiler: str | None) -> None:
    """`y += residual` and nn.ReLU(inplace=True) on an output, as on nn.Linear's, for any batch shape."""
    weight = weight_of("plain")
    assert isinstance(weight, QuantizedWeight)
    _, A, B, bias = operands()
    x = torch.randn(shape, requires_grad=True)

    def f(x: Tensor, A: Tensor, B: Tensor, in_place: bool) -> Tensor:
        y, z = lora_linear(x, weight, A, B, 0.5, bias), linear_4bit(x, weight, bias)
        y = torch.nn.functional.relu(y, inplace=in_place)
        return z.add_(y) if in_place else z + y

    g = torch.compile(f, fullgraph=True, backend=compiler) if compiler else f
    found, expected = g(x, A, B, True), f(x, A, B, False)
    assert torch.equal(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.sum(), (x, A, B)),
        torch.autograd.grad(expected.sum(), (x, A, B)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_linear_4bit_compiled() -> None:
    weight = weight_of("nested")
    x, bias = torch.randn(6, K, requires_grad=True), torch.randn(N, requires_grad=True)
    compiled = torch.compile(linear_4bit, fullgraph=True, backend="inductor")
    y, expected = compiled(x, weight, bias), linear_4bit(x, weight, bias)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, (x, bias), grad), torch.autograd.grad(expected, (x, bias), grad), strict=True
    ):
        assert torch.equal(a, b)


def test_forced_backend_holds_when_compiled() -> None:
    """The choice is made when the graph runs, not when it is traced."""
    weight = weight_of("plain")
    x = torch.randn(6, K, dtype=torch.bfloat16)
    compiled = torch.compile(linear_4bit, fullgraph=True, backend="aot_eager")
    compiled(x, weight)
    with peftkern.use_backend("reference"):
        assert torch.equal(compiled(x, weight), linear_4bit(x, weight))


@pytest.mark.parametrize("kind", ["nested", "dense"])
def test_module_trains_compiled(kind: str) -> None:
    """Three optimizer steps of a compiled LoRALinear give the losses of the eager one."""
    losses = []
    for compile_it in (False, True):
        torch.manual_seed(1)
        weight = weight_of(kind)
        layer = LoRALinear(K, N, r=R, alpha=16, weight=weight, bias=torch.randn(N))
        x, target = torch.randn(6, K), torch.randn(6, N)
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compile_it else layer
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(3):
            loss = (run(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("kind", ["nested", "dense"])
def test_export(kind: str) -> None:
    layer = LoRALinear(K, N, r=R, weight=weight_of(kind), bias=torch.randn(N))
    torch.nn.init.normal_(layer.lora_B)
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(layer, (torch.randn(6, K),), dynamic_shapes=({0: rows},))
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "peftkern.linear.default" in ops
    for M in (2, 6, 33):
        x = torch.randn(M, K)
        assert torch.equal(program.module()(x), layer(x))


def weight_arguments(weight: Tensor | QuantizedWeight | None) -> tuple[Any, ...]:
    return flat(weight.kernel_args if isinstance(weight, QuantizedWeight) else weight)


def layouts(rows: int, columns: int) -> list[Tensor]:
    """Contiguous, permuted and sliced: fake strides are wrong for one of them, if at all."""
    return [
        torch.randn(rows, columns),
        torch.randn(columns, rows).t(),
        torch.randn(rows, 2 * columns + 1)[:, 1::2],
        torch.randn(1, columns).expand(rows, columns),
    ]


@pytest.mark.parametrize("layout", range(4))
def test_opcheck(layout: int) -> None:
    ops = torch.ops.peftkern
    x, grad, t = layouts(6, K)[layout], layouts(6, N)[layout], layouts(6, R)[layout]
    B, A = layouts(N, R)[layout], layouts(R, K)[layout]
    bias = torch.randn(2 * N)[::2]
    weights = []
    for kind in ("plain", "nested"):
        weight = weight_arguments(weight_of(kind))
        torch.library.opcheck(ops.dequantize_4bit, (*weight[1:], torch.bfloat16))
        weights.append(weight)
    dense, seed, dtypes = layouts(N, K)[layout], torch.tensor(3), (torch.float16, None)
    weights.append(weight_arguments(dense))
    for weight in weights:
        for adapter, p, s in (((A, B), 0.0, None), ((A, B), 0.5, seed), ((None, None), 0.0, None)):
            torch.library.opcheck(ops.linear, (x, *adapter, bias, *weight, 0.5, p, s))
            torch.library.opcheck(ops.linear, (x, *adapter, None, *weight, 0.5, p, s))
    for weight in (*weights, weight_arguments(None)):
        for source, T, dtype in itertools.product((x, None), (t, None), dtypes):
            asked = (source, A, B, T, torch.bfloat16, torch.float32, dtype)
            torch.library.opcheck(ops.linear_backward, (grad, *asked, *weight, 0.5, 0.0, None))
        asked = (x, A, B, t, torch.bfloat16, torch.float32, torch.float16)
        torch.library.opcheck(ops.linear_backward, (grad, *asked, *weight, 0.5, 0.5, seed))
    torch.library.opcheck(ops.quantize_4bit, (dense, "nf4", 64))


def test_fake_strides() -> None:
    """The fake result of every layout has the real one's strides."""
    weight = weight_of("plain")
    for x in layouts(6, K):
        real = linear_4bit(x, weight)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = linear_4bit(mode.from_tensor(x), weight)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_meta_device() -> None:
    """Shapes without memory, as model loaders ask for them."""
    weight = weight_of("nested")
    assert isinstance(weight, QuantizedWeight)
    x, A, B = (tensor.to("meta") for tensor in operands()[:3])
    y = lora_linear(x, weight.to("meta"), A, B)
    assert y.is_meta
    assert y.shape == (6, N)


def test_tracing_records_the_op() -> None:
    """make_fx and jit.trace run the traced function on new values, not a recorded result."""
    weight = weight_of("plain")
    x, other = torch.randn(6, K), torch.randn(6, K)
    graph = make_fx(lambda x: linear_4bit(x, weight))(x)
    assert torch.equal(graph(other), linear_4bit(other, weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(lambda x: linear_4bit(x, weight), (x,), check_trace=False)
    assert torch.equal(traced(other), linear_4bit(other, weight))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("kind", ["nested", "dense"])
def test_functorch(kind: str) -> None:
    """grad, vmap over each argument, per-sample gradients, jacrev: the bits that autograd and a loop give."""
    weight = weight_of(kind)
    x, A, B, bias = operands()
    func = torch.func

    def loss(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return lora_linear(x, weight, A, B, 0.5, bias).square().sum()

    found = func.grad(loss, (0, 1, 2, 3))(x, A, B, bias)
    expected = torch.autograd.grad(loss(x, A, B, bias), (x, A, B, bias))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)

    def f(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, weight, A, B, 0.5, bias)

    many = (torch.randn(3, 6, K), torch.randn(3, R, K), torch.randn(3, N, R))
    for index in range(3):
        one = [tensor[0] for tensor in many]
        dims = tuple(0 if i == index else None for i in range(3))
        batched = func.vmap(f, dims)(*(many[i] if i == index else one[i] for i in range(3)))
        for j in range(3):
            single = f(*(many[i][j] if i == index else one[i] for i in range(3)))
            assert torch.equal(batched[j], single)

    per_sample = func.vmap(func.grad(lambda A, x: f(x, A, B).square().sum()), (None, 0))(A, many[0])
    for j in range(3):
        (single,) = torch.autograd.grad(f(many[0][j], A, B).square().sum(), A)
        assert torch.equal(per_sample[j], single)

    jacobian = func.jacrev(lambda x: f(x, A, B).sum(0))(x)
    y = f(x, A, B)
    for n in range(N):
        (row,) = torch.autograd.grad(y[:, n].sum(), x, retain_graph=True)
        assert torch.equal(jacobian[n], row)
    grads = torch.randn(2, 6, N)
    (batched_dx,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    for j in range(2):
        assert torch.equal(batched_dx[j], torch.autograd.grad(y, x, grads[j], retain_graph=True)[0])


@pytest.mark.parametrize("kind", ["nested", "dense"])
def test_forward_mode_raises(kind: str) -> None:
    """Never silent zeros: jvp, dual numbers, hessian, also where nothing requires grad."""
    weight = weight_of(kind)
    x, A, B, _ = (tensor.detach() for tensor in operands())

    def f(x: Tensor) -> Tensor:
        return lora_linear(x, weight, A, B)

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(f, (x,), (x,))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.hessian(lambda x: f(x).square().sum())(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        f(forward_ad.make_dual(x, torch.ones_like(x)))
    if isinstance(weight, QuantizedWeight):
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(lambda x: linear_4bit(x, weight), (x,), (x,))


def test_second_derivatives_raise() -> None:
    weight = weight_of("plain")
    x, A, B, _ = operands()
    func = torch.func
    with pytest.raises(RuntimeError, match="double backward and forward mode are not implemented"):
        func.grad(lambda x: func.grad(lambda x: lora_linear(x, weight, A, B).square().sum())(x).sum())(x)


@pytest.mark.parametrize(("first", "second"), [(i, j) for i in range(3) for j in range(3) if i != j])
def test_mixed_second_derivatives_raise(first: int, second: int) -> None:
    """d/dx, d/dA and d/dB of each other, where dY is constant: an error, never silent zeros."""
    weight = weight_of("plain")
    tensors = [tensor.detach() for tensor in operands()[:3]]

    def loss(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, weight, A, B).sum()

    inner = torch.func.grad(loss, first)
    with pytest.raises(RuntimeError, match="double backward and forward mode are not implemented"):
        torch.func.grad(lambda *all_: inner(*all_).sum(), second)(*tensors)


def test_library_ops_have_no_silent_derivative() -> None:
    """Called bare, a library op raises in backward and under forward mode; it never gives zero."""
    x, A = torch.randn(6, K, requires_grad=True), torch.randn(R, K)
    op = torch.ops.peftkern.linear
    rest = (None, None, None, *weight_arguments(A), 1.0, 0.0, None)
    y, _ = op(x, *rest)
    assert y.requires_grad
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        y.sum().backward()
    x = x.detach()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no derivative of its own"):
        op(forward_ad.make_dual(x, torch.ones_like(x)), *rest)
