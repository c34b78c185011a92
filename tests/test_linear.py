"""linear_4bit: values and gradients on every backend and level, and everything around the numbers."""

from __future__ import annotations

import bounds
import pytest
import torch
from cases import Case, cases, operands, unbatched
from guarded import guarded
from hypothesis import given, settings

import peftkern
from peftkern import QuantizedWeight, linear_4bit
from peftkern.backends import cpu
from peftkern.dispatch import find


@settings(max_examples=30)
@given(case=cases(dense=False))
def test_values_and_gradients(case: Case, backend: str) -> None:
    o = operands(case)
    assert isinstance(o.weight, QuantizedWeight)
    y = linear_4bit(o.x, o.weight, o.bias)
    assert y.dtype == case.dtype
    assert y.is_contiguous()
    assert y.shape == (*o.x.shape[:-1], case.N)
    inputs = {"x": o.x} if o.bias is None else {"x": o.x, "bias": o.bias}
    found = torch.autograd.grad(y, list(inputs.values()), o.grad.view(y.shape))
    expected = bounds.linear(unbatched(o.x), o.weight, o.bias, o.grad)
    bounds.check("y", unbatched(y), expected["y"], case.independent)
    for (name, tensor), gradient in zip(inputs.items(), found, strict=True):
        assert gradient.dtype == tensor.dtype, name
        bounds.check(name, unbatched(gradient) if name == "x" else gradient, expected[name], case.independent)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 0, 64), (0, 64), (1, 1, 1, 64), (3, 2, 2, 64)])
@pytest.mark.parametrize("permuted", [False, True])
def test_batch_shapes(shape: tuple[int, ...], permuted: bool, backend: str) -> None:
    """Any batch shape is the 2-D product of its rows, bit for bit; gradients have x's shape."""
    weight = peftkern.quantize_4bit(torch.randn(33, 64))
    x = torch.randn(shape)
    if permuted and x.dim() > 2:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    x.requires_grad_()
    y = linear_4bit(x, weight)
    assert y.shape == (*shape[:-1], 33)
    rows = x.detach().reshape(-1, 64).requires_grad_()
    expected = linear_4bit(rows, weight)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.reshape(-1, 33))
    assert torch.equal(y.reshape(-1, 33), expected)
    assert x.grad is not None
    assert rows.grad is not None
    assert x.grad.shape == x.shape
    assert torch.equal(x.grad.reshape(-1, 64), rows.grad)


def test_only_needed_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen x costs no dX: backward runs one thin product for the bias alone."""
    weight = peftkern.quantize_4bit(torch.randn(8, 64))
    x, bias = torch.randn(3, 64), torch.randn(8, requires_grad=True)
    y = linear_4bit(x, weight, bias)
    ran: list[str] = []

    def spy(primitive: str, device: torch.device, dtype: torch.dtype) -> object:
        ran.append(primitive)
        return find(primitive, device, dtype)

    monkeypatch.setattr("peftkern.ops.linear.find", spy)
    y.sum().backward()
    assert len(ran) == 1
    assert torch.equal(bias.grad, torch.full((8,), 3.0))  # type: ignore[arg-type]


def test_saves_the_packed_weight_by_reference() -> None:
    """Backward keeps the packed tensors themselves and nothing else: no x, no dequantized W."""
    weight = peftkern.quantize_4bit(torch.randn(64, 64), double_quant=True)
    assert weight.nested is not None
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        linear_4bit(torch.randn(3, 64, requires_grad=True), weight)
    nested = weight.nested
    parts = [weight.packed, weight.absmax, nested.absmax, nested.code, nested.offset]
    assert saved == [part.data_ptr() for part in parts]


def test_changed_weight_is_noticed() -> None:
    """Bytes changed between forward and backward: autograd's version counter says so."""
    weight = peftkern.quantize_4bit(torch.randn(8, 64))
    y = linear_4bit(torch.randn(3, 64, requires_grad=True), weight)
    weight.packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("M", [1, 2, 5, 17, 33, 70])
def test_no_access_outside_any_buffer(M: int, transposed: bool, at: str, isa: str) -> None:
    """Every buffer of the primitive between forbidden pages: a byte too far ends the process."""
    for N, K, R in [
        (1, 1, 1),
        (3, 33, 3),
        (33, 7, 1),
        (31, 130, 16),
        (65, 100, 5),
        (64, 256, 64),
        (16, 2, 2),
    ]:
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for double_quant in (False, True):
                weight = peftkern.quantize_4bit(torch.randn(N, K), blocksize=32, double_quant=double_quant)
                packed, absmax, nested, *rest = weight.kernel_args
                if nested is not None:
                    nested = (*(guarded(part, at) for part in nested[:3]), nested[3])
                inner, outputs = (N, K) if transposed else (K, N)
                out = guarded(torch.full((M, outputs), torch.nan, dtype=dtype), at)
                x = guarded(torch.randn(M, inner).to(dtype), at)
                t = guarded(torch.randn(M, R).to(dtype), at)
                u = guarded(torch.randn(outputs, R), at)
                bias = guarded(torch.randn(outputs), at)
                guarded4 = (guarded(packed, at), guarded(absmax, at), nested, *rest)
                cpu.matmul(out, x, guarded4, transposed, 1.0, t, u, bias)
                assert bool(out.isfinite().all())
        for columns_first in (False, True):
            thin = guarded(torch.full((R, M) if columns_first else (M, R), torch.nan), at)
            cpu.matmul(
                thin.t() if columns_first else thin,
                guarded(torch.randn(M, K), at),
                guarded(torch.randn(*((K, R) if transposed else (R, K))), at),
                transposed,
            )
            assert bool(thin.isfinite().all())


def test_misaligned_bytes(isa: str) -> None:
    """safetensors hands out any address (39 mod 64 was seen): same bits as from an aligned copy."""
    for dtype in (torch.bfloat16, torch.float32):
        weight = peftkern.quantize_4bit(torch.randn(33, 130), double_quant=True)
        buffer = torch.zeros(weight.packed.numel() + 128, dtype=torch.uint8)
        offset = (39 - buffer.data_ptr()) % 64
        packed = buffer[offset : offset + weight.packed.numel()].copy_(weight.packed)
        assert packed.data_ptr() % 64 == 39
        codes = torch.zeros(weight.absmax.numel() + 1, dtype=torch.uint8)[1:].copy_(weight.absmax)
        moved = QuantizedWeight(packed, codes, weight.shape, "nf4", 64, weight.dtype, weight.nested)
        x = torch.randn(5, 130).to(dtype)
        odd = torch.zeros(5 * 130 + 1, dtype=dtype)[1:].view(5, 130).copy_(x)
        assert torch.equal(linear_4bit(odd, moved), linear_4bit(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_stays_alone(value: float, dtype: torch.dtype, isa: str) -> None:
    """NaN or Inf in one row of x or dY: the other rows keep their bits."""
    weight = peftkern.quantize_4bit(torch.randn(65, 100))
    for M in (2, 17, 70):
        clean = torch.randn(M, 100).to(dtype).requires_grad_()
        dirty = clean.detach().clone()
        dirty[M // 2, 50] = value
        dirty.requires_grad_()
        grad = torch.randn(M, 65).to(dtype)
        bad_grad = grad.clone()
        bad_grad[M // 2] = value
        others = torch.arange(M) != M // 2
        y, bad_y = linear_4bit(clean, weight), linear_4bit(dirty, weight)
        assert torch.equal(y[others], bad_y[others])
        assert not bool(bad_y[M // 2].isfinite().any())
        (dx,) = torch.autograd.grad(y, clean, grad)
        (bad_dx,) = torch.autograd.grad(bad_y, dirty, bad_grad)
        assert torch.equal(dx[others], bad_dx[others])


def test_a_bad_block_stays_alone(isa: str) -> None:
    """A NaN in one block of W: only the outputs of the rows that hold it."""
    W = torch.randn(40, 64)
    W[7, 3] = torch.nan
    x = torch.randn(5, 64)
    y = linear_4bit(x, peftkern.quantize_4bit(W))
    bad = y.isnan().any(0)
    assert bad.tolist() == [row == 7 for row in range(40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 2, 4, 9, 24, 25])
def test_range_of_few_rows(M: int, dtype: torch.dtype, isa: str) -> None:
    """x up to 4e37, as the docstring promises: sums of unscaled codes stay finite, each code of them 1."""
    largest = torch.tensor(4e37).to(dtype)
    if largest > 4e37:
        largest *= 1 - torch.finfo(dtype).eps
    for K in (32, 330, 2112, 2784):
        for blocksize in (32, 64, 4096):
            weight = peftkern.quantize_4bit(torch.full((5, K), 1e-6), blocksize=blocksize)
            x = largest.expand(M, K).clone()
            expected = bounds.linear(x, weight)["y"]
            bounds.check("y", linear_4bit(x, weight), expected, False)  # one sum, many times


def test_negative_bit_views() -> None:
    """z.conj().imag is a real tensor whose memory holds its negation."""
    weight = peftkern.quantize_4bit(torch.randn(8, 64))
    x = torch.complex(torch.randn(3, 64), torch.randn(3, 64)).conj().imag
    assert x.is_neg()
    assert torch.equal(linear_4bit(x, weight), linear_4bit(x.resolve_neg(), weight))


def test_half_of_a_gigabyte_of_bytes() -> None:
    """2^31 + 2^16 weights: flat indices beyond int32, in forward and backward, on the rows at the far end."""
    N, K, block = 2**15 + 1, 2**16, 4096
    try:
        memory = _available_gib()
    except OSError as error:
        pytest.skip(f"needs 4 GiB of memory and cannot tell what there is: {error}")
    if memory < 4:
        pytest.skip(f"needs 4 GiB of memory, {memory:.1f} are available")
    torch.use_deterministic_algorithms(False)
    packed = torch.zeros(N * K // 2, dtype=torch.uint8)
    absmax = torch.zeros(N * K // block)
    # the last two rows hold real weights, every other one is code[0] * 0
    tail = peftkern.quantize_4bit(torch.randn(2, K), blocksize=block)
    packed[-K:] = tail.packed
    absmax[-tail.absmax.numel() :] = tail.absmax
    weight = QuantizedWeight(packed, absmax, (N, K), "nf4", block, torch.bfloat16)
    x = torch.randn(2, K).bfloat16()
    y = linear_4bit(x, weight)
    assert not bool(y[:, :-2].any())
    bounds.check("y", y[:, -2:], bounds.linear(x, tail)["y"])
    grad = torch.zeros(2, N, dtype=torch.bfloat16)
    grad[:, -2:] = torch.randn(2, 2).bfloat16()
    dx = torch.empty(2, K, dtype=torch.bfloat16)
    nothing = (None, None, None)
    row = find("linear_grad", x.device, x.dtype)
    row(dx, *nothing, grad, None, weight.kernel_args, *nothing, 1.0, None)
    bounds.check("x", dx, bounds.linear(x, tail, grad=grad[:, -2:])["x"])


def test_strides_beyond_32_bits(isa: str) -> None:
    """Rows 2^31 elements apart, in x and in out: pages in between are reserved, never touched."""
    torch.use_deterministic_algorithms(False)  # it would fill them
    weight = peftkern.quantize_4bit(torch.randn(33, 64))
    for dtype in (torch.bfloat16, torch.float32):
        try:
            far = torch.empty(2**31 + 64, dtype=dtype)
            out = torch.empty(2**31 + 64, dtype=dtype)
        except RuntimeError as error:
            pytest.skip(f"cannot reserve 16 GiB of address space: {error}")
        x = far.as_strided((2, 64), (2**31, 1)).copy_(torch.randn(2, 64))
        y = linear_4bit(x.contiguous(), weight)
        assert torch.equal(linear_4bit(x, weight), y)
        view = out.as_strided((2, 33), (2**31, 1))
        cpu.matmul(view, x, weight.kernel_args)
        assert torch.equal(view, y)


def _available_gib() -> float:
    with open("/proc/meminfo") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return kib / 2**20


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        (
            {"x": torch.zeros(2, 64, dtype=torch.float64)},
            TypeError,
            "x: expected dtype float32, .* got float64",
        ),
        ({"x": torch.zeros(2, 64, dtype=torch.int64)}, TypeError, "x: expected dtype float32, .* got int64"),
        ({"x": torch.zeros(2, 64, dtype=torch.complex64)}, TypeError, "x: expected dtype .* got complex64"),
        ({"x": torch.zeros(2, 65)}, ValueError, r"x: expected shape \[\.\.\., 64\], got shape \[2, 65\]"),
        ({"x": torch.zeros(64, 2)}, ValueError, r"x: expected shape \[\.\.\., 64\], got shape \[64, 2\]"),
        ({"x": torch.zeros(())}, ValueError, r"x: expected shape \[\.\.\., 64\], got shape \[\]"),
        (
            {"x": torch.zeros(2, 64, device="meta")},
            ValueError,
            "x: expected device cpu, got meta",
        ),
        (
            {"x": torch.eye(64).to_sparse()},
            TypeError,
            "x: expected a strided tensor, got layout torch.sparse_coo",
        ),
        ({"weight": torch.zeros(8, 64)}, TypeError, "weight: expected a QuantizedWeight, got Tensor"),
        ({"weight": None}, TypeError, "weight: expected a QuantizedWeight, got NoneType"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias: expected shape \[8\], got shape \[7\]"),
        ({"bias": torch.zeros(8, 1)}, ValueError, r"bias: expected shape \[8\], got shape \[8, 1\]"),
        ({"bias": torch.zeros(8, dtype=torch.int32)}, TypeError, "bias: expected dtype .* got int32"),
        (
            {"bias": torch.zeros(8, device="meta")},
            ValueError,
            "bias: expected device cpu, got meta",
        ),
        ({"bias": 1.0}, TypeError, "bias: expected a tensor, got float"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.zeros(2, 64),
        "weight": peftkern.quantize_4bit(torch.randn(8, 64)),
        "bias": None,
    }
    with pytest.raises(error, match=message):
        linear_4bit(**{**arguments, **change})  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        peftkern.explain("linear_4bit", **{**arguments, **change})
