"""What only a GPU can show: streams, captured graphs, devices. The values are the other suites' business."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import peftkern

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

N, K, R = 512, 1024, 16
NAMES = ("linear_4bit", "lora_linear", "mora 1", "mora 6")


Operands = dict[str, Tensor]
Layer = Callable[[Operands], Tensor]


def operands(device: str, M: int) -> Operands:
    shapes = {"x": (M, K), "lora_A": (R, K), "lora_B": (N, R), "matrix": (128, 128), "bias": (N,)}
    o = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    o["x"] = o["x"].bfloat16()
    return {name: tensor.requires_grad_() for name, tensor in o.items()}


def weight_of(device: str, N: int = N, K: int = K) -> peftkern.QuantizedWeight:
    generator = torch.Generator(device).manual_seed(0)
    W = torch.randn(N, K, device=device, generator=generator)
    return peftkern.quantize_4bit(W, double_quant=True)


def layers(device: str) -> dict[str, Layer]:
    weight = weight_of(device)
    return {
        "linear_4bit": lambda o: peftkern.linear_4bit(o["x"], weight, o["bias"]),
        "lora_linear": lambda o: peftkern.lora_linear(
            o["x"], weight, o["lora_A"], o["lora_B"], 0.5, o["bias"]
        ),
        "mora 1": lambda o: peftkern.mora_linear(o["x"], weight, o["matrix"], 1, 0.5, o["bias"]),
        "mora 6": lambda o: peftkern.mora_linear(o["x"], weight, o["matrix"], 6, 0.5, o["bias"]),
    }


def step(layer: Layer, o: Operands) -> list[Tensor]:
    """y and every gradient there is; dY is y itself."""
    y = layer(o)
    found = torch.autograd.grad(y, list(o.values()), y.detach(), allow_unused=True)
    return [y.detach(), *(gradient for gradient in found if gradient is not None)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t.to(s.device)) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("M", [1, 64, 300, 2048])
def test_the_same_bits_on_every_run_and_stream(M: int, name: str) -> None:
    o, layer = operands("cuda", M), layers("cuda")[name]
    assert peftkern.explain("linear_4bit", o["x"], weight_of("cuda")).backend == "triton"
    first = step(layer, o)
    assert equal(first, step(layer, o))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = step(layer, o)
    torch.cuda.current_stream().wait_stream(side)
    assert equal(first, there)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("M", [1, 64, 300, 2048])
def test_a_captured_graph_gives_the_same_bits(M: int, name: str) -> None:
    o, layer = operands("cuda", M), layers("cuda")[name]
    first = step(layer, o)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, o)
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    assert equal(first, captured)


@pytest.mark.parametrize("name", NAMES)
def test_memory_that_is_not_zero(name: str) -> None:
    """What a kernel does not write, or reads before it does, would be NaN."""
    o, layer = operands("cuda", 300), layers("cuda")[name]
    first = step(layer, o)
    poison = torch.full((64 << 20,), torch.nan, device="cuda")
    del poison  # the allocator hands these bytes out next
    assert equal(first, step(layer, o))
    assert all(bool(tensor.isfinite().all()) for tensor in first)


def test_dropout_of_a_captured_graph_draws_anew() -> None:
    """The seed is drawn on the device: each replay has a mask of its own, forward and backward the same."""
    weight = weight_of("cuda")
    eye = torch.eye(R, K, device="cuda"), torch.eye(N, R, device="cuda")
    x = torch.ones(64, K, device="cuda").requires_grad_()

    def run() -> list[Tensor]:
        y = peftkern.lora_linear(x, weight, *eye, 1.0, None, 0.5) - peftkern.linear_4bit(x, weight)
        (dx,) = torch.autograd.grad(y.sum(), x)
        return [y.detach(), dx]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = run()
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(y[:, :R] > 1.0)
        assert torch.equal(masks[-1], dx[:, :R] > 1.0)
    assert not torch.equal(*masks)


def test_nothing_waits_for_the_device() -> None:
    o, every = operands("cuda", 64), layers("cuda").values()
    for layer in every:
        step(layer, o)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in every:
            step(layer, o)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    found = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(1)
        o = operands(device, 64)
        found.append([tensor for layer in layers(device).values() for tensor in step(layer, o)])
    assert equal(*found)


def test_no_dense_copy_of_the_weight_below_the_crossover() -> None:
    """At a size of which no sum over W is cut into parts: these would be as large as a copy."""
    M, side = 512, 4096
    weight, x = weight_of("cuda", side, side), torch.randn(M, side, device="cuda").bfloat16().requires_grad_()
    A, B = (torch.randn(shape, device="cuda", requires_grad=True) for shape in ((R, side), (side, R)))

    def step() -> list[Tensor]:
        y = peftkern.lora_linear(x, weight, A, B, 0.5)
        return [y.detach(), *torch.autograd.grad(y, (x, A, B), y.detach())]

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = sum(tensor.nbytes for tensor in step())
    # a copy has two bytes a weight; T, G, the scales and the parts of the thin products some 4 MB
    assert torch.cuda.max_memory_allocated() - before <= results + side * side
