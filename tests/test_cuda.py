"""What only a GPU can show: streams, captured graphs, devices. The values are the other suites' business."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import peftkern

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

N, K, R = 512, 1024, 16


def operands(device: str, M: int) -> tuple[Tensor, peftkern.QuantizedWeight, Tensor, Tensor, Tensor]:
    weight = peftkern.quantize_4bit(torch.randn(N, K, device=device), double_quant=True)
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16).requires_grad_()
    A = torch.randn(R, K, device=device).requires_grad_()
    B = torch.randn(N, R, device=device).requires_grad_()
    return x, weight, A, B, torch.randn(M, N, device=device, dtype=torch.bfloat16)


def step(o: tuple[Tensor, peftkern.QuantizedWeight, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    x, weight, A, B, grad = o
    y = peftkern.lora_linear(x, weight, A, B, 0.5)
    return y.detach(), *torch.autograd.grad(y, (x, A, B), grad)


@pytest.mark.parametrize("M", [1, 64, 300, 2048])
def test_the_same_bits_on_every_run_stream_and_replay(M: int) -> None:
    assert peftkern.explain("linear_4bit", *operands("cuda", M)[:2]).backend == "triton"
    o = operands("cuda", M)
    first = step(o)
    assert all(torch.equal(a, b) for a, b in zip(first, step(o), strict=True))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = step(o)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(first, there, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(o)
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


def test_nothing_waits_for_the_device() -> None:
    o = operands("cuda", 64)
    step(o)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(o)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    torch.manual_seed(1)
    here = step(operands("cuda:0", 64))
    torch.manual_seed(1)
    there = step(operands("cuda:1", 64))
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(here, there, strict=True))


def test_no_dense_copy_of_the_weight_below_the_crossover() -> None:
    o = operands("cuda", 512)
    step(o)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step(o)
    results = sum(tensor.nbytes for tensor in kept)
    # T, G and the parts of split sums, fp32 [splits, M, outputs] of the two thin products and of dA, dB
    scratch = 2 * 512 * R * 2 + 16 * 4 * 512 * R + 16 * 4 * R * K + 4 * N * K // 64
    assert torch.cuda.max_memory_allocated() - before <= results + scratch + N * K
