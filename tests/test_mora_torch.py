"""MoRA inside torch: what backward keeps and what is allocated, bits, modes, compilers, bad arguments."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import bounds
import pytest
import torch
from cases import MORA_K as K
from cases import MORA_N as N
from cases import MORA_R as R
from cases import MORA_TYPES, Weight
from cases import mora_base as base
from cases import mora_inputs as make
from cases import mora_inputs_of as inputs_of
from cases import mora_run as run
from cases import mora_step as step
from guarded import guarded
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import QuantizedWeight, mora, mora_delta, mora_linear, mora_rank
from peftkern.backends import cpu

TYPES = pytest.mark.parametrize("mora_type", MORA_TYPES)
# one block in the middle, several turned ones, several as they are
KINDS_OF_TYPE = pytest.mark.parametrize("mora_type", [1, 2, 6, "decoupling"])
BASES = pytest.mark.parametrize("kind", ["nested", "dense", "none"])

# ---- memory


@TYPES
@BASES
def test_what_backward_keeps(kind: str, mora_type: int | str) -> None:
    """One block: z [M, r̂], M and the weight by reference, x only for a dense W that trains. Several: x by
    reference instead of z. Never a dequantized W, and nothing that the wanted gradients do not read."""
    weight, o = base(kind), make()
    several = mora_type in (6, "decoupling")

    def kept(trains: tuple[str, ...], train_weight: bool = False) -> list[Tensor]:
        found: list[Tensor] = []
        a = {name: tensor.detach().requires_grad_(name in trains) for name, tensor in o.items()}
        W = weight.detach().requires_grad_(train_weight) if isinstance(weight, Tensor) else weight
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            run(a, W, mora_type)
        return found

    leaves = {leaf.data_ptr() for leaf in torch.utils._pytree.tree_leaves(weight) if leaf is not None}
    x, matrix = o["x"].data_ptr(), o["matrix"].data_ptr()

    every = kept(("x", "matrix", "bias"))
    assert len({t.data_ptr() for t in every}) == len(every)
    new = [t for t in every if t.data_ptr() not in leaves | {x, matrix}]
    assert [tuple(t.shape) for t in new] == ([] if several else [(6, R)])
    assert sum(t.numel() for t in new) <= 6 * R
    pointers = {t.data_ptr() for t in every}
    assert pointers >= leaves | {matrix}
    assert (x in pointers) == several

    only_matrix = {t.data_ptr() for t in kept(("matrix",))}
    assert not only_matrix & leaves
    assert (x in only_matrix) == several
    only_x = kept(("x",))
    assert {t.data_ptr() for t in only_x} == leaves | {matrix}
    if kind != "none":
        assert not {t.data_ptr() for t in kept(("bias",))} & (leaves | {x})
    if isinstance(weight, Tensor):
        assert x in {t.data_ptr() for t in kept(("matrix",), train_weight=True)}


def peak(call: Callable[[], object]) -> int:
    """The most bytes of torch's memory that were there at once, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        call()
    assert p.profiler is not None
    events = [event for event in p.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_peak_sees_allocations() -> None:
    """What is there at once, and within 64 bytes, for numbers that torch wraps as tensors, nothing else."""
    assert 4000 <= peak(lambda: torch.empty(1000).add_(1)) < 4064
    assert 6000 <= peak(lambda: (torch.empty(1000), torch.empty(500))) < 6064
    assert 4000 <= peak(lambda: [len(torch.empty(size)) for size in (500, 1000, 500)]) < 4064


@TYPES
@pytest.mark.parametrize("kind", ["nested", "none"])
@pytest.mark.parametrize("M", [6000, 512, 100])
@pytest.mark.parametrize("outputs", [1152, 1024])
@pytest.mark.parametrize("one_pass", [True, False])
def test_scratch(
    one_pass: bool,
    outputs: int,
    M: int,
    kind: str,
    mora_type: int | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Allocated at most, beyond y and beyond dx: with one block in the middle z; composed, with a base, u
    too, with several blocks of a row block, and what is before that, of a part of it; never anything as large
    as the whole middle, which an eager composition makes several times."""
    monkeypatch.setattr(cpu, "_in_one_pass", lambda rows, size: one_pass)
    P, rank = 1024, 32
    weight = base(kind, torch.bfloat16, outputs, P)
    x = torch.randn(M, P).bfloat16().requires_grad_()
    o = {"x": x, "matrix": torch.randn(rank, rank).requires_grad_(), "bias": torch.randn(outputs)}
    grad = torch.randn(M, outputs).bfloat16()

    def equal_parts(rows: int, row_bytes: int) -> int:
        """As few as there can be of 2 MB."""
        return -(-rows // -(-rows // ((1 << 21) // row_bytes)))

    if mora_type in (6, "decoupling"):
        # the middle of x, of dY, of g M not yet turned back, of what is added: none where a tensor is it
        square, turned = outputs == P, mora_type == 6
        block = M if kind == "none" else -(-M // -(-M // 384))
        forward = backward = 0  # with a base, in memory of the kernels
        if not one_pass:
            forward = backward = 0 if kind == "none" else 4 * P * block
            part = equal_parts(block, 6 * P)
            forward += 2 * P * part * turned + 4 * P * part * (kind == "none" and not square)
            backward += 2 * P * part * (not square) + 4 * P * part * turned
            middles = turned + (not square)  # for dM
            backward = max(backward, 2 * P * middles * equal_parts(M, 2 * P * max(1, middles)))
        # what the docstrings say
        between = 0 if kind == "none" or one_pass else 4 * P * min(M, 384)
        assert forward <= between + (0 if one_pass else 1 << 21)
        assert backward <= between + (0 if one_pass else 1 << 22)
    else:
        forward = backward = M * rank * (2 if one_pass else 2 + 4)
    small = 1 << 15  # dM twice in fp32, the table of cosines and, once, what makes it
    y: list[Tensor] = []
    most = peak(lambda: y.append(run(o, weight, mora_type, outputs)))
    assert 2 * M * outputs + forward <= most <= 2 * M * outputs + forward + small
    y = [run(o, weight, mora_type, outputs)]
    most = peak(lambda: torch.autograd.grad(y[0], (x, o["matrix"]), grad))
    assert 2 * M * P + backward <= most <= 2 * M * P + backward + small


@TYPES
@BASES
@pytest.mark.parametrize("at", ["start", "end"])
def test_no_access_outside_of_the_operands(at: str, kind: str, mora_type: int | str, isa: str) -> None:
    """Operands that end, or begin, at a forbidden page: an access past them would end the process."""
    weight = base(kind)
    if isinstance(weight, Tensor):
        weight = guarded(weight, at)
    elif weight is not None:
        tensors, structure = torch.utils._pytree.tree_flatten(weight)
        weight = torch.utils._pytree.tree_unflatten([guarded(tensor, at) for tensor in tensors], structure)
    for M in (1, 3, 33):
        o = {name: guarded(t.detach(), at).requires_grad_() for name, t in make(M).items()}
        grad = torch.randn(M, N)
        found = step(o, weight, mora_type, guarded(grad, at))
        bias, scaling = (None, 1.0) if weight is None else (o["bias"], 0.75)
        expected = bounds.mora(o["x"], o["matrix"], mora_type, N, weight, scaling, bias, grad)
        for name, tensor in found.items():
            bounds.check(name, tensor, expected[name])


# ---- bits


@TYPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nested", "none"])
def test_same_bits(kind: str, dtype: torch.dtype, mora_type: int | str, isa: str) -> None:
    """Run after run, whatever the thread count, and whatever the other rows hold."""
    weight = base(kind, dtype)
    before = torch.get_num_threads()
    try:
        for M in (1, 5, 70):
            o, grad = make(M, dtype), torch.randn(M, N).to(dtype)
            torch.set_num_threads(1)
            first = step(o, weight, mora_type, grad)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for name, tensor in step(o, weight, mora_type, grad).items():
                    assert torch.equal(tensor, first[name]), name
            for row, value in ((0, 100.0), (M // 2, torch.nan), (M - 1, torch.inf)):
                others = (torch.arange(M) != row)[:, None]
                x = torch.where(others, torch.full((), value), o["x"].detach().float()).to(dtype)
                second = step(
                    {**o, "x": x.requires_grad_()}, weight, mora_type, torch.where(others, -grad, grad)
                )
                assert torch.equal(second["y"][row], first["y"][row])
                assert torch.equal(second["x"][row], first["x"][row])
    finally:
        torch.set_num_threads(before)


@TYPES
@BASES
def test_inputs_stay_as_they_are(kind: str, mora_type: int | str, backend: str) -> None:
    o, weight = make(dtype=torch.bfloat16), base(kind, torch.bfloat16)
    grad = torch.randn(6, N).bfloat16()
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves((o, weight, grad)) if leaf is not None]
    before = [(leaf.detach().clone(), leaf._version) for leaf in leaves]
    step(o, weight, mora_type, grad)
    mora_delta(o["matrix"], K, N, mora_type)
    for leaf, (copy, version) in zip(leaves, before, strict=True):
        assert torch.equal(leaf, copy)
        assert leaf._version == version


@pytest.mark.parametrize("negated", ["x", "matrix", "bias", "weight", "grad"])
@pytest.mark.parametrize("mora_type", [1, 6])
def test_negative_bit_views(mora_type: int | str, negated: str) -> None:
    """z.conj().imag is a real tensor whose memory holds its negation."""
    o = {**{name: tensor.detach() for name, tensor in make().items()}, "weight": torch.randn(N, K)}
    o["grad"] = torch.randn(6, N)
    o[negated] = torch.complex(o[negated], o[negated]).conj().imag
    assert o[negated].is_neg()
    results = []
    for a in (o, {name: tensor.resolve_neg() for name, tensor in o.items()}):
        x = a["x"].requires_grad_()
        y = mora_linear(x, a["weight"], a["matrix"], mora_type, 0.5, a["bias"])
        results.append((y.detach(), *torch.autograd.grad(y, x, a["grad"])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("changed", ["x", "matrix", "weight"])
@pytest.mark.parametrize("mora_type", [1, 6])
def test_changed_operands_are_noticed(mora_type: int | str, changed: str) -> None:
    """Changed in place between forward and backward: autograd's version counter says so, where it matters."""
    weight = base("nested")
    assert isinstance(weight, QuantizedWeight)
    o = {name: tensor * 1.0 for name, tensor in make().items()}  # no leaves, so that they may be changed
    y = run(o, weight, mora_type)
    with torch.no_grad():
        (weight.packed if changed == "weight" else o[changed]).zero_()
    if changed == "x" and mora_type == 1:
        y.sum().backward()  # z stands in for it
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- torch's modes


@TYPES
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, mora_type: int | str) -> None:
    o, weight = make(), base("nested")

    def block(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(run({**o, "x": x}, weight, mora_type))

    plain = block(o["x"])
    expected = torch.autograd.grad(plain.square().sum(), list(o.values()))
    y = checkpoint(block, o["x"], use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    assert torch.equal(y, plain)
    y.square().sum().backward()
    for (name, tensor), gradient in zip(o.items(), expected, strict=True):
        assert tensor.grad is not None, name
        assert torch.equal(tensor.grad, gradient), name


@KINDS_OF_TYPE
@BASES
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast(cast: torch.dtype, kind: str, mora_type: int | str) -> None:
    """As F.linear: x (and a dense W) in autocast's dtype, gradients in their parameters' own."""
    o, weight = make(), base(kind)
    grad = torch.randn(6, N).to(cast)
    with torch.autocast("cpu", dtype=cast):
        y = run(o, weight, mora_type)
        again = run({**o, "x": o["x"].detach().to(cast)}, weight, mora_type)  # as a second layer's x
    assert y.dtype == cast
    W = weight.to(cast) if isinstance(weight, Tensor) else weight
    low = {**o, "x": o["x"].detach().to(cast).requires_grad_()}
    expected = step(low, W, mora_type, grad)
    assert torch.equal(y, expected["y"])
    assert torch.equal(again, expected["y"])
    inputs = inputs_of(o, weight)
    for name, gradient in zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad), strict=True):
        assert gradient.dtype == torch.float32, name
        assert torch.equal(gradient, expected[name].float()), name


@pytest.mark.parametrize("mora_type", [1, 6])
def test_autocast_of_a_trained_dense_weight(mora_type: int | str) -> None:
    """dW passes through the cast: the bf16 gradient, in W's own dtype."""
    o, weight = make(), torch.randn(N, K, requires_grad=True)
    low = weight.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(o, weight, mora_type)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, weight, grad)
    (expected,) = torch.autograd.grad(run({**o, "x": o["x"].bfloat16()}, low, mora_type), low, grad)
    assert torch.equal(found, expected.float())


def test_the_table_of_an_inference_is_good_for_training() -> None:
    """Type 6 keeps its cosines: made under inference_mode, they may still take part in a graph."""
    x, matrix = torch.randn(2, 22, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with torch.inference_mode():
        before = mora(x, matrix, 9, 6)
    y = mora(x, matrix, 9, 6)
    assert torch.equal(y, before)
    y.sum().backward()


@KINDS_OF_TYPE
@BASES
def test_double_backward_raises(kind: str, mora_type: int | str) -> None:
    """Each gradient is made of the other operand: a graph of it would be silently wrong. With that one frozen
    it is a constant, as it should be."""
    weight = base(kind)
    refused = f"^mora{'' if weight is None else '_linear'}: double backward is not implemented"
    y = run(make(), weight, mora_type)
    with pytest.raises(RuntimeError, match=refused):
        torch.autograd.grad(
            y.square().sum(), [leaf for leaf in leaves_of(y) if leaf.ndim == 2], create_graph=True
        )
    for first, second in (("x", "matrix"), ("matrix", "x"), ("x", "x"), ("matrix", "matrix")):
        o = {name: tensor.detach().requires_grad_(name in (first, second)) for name, tensor in make().items()}
        y = run(o, weight, mora_type)
        if first == second:
            (gradient,) = torch.autograd.grad(y.sum(), o[first], create_graph=True)
            assert not gradient.requires_grad
        else:
            with pytest.raises(RuntimeError, match=refused):
                torch.autograd.grad(y.sum(), o[first], create_graph=True)


def leaves_of(y: Tensor) -> list[Tensor]:
    assert y.grad_fn is not None
    return [node.variable for node, _ in y.grad_fn.next_functions if node is not None]  # type: ignore[attr-defined]


# ---- compilers


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def model(o: dict[str, Tensor], weight: Weight, mora_type: int | str) -> Tensor:
    # neighbours that every compiler computes to the bit
    return torch.nn.functional.relu(run({**o, "x": o["x"] * 1.5}, weight, mora_type))


def compiled_step(f: Callable[..., Tensor], o: dict[str, Tensor], *args: Any) -> list[Tensor]:
    y = f(o, *args)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(inputs_of(o, args[0]).values()))]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("y", "x", "matrix", "bias"), found, expected, strict=False):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    assert len(found) == len(expected)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("kind", "mora_type"), [("nested", 1), ("dense", 6), ("none", 2), ("nested", 6)])
def test_compiled_is_eager(kind: str, mora_type: int | str, compiler: str) -> None:
    """fullgraph, forward and backward: the same bits."""
    weight, o = base(kind), make()
    f = torch.compile(model, fullgraph=True, backend=compiler)
    assert_same(compiled_step(f, o, weight, mora_type), compiled_step(model, o, weight, mora_type))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("kind", "mora_type"),
    [*(("nested", mora_type) for mora_type in MORA_TYPES), ("dense", 1), ("none", 1), ("none", 6)],
)
def test_one_graph_for_every_number_of_rows(kind: str, mora_type: int | str) -> None:
    """Empty and single rows too."""
    weight = base(kind)
    f = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (6, 17, 1, 0):
        o = make(M)
        assert_same(compiled_step(f, o, weight, mora_type), compiled_step(model, o, weight, mora_type))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("mora_type", [1, 6])
def test_one_graph_for_every_number_of_columns(mora_type: int | str) -> None:
    """K symbolic, and N made of it: r̂ < K, r̂ > K, ragged and not."""
    f = torch.compile(
        lambda x, matrix: mora(x, matrix, x.shape[1] + 3, mora_type),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for columns in (22, 30, 7, 40):
        x, matrix = torch.randn(3, columns, requires_grad=True), torch.randn(R, R, requires_grad=True)
        found, expected = f(x, matrix), mora(x, matrix, columns + 3, mora_type)
        assert torch.equal(found, expected)
        gradients = (torch.autograd.grad(y.sum(), (x, matrix)) for y in (found, expected))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.usefixtures("_fresh_compiler")
@KINDS_OF_TYPE
def test_export(mora_type: int | str) -> None:
    layer = peftkern.nn.MoRALinear(K, N, mora_type=mora_type, weight=base("nested"), bias=torch.randn(N))
    torch.nn.init.normal_(layer.matrix)
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(layer, (torch.randn(6, K),), dynamic_shapes=({0: rows},))
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "peftkern.mora.default" in ops
    for M in (2, 6, 33):
        x = torch.randn(M, K)
        assert torch.equal(program.module()(x), layer(x))


def layouts(rows: int, columns: int) -> list[Tensor]:
    """Contiguous, permuted and sliced: fake strides are wrong for one of them, if at all."""
    return [
        torch.randn(rows, columns),
        torch.randn(columns, rows).t(),
        torch.randn(rows, 2 * columns + 1)[:, 1::2],
        torch.randn(1, columns).expand(rows, columns),
    ]


def flat(weight: Weight) -> tuple[Any, ...]:
    if not isinstance(weight, QuantizedWeight):
        return weight, None, None, None, None, None, "", 0, 0, 0, 0
    nested = weight.nested
    parts = (None, None, None) if nested is None else (nested.absmax, nested.code, nested.offset)
    sizes = (weight.quant_type, weight.blocksize, 0 if nested is None else nested.blocksize, N, K)
    return None, weight.packed, weight.absmax, *parts, *sizes


@pytest.mark.parametrize("layout", range(4))
def test_opcheck(layout: int) -> None:
    ops = torch.ops.peftkern
    x, grad, matrix = layouts(6, K)[layout], layouts(6, N)[layout], layouts(R, R)[layout]
    weight = flat(base(("nested", "dense", "none", "nested")[layout]))
    for kind, keep in (("1", True), ("2", False), ("6", True), ("truncation", True)):
        torch.library.opcheck(ops.mora, (x, matrix, None, *weight, N, kind, 0.5, keep))
        source = x if kind == "6" else torch.randn(6, R)
        for given in ((source, matrix), (None, matrix), (source, None)):
            torch.library.opcheck(ops.mora_backward, (grad, *given, *weight, K, R, kind, 0.5))


@KINDS_OF_TYPE
@BASES
def test_fake_results(kind: str, mora_type: int | str) -> None:
    """The fake result of every layout has the real one's shape, strides and dtype; the meta device works."""
    weight, matrix = base(kind), torch.randn(R, R)
    o = {"matrix": matrix, "bias": torch.randn(N)}
    for x in layouts(6, K):
        real = run({**o, "x": x}, weight, mora_type)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = run({**o, "x": mode.from_tensor(x)}, weight, mora_type)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    meta = {name: tensor.to("meta") for name, tensor in {**o, "x": torch.randn(6, K)}.items()}
    y = run(meta, None if weight is None else weight.to("meta"), mora_type)
    assert (y.is_meta, y.shape) == (True, (6, N))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@KINDS_OF_TYPE
@BASES
def test_functorch(kind: str, mora_type: int | str) -> None:
    """grad, vmap over each argument, per-sample and batched gradients: autograd's and a loop's bits."""
    weight, o = base(kind), make()
    func = torch.func

    def f(x: Tensor, matrix: Tensor) -> Tensor:
        return run({**o, "x": x, "matrix": matrix}, weight, mora_type)

    def loss(x: Tensor, matrix: Tensor) -> Tensor:
        return f(x, matrix).square().sum()

    x, matrix = o["x"], o["matrix"]
    found = func.grad(loss, (0, 1))(x, matrix)
    for a, b in zip(found, torch.autograd.grad(loss(x, matrix), (x, matrix)), strict=True):
        assert torch.equal(a, b)
    many_x, many = torch.randn(3, 6, K), torch.randn(3, R, R)
    over_x = func.vmap(f, (0, None))(many_x, matrix)
    over_matrix = func.vmap(f, (None, 0))(x, many)
    over_both = func.vmap(f)(many_x, many)
    per_sample = func.vmap(func.grad(loss, 1), (0, None))(many_x, matrix)
    for j in range(3):
        assert torch.equal(over_x[j], f(many_x[j], matrix))
        assert torch.equal(over_matrix[j], f(x, many[j]))
        assert torch.equal(over_both[j], f(many_x[j], many[j]))
        (single,) = torch.autograd.grad(loss(many_x[j], matrix), matrix)
        assert torch.equal(per_sample[j], single)
    y, grads = f(x, matrix), torch.randn(2, 6, N)
    batched = torch.autograd.grad(y, (x, matrix), grads, is_grads_batched=True, retain_graph=True)
    for j in range(2):
        single = torch.autograd.grad(y, (x, matrix), grads[j], retain_graph=True)
        assert all(torch.equal(a[j], b) for a, b in zip(batched, single, strict=True))


@KINDS_OF_TYPE
@BASES
def test_higher_derivatives_of_functorch_raise(kind: str, mora_type: int | str) -> None:
    """Never silent zeros: jvp, dual numbers, and every second derivative."""
    weight = base(kind)
    o = {name: tensor.detach() for name, tensor in make().items()}

    def f(x: Tensor, matrix: Tensor) -> Tensor:
        return run({**o, "x": x, "matrix": matrix}, weight, mora_type)

    x, matrix = o["x"], o["matrix"]
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: f(x, matrix), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        f(forward_ad.make_dual(x, torch.ones_like(x)), matrix)
    for first, second in ((0, 0), (1, 1), (0, 1), (1, 0)):
        inner = torch.func.grad(lambda x, matrix: f(x, matrix).square().sum(), first)
        with pytest.raises(RuntimeError, match="double backward and forward mode are not implemented"):
            torch.func.grad(lambda *both, inner=inner: inner(*both).sum(), second)(x, matrix)
    for first, second in ((0, 1), (1, 0)):  # where dY is constant
        inner = torch.func.grad(lambda x, matrix: f(x, matrix).sum(), first)
        with pytest.raises(RuntimeError, match="double backward and forward mode are not implemented"):
            torch.func.grad(lambda *both, inner=inner: inner(*both).sum(), second)(x, matrix)


# ---- bad arguments


NAMES = r"expected one of 1, 2, 3, 4, 6, 'sharing', 'rotation', 'truncation', 'decoupling'"
BAD: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
    (
        {"x": torch.zeros(2, K).double()},
        TypeError,
        "x: expected dtype float32, bfloat16 or float16, got float64",
    ),
    ({"x": torch.zeros(())}, ValueError, r"x: expected shape \[\.\.\., \S+\], got shape \[\]"),
    ({"x": torch.zeros(2, K).to_sparse()}, TypeError, "x: expected a strided tensor"),
    ({"matrix": [1]}, TypeError, "matrix: expected a tensor, got list"),
    ({"matrix": torch.zeros(8, 7)}, ValueError, r"matrix: expected shape \[r̂, r̂\], .* got shape \[8, 7\]"),
    ({"matrix": torch.zeros(8)}, ValueError, r"matrix: expected shape \[r̂, r̂\], .* got shape \[8\]"),
    ({"matrix": torch.zeros(2, 8, 8)}, ValueError, r"matrix: expected shape .* got shape \[2, 8, 8\]"),
    ({"matrix": torch.zeros(0, 0)}, ValueError, r"matrix: expected shape .* r̂ ≥ 1, got shape \[0, 0\]"),
    ({"matrix": torch.zeros(8, 8).long()}, TypeError, "matrix: expected dtype .* got int64"),
    ({"matrix": torch.zeros(8, 8).double()}, TypeError, "matrix: expected dtype .* got float64"),
    ({"matrix": torch.zeros(8, 8, device="meta")}, ValueError, "matrix: expected device cpu, got meta"),
    ({"matrix": torch.zeros(7, 7), "mora_type": 6}, ValueError, r"matrix: expected an even size .* got .*7"),
    ({"matrix": torch.zeros(1, 1), "mora_type": "rotation"}, ValueError, "matrix: expected an even size"),
    *(
        ({"mora_type": bad}, ValueError, f"mora_type: {NAMES}, got {bad!r}")
        for bad in (0, 5, 7, -1, True, 1.0, None, "Sharing", "", "6")
    ),
]
BAD_LINEAR: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"x": torch.zeros(2, K + 1)}, ValueError, r"x: expected shape \[\.\.\., 40\], got shape \[2, 41\]"),
    ({"x": torch.zeros(2, K, device="meta")}, ValueError, "x: expected device cpu, got meta"),
    ({"weight": "nf4"}, TypeError, "weight: expected a tensor or a QuantizedWeight, got str"),
    ({"weight": torch.zeros(K)}, ValueError, r"weight: expected .* shape \[N, K\], got shape \[40\]"),
    ({"weight": torch.zeros(N, K).half()}, TypeError, "weight: expected dtype float32 as x's, got float16"),
    ({"weight": torch.zeros(N, K).char()}, TypeError, "weight: expected dtype .* got int8"),
    ({"bias": torch.zeros(N + 1)}, ValueError, r"bias: expected shape \[56\], got shape \[57\]"),
    ({"bias": 1.0}, TypeError, "bias: expected a tensor, got float"),
    ({"bias": torch.zeros(N, device="meta")}, ValueError, "bias: expected device cpu"),
    ({"scaling": torch.nan}, ValueError, "scaling: expected a finite number in float32's range, got nan"),
    ({"scaling": -torch.inf}, ValueError, "scaling: expected a finite number in float32's range, got -inf"),
    ({"scaling": 1e300}, ValueError, "scaling: expected a finite number in float32's range, got 1e"),
    ({"scaling": "2"}, TypeError, "scaling: expected a number, got str"),
    ({"scaling": torch.tensor(2.0)}, TypeError, "scaling: expected a number, got Tensor"),
]
BAD_SIZES: list[tuple[str, object, type[Exception], str]] = [
    ("out_features", 3.0, TypeError, "out_features: expected an integer, got float"),
    ("out_features", True, TypeError, "out_features: expected an integer, got bool"),
    ("out_features", None, TypeError, "out_features: expected an integer, got NoneType"),
    ("out_features", -1, ValueError, "out_features: expected at least 0, got -1"),
    *(
        ("out_features", size, ValueError, rf"out_features: expected at most 2\^48, got {size}")
        for size in (2**48 + 1, 2**62, 2**64, 2**70, 10**200)
    ),
]


def raises(
    op: Callable[..., object], arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        op(**arguments)
    if op is not mora_rank:
        with pytest.raises(error, match=message):
            peftkern.explain(op, **arguments)


@pytest.mark.parametrize(("change", "error", "message"), BAD + BAD_LINEAR)
def test_bad_arguments_of_mora_linear(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    weight = base("nested")
    good: dict[str, object] = {"x": torch.zeros(2, K), "weight": weight, "matrix": torch.zeros(8, 8)}
    raises(mora_linear, {**good, **change}, error, message)


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD + [({name: bad}, *what) for name, bad, *what in BAD_SIZES]
)
def test_bad_arguments_of_mora(change: dict[str, object], error: type[Exception], message: str) -> None:
    good: dict[str, object] = {"x": torch.zeros(2, K), "matrix": torch.zeros(8, 8), "out_features": N}
    raises(mora, {**good, **change}, error, message)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [row for row in BAD if "x" not in row[0] and "device" not in row[2]]
    + [({name: bad}, *what) for name, bad, *what in BAD_SIZES]
    + [
        ({"in_features": -2}, ValueError, "in_features: expected at least 0, got -2"),
        ({"in_features": 2**62}, ValueError, r"in_features: expected at most 2\^48, got 4611"),
    ],
)
def test_bad_arguments_of_mora_delta(change: dict[str, object], error: type[Exception], message: str) -> None:
    good: dict[str, object] = {"matrix": torch.zeros(8, 8), "in_features": K, "out_features": N}
    raises(mora_delta, {**good, **change}, error, message)


@pytest.mark.parametrize("name", ["in_features", "out_features", "r"])
def test_bad_arguments_of_mora_rank(name: str) -> None:
    good: dict[str, object] = {"in_features": K, "out_features": N, "r": 8}
    raises(mora_rank, {**good, name: 0}, ValueError, f"{name}: expected at least 1, got 0")
    raises(mora_rank, {**good, name: 2.5}, TypeError, f"{name}: expected an integer, got float")
    for size in (2**48 + 1, 10**200):
        raises(mora_rank, {**good, name: size}, ValueError, rf"{name}: expected at most 2\^48, got {size}")
    layer = {"in_features": K, "out_features": N, "r": 8, name: 2**70}
    raises_layer = pytest.raises(ValueError, match=rf"{name}: expected at most 2\^48, got")
    for kind in (peftkern.nn.LoRALinear, peftkern.nn.MoRALinear):
        with raises_layer:
            kind(**layer)
    raises(mora_rank, {**good, "mora_type": 5}, ValueError, f"mora_type: {NAMES}, got 5")


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (mora_linear, ("x", "weight", "matrix", "mora_type", "scaling", "bias")),
        (mora, ("x", "matrix", "out_features", "mora_type")),
        (mora_delta, ("matrix", "in_features", "out_features", "mora_type")),
        (mora_rank, ("in_features", "out_features", "r", "mora_type")),
    ],
)
def test_rubbish_raises_and_says_why(
    op: Callable[..., object], arguments: tuple[str, ...], backend: str
) -> None:
    """Rubbish in any argument: a TypeError or ValueError that names one, or a result; nothing else."""
    weight = base("nested")
    every = {
        "x": torch.randn(3, K), "weight": weight, "matrix": torch.randn(R, R), "mora_type": 1, "scaling": 1.0,
        "bias": torch.randn(N), "in_features": K, "out_features": N, "r": 8,
    }  # fmt: skip
    good = {name: every[name] for name in arguments}
    op(**good)
    fitting = [6, True, "decoupling", torch.zeros(N, K)]  # for one argument or another
    rubbish = [
        None, 0, -1, 2**62, 2**70, 10**200, "x", b"x", [], {}, object(), float("nan"), float("inf"), 1e39,
        1 + 2j, torch.tensor(1.0), torch.zeros(0), torch.zeros(1, 1, 1), torch.zeros(K, N), torch.zeros(K),
        torch.zeros(R, R).double(), torch.zeros(R, R).char(), torch.zeros(R, R).to_sparse(),
        torch.zeros(R, R, dtype=torch.complex64), torch.zeros(R, R, device="meta"), torch.zeros(7, 3),
        torch.zeros(R, K, dtype=torch.float8_e4m3fn), torch.nn.Linear(K, N), *fitting,
        peftkern.quantize_4bit(torch.randn(K, N)), peftkern.quantize_4bit(torch.randn(1, 1)),
    ]  # fmt: skip
    chance = random.Random(0)
    messages = []
    for _ in range(1000):
        given = dict(good)
        for name in chance.sample(sorted(good), chance.choice((1, 1, 2))):
            given[name] = chance.choice(rubbish)
        try:
            op(**given)
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    # most of what was drawn fits nowhere: that little of it is refused would mean that nobody looks
    assert len(messages) > 700
    for message in messages:
        argument, _, rest = message.partition(": ")
        assert argument in good, message
        assert rest.startswith("expected "), message
        assert "got " in rest, message
