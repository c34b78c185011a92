"""The oracle itself: gradcheck in fp64, bitsandbytes where that is right, the dropout mask's statistics."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes as bnb
import bounds
import pytest
import torch
from torch import Tensor

from peftkern import QuantizedWeight, reference
from peftkern.formats import CODES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def fp64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def quantized(rows: int, columns: int, **settings: Any) -> QuantizedWeight:
    return reference.quantize_4bit(torch.randn(rows, columns), **settings)


# ---- gradients


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", sorted(CODES))
def test_gradcheck_linear_4bit(quant_type: str, nested: bool) -> None:
    weight = quantized(7, 9, quant_type=quant_type, blocksize=32, double_quant=nested)
    assert torch.autograd.gradcheck(
        lambda x, b: reference.linear_4bit(x, weight, b), (fp64(2, 3, 9), fp64(7))
    )
    assert torch.autograd.gradgradcheck(lambda x: reference.linear_4bit(x, weight), (fp64(3, 9),))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_lora_linear(dropout: float) -> None:
    weight = quantized(7, 9)

    def op(x: Tensor, A: Tensor, B: Tensor, b: Tensor) -> Tensor:
        return reference.lora_linear(x, weight, A, B, 1.7, b, dropout, seed=11)

    arguments = (fp64(2, 3, 9), fp64(3, 9), fp64(7, 3), fp64(7))
    assert torch.autograd.gradcheck(op, arguments)
    assert torch.autograd.gradgradcheck(op, arguments)


def test_gradcheck_dense_base() -> None:
    def op(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return reference.lora_linear(x, W, A, B, 0.5)

    assert torch.autograd.gradcheck(op, (fp64(4, 5), fp64(6, 5), fp64(2, 5), fp64(6, 2)))


def test_gradcheck_matmul_delta_merge() -> None:
    weight = quantized(5, 6)
    for transposed, inner, outputs in ((False, 6, 5), (True, 5, 6)):

        def op(x: Tensor, t: Tensor, u: Tensor, b: Tensor, transposed: bool = transposed) -> Tensor:
            return reference.matmul(x, weight, transposed, 0.3, t, u, b)

        assert torch.autograd.gradcheck(op, (fp64(3, inner), fp64(3, 2), fp64(outputs, 2), fp64(outputs)))
    assert torch.autograd.gradcheck(lambda A, B: reference.lora_delta(A, B, 2.5), (fp64(2, 6), fp64(5, 2)))
    assert torch.autograd.gradcheck(lambda w, d: reference.merge(w, d), (fp64(5, 6), fp64(5, 6)))


# ---- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_linear_4bit_is_the_dense_product(dtype: torch.dtype, nested: bool) -> None:
    """F.linear in fp64 on the decoded weight; in x's own dtype it keeps the kernels' bound."""
    weight = quantized(33, 70, double_quant=nested)
    x, b = torch.randn(2, 5, 70).to(dtype), torch.randn(33).to(dtype)
    dense = reference.dequantize_4bit(weight, torch.float64)
    exact = torch.nn.functional.linear(x.double(), dense, b.double())
    # two fp64 sums of 71 terms, in whatever order: 2 √71 · 2^-53 of partial sums below 50
    assert torch.allclose(reference.linear_4bit(x.double(), weight, b), exact, rtol=1e-14, atol=1e-13)
    y = reference.linear_4bit(x, weight, b)
    assert y.dtype == dtype
    bounds.check("y", y.flatten(0, 1), bounds.linear(x.flatten(0, 1), weight, b)["y"])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", sorted(CODES))
def test_linear_4bit_is_that_of_bitsandbytes(quant_type: str, nested: bool) -> None:
    """K a multiple of the blocksize, where its decoder is right."""
    layer = bnb.nn.Linear4bit(128, 48, quant_type=quant_type, compress_statistics=nested).to("cpu")
    weight = QuantizedWeight.from_bitsandbytes(layer.weight, layer.weight.quant_state)
    x = torch.randn(6, 128, requires_grad=True)
    y = layer(x)
    grad = torch.randn(6, 48)
    (dx,) = torch.autograd.grad(y, x, grad)
    ours = x.detach().clone().requires_grad_()
    z = reference.linear_4bit(ours, weight, layer.bias)
    (dz,) = torch.autograd.grad(z, ours, grad)
    expected = bounds.linear(x, weight, layer.bias, grad)
    for name, one, other in (("y", y, z), ("x", dx, dz)):
        bounds.check(name, one, expected[name])
        bounds.check(name, other, expected[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_linear_is_its_formula(dtype: torch.dtype, dropout: float) -> None:
    weight = quantized(40, 66)
    x, A, B, b = torch.randn(9, 66).to(dtype), torch.randn(4, 66), torch.randn(40, 4), torch.randn(40)
    arguments = [x.requires_grad_(), A.requires_grad_(), B.requires_grad_(), b.requires_grad_()]
    y = reference.lora_linear(x, weight, A, B, 0.25, b, dropout, seed=-3)
    grad = torch.randn(9, 40).to(dtype)
    found = dict(zip(("x", "lora_A", "lora_B", "bias"), torch.autograd.grad(y, arguments, grad), strict=True))
    mask = reference.dropout_mask(-3, x.shape, dropout) if dropout else None
    expected = bounds.linear(x, weight, b, grad, A, B, 0.25, dropout, mask)
    for name, actual in (found | {"y": y}).items():
        bounds.check(name, actual, expected[name])


def test_lora_linear_draws_its_seed_from_torch() -> None:
    weight = quantized(8, 64)
    x, A, B = torch.randn(16, 64), torch.randn(2, 64), torch.randn(8, 2)
    torch.manual_seed(5)
    y = reference.lora_linear(x, weight, A, B, dropout=0.5)
    other = reference.lora_linear(x, weight, A, B, dropout=0.5)
    torch.manual_seed(5)
    seed = reference.draw_seed()
    assert torch.equal(reference.lora_linear(x, weight, A, B, dropout=0.5, seed=seed), y)
    assert not torch.equal(other, y)
    for p in (1.1, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"dropout: expected 0 <= dropout <= 1"):
            reference.lora_linear(x, weight, A, B, dropout=p)


def test_dropout_of_one_is_the_base_alone() -> None:
    """Everything that the op takes, the oracle takes: p = 1 drops all of the adapter's input."""
    weight = quantized(8, 64)
    x, A, B = (torch.randn(shape, requires_grad=True) for shape in ((16, 64), (2, 64), (8, 2)))
    y = reference.lora_linear(x, weight, A, B, dropout=1.0)
    assert torch.equal(y, reference.linear_4bit(x, weight))
    for gradient in torch.autograd.grad(y.sum(), (A, B)):
        assert not bool(gradient.any())


def test_a_dropped_infinity_is_zero() -> None:
    """In the adapter's branch, that is: the base product sees every x."""
    mask = reference.dropout_mask(1, (16, 64), 0.5)
    x = torch.where(mask, 1.0, math.inf)
    base = torch.zeros(8, 64)
    A, B = torch.randn(2, 64), torch.randn(8, 2)
    assert torch.isfinite(reference.matmul(torch.where(mask, x, 0.0), A)).all()
    with_infinity = reference.lora_linear(x, base, A, B, dropout=0.5, seed=1)
    assert with_infinity.isnan().all()  # 0 · Inf of the base
    clean = reference.lora_linear(mask.float(), base, A, B, dropout=0.5, seed=1)
    assert torch.equal(clean, reference.matmul(reference.matmul(mask.float(), A, alpha=2.0), B))


def test_merge_and_delta() -> None:
    A, B = torch.randn(4, 66), torch.randn(40, 4)
    delta = reference.lora_delta(A, B, 0.5)
    assert torch.allclose(delta, 0.5 * B @ A)
    assert reference.lora_delta(A.bfloat16(), B.bfloat16()).dtype == torch.bfloat16
    dense = torch.randn(40, 66, dtype=torch.bfloat16)
    assert torch.equal(reference.merge(dense, delta), (dense.float() + delta).bfloat16())
    for nested in (False, True):
        weight = reference.quantize_4bit(dense, "fp4", 32, nested)
        merged = reference.merge(weight, delta)
        assert isinstance(merged, QuantizedWeight)
        assert (merged.quant_type, merged.blocksize, merged.dtype) == ("fp4", 32, torch.bfloat16)
        assert (merged.nested is not None) is nested
        total = reference.dequantize_4bit(weight, torch.float32) + delta
        again = reference.quantize_4bit(total.bfloat16(), "fp4", 32, nested)
        assert torch.equal(merged.packed, again.packed)


def test_autocast_casts_x_and_nothing_else() -> None:
    weight = quantized(8, 64)
    x, A, B = torch.randn(4, 64), torch.randn(2, 64), torch.randn(8, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = reference.linear_4bit(x, weight)
        z = reference.lora_linear(x, weight, A, B)
    assert torch.equal(y, reference.linear_4bit(x.bfloat16(), weight))
    assert torch.equal(z, reference.lora_linear(x.bfloat16(), weight, A, B))


# ---- the dropout mask


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def keep(seed: int, index: int, p: float) -> bool:
    seed %= 2**64
    k0 = mix(((seed % 2**32) + mix(((seed >> 32) + 0x9E3779B9) % 2**32)) % 2**32)
    k1 = mix((k0 + (index >> 32) + 0x85EBCA6B) % 2**32)
    return mix((mix((index % 2**32) ^ k0) + k1) % 2**32) < round((1 - p) * 2**32)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 123456789012345])
def test_mask_is_its_formula(seed: int) -> None:
    """In Python's integers. And a known answer, for those who write it in another language."""
    for p in (0.0, 0.1, 0.5, 0.999, 1.0):
        expected = [keep(seed, index, p) for index in range(60)]
        assert reference.dropout_mask(seed, (4, 15), p).flatten().tolist() == expected
        assert reference.dropout_mask(torch.tensor(seed), (60,), p).tolist() == expected
    assert reference.dropout_mask(seed, (3, 0, 5), 0.5).shape == (3, 0, 5)


def test_mask_known_answer() -> None:
    bits = "".join("01"[kept] for kept in reference.dropout_mask(42, (64,), 0.5).tolist())
    assert int(bits, 2) == 0xE3D6C8090FF2B430


def test_mask_beyond_32_bits_of_index() -> None:
    """By the formula: the elements past index 2^32 have a mask of their own."""
    seed, p = 9, 0.5
    low = [keep(seed, index, p) for index in range(256)]
    high = [keep(seed, 2**32 + index, p) for index in range(256)]
    assert abs(sum(a == b for a, b in zip(low, high, strict=True)) - 128) < 7 * 8


def agreement(a: Tensor, b: Tensor) -> float:
    """How many standard deviations the count of equal elements is off, for independent masks of p = 1/2."""
    count = a.numel()
    return abs((a == b).sum().item() - count / 2) / math.sqrt(count / 4)


def test_mask_statistics() -> None:
    """Counts of independent coin flips within 5 standard deviations: one in 10^6, and the seeds are fixed."""
    shape = (256, 768)
    count = shape[0] * shape[1]
    masks = {}
    for seed in range(5):
        for p in (0.1, 0.5):
            mask = reference.dropout_mask(seed, shape, p)
            assert abs(mask.sum().item() - (1 - p) * count) < 5 * math.sqrt(p * (1 - p) * count)
            # of rows and of columns: the largest of 256 or 768 deviations
            for axis, length in ((1, shape[1]), (0, shape[0])):
                rate = mask.double().mean(axis) - (1 - p)
                assert rate.abs().max() < 5.5 * math.sqrt(p * (1 - p) / length)
                # their spread is that of a binomial: sample variance within 5 of its own standard deviations
                variance = rate.square().mean() * length / (p * (1 - p))
                assert abs(variance - 1) < 5 * math.sqrt(2.2 / rate.numel())
        masks[seed] = reference.dropout_mask(seed, shape, 0.5)
    flat = [mask.flatten() for mask in masks.values()]
    for i in range(len(flat)):
        for j in range(i):
            assert agreement(flat[i], flat[j]) < 5  # consecutive seeds
        for shift in (1, 2, 3, 16, 64, 767, 768, 769, 2 * 768, 4096, 65536):
            assert agreement(flat[i][shift:], flat[i][:-shift]) < 5  # neighbours, rows, columns
            assert agreement(flat[i][shift:], flat[i - 1][:-shift]) < 5  # shifted copies of another seed
    for bit in range(0, 64, 3):
        other = reference.dropout_mask(1 << bit if bit < 63 else -(1 << 63), shape, 0.5).flatten()
        assert agreement(flat[0], other) < 5  # seeds one bit apart


def test_mask_of_each_element_is_fair_over_seeds() -> None:
    """One element's bit over 4096 consecutive seeds; and pairs of elements are independent over them."""
    masks = torch.stack([reference.dropout_mask(seed, (64,), 0.5) for seed in range(4096)])
    rates = (masks.double().mean(0) - 0.5).abs().max().item()
    assert rates < 5 * math.sqrt(0.25 / 4096)
    signs = masks.double() * 2 - 1
    correlation = (signs.t() @ signs / 4096).fill_diagonal_(0).abs().max().item()
    assert correlation < 5.5 / math.sqrt(4096)
