"""The promise of the README, a test for each sentence. The other files go into each op's depth."""

from __future__ import annotations

import os
import random
import re
import warnings
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from cases import fitting
from torch import Tensor

import peftkern
from peftkern import QuantizedWeight, dispatch, reference
from peftkern.backends import cpu
from peftkern.ops.library import fresh

N, K, R = 65, 130, 8  # odd on purpose: rows end inside bytes' vectors, blocks straddle rows
SETTINGS = [("nf4", 64, False), ("nf4", 64, True), ("fp4", 32, False), ("fp4", 4096, True)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(dtype: torch.dtype, M: int = 33) -> dict[str, Tensor]:
    return {
        "x": torch.randn(M, K).to(dtype).requires_grad_(),
        "lora_A": torch.randn(R, K).requires_grad_(),
        "lora_B": torch.randn(N, R).requires_grad_(),
        "bias": torch.randn(N).requires_grad_(),
    }


def step(o: dict[str, Tensor], weight: Tensor | QuantizedWeight, grad: Tensor) -> dict[str, Tensor]:
    y = peftkern.lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], 0.5, o["bias"])
    found = torch.autograd.grad(y, list(o.values()), grad)
    return {"y": y.detach(), **dict(zip(o, found, strict=True))}


def mora_step(
    o: dict[str, Tensor], weight: Tensor | QuantizedWeight, grad: Tensor, mora_type: int
) -> dict[str, Tensor]:
    inputs = {"x": o["x"], "matrix": o["lora_A"][:, :R], "bias": o["bias"]}
    y = peftkern.mora_linear(inputs["x"], weight, inputs["matrix"], mora_type, 0.5, inputs["bias"])
    found = torch.autograd.grad(y, list(inputs.values()), grad)
    return {"y": y.detach(), **dict(zip(inputs, found, strict=True))}


def test_0_the_lines_of_use_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's own code, as it stands there."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (explained,) = re.findall(r"```\n>>> (.*?)\n(.*?)```", readme, re.DOTALL)
    use, model = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict[str, Any] = {}
    exec(use, names)
    assert names["y"].shape == (8, 4096)
    assert names["layer"].lora_A.grad.shape == (16, 4096)
    assert names["packed"].shape == (4096 * 4096 // 2, 1)
    assert torch.equal(names["W"].packed, names["packed"].view(-1))
    exec(explained[0], names)
    told = [re.sub(r"\(.*\)", "", line) for line in capsys.readouterr().out.splitlines()]
    assert told == [re.sub(r"\(.*\)", "", line) for line in explained[1].splitlines()]
    names["model"] = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    exec(model, names)
    names["model"](torch.randn(3, 48)).sum().backward()
    assert [type(layer).__name__ for layer in names["model"]] == ["LoRALinear", "ReLU", "LoRALinear"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_1_dequantize_is_bit_identical_on_every_backend(
    settings: tuple[str, int, bool], dtype: torch.dtype, backend: str
) -> None:
    weight = reference.quantize_4bit(torch.randn(N, K), *settings)
    found = peftkern.dequantize_4bit(weight, dtype)
    expected = reference.dequantize_4bit(weight, dtype)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("settings", SETTINGS)
def test_1_quantize_gives_bitsandbytes_bytes(settings: tuple[str, int, bool], backend: str) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    quant_type, blocksize, double_quant = settings
    W = torch.randn(N, K)
    packed, state = functional.quantize_4bit(
        W.cpu(), blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type
    )
    weight = peftkern.quantize_4bit(W, quant_type, blocksize, double_quant).to("cpu")
    assert torch.equal(weight.packed, packed.view(-1))
    assert torch.equal(weight.absmax, state.absmax)
    if weight.nested is not None:
        assert torch.equal(weight.nested.absmax, state.state2.absmax)
        assert torch.equal(weight.nested.code, state.state2.code)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [False, True])
def test_2_within_the_stated_bound_of_fp64(dense: bool, dtype: torch.dtype, backend: str) -> None:
    """Max and mean (tests/bounds.py derives both), for the value and each gradient by name."""
    for M in fitting((1, 2, 33, 70), (1, 17)):
        o, grad = operands(dtype, M), torch.randn(M, N).to(dtype)
        W = torch.randn(N, K).to(dtype)
        weight = W if dense else peftkern.quantize_4bit(W)
        expected = bounds.linear(o["x"], weight, o["bias"], grad, o["lora_A"], o["lora_B"], 0.5)
        for name, tensor in step(o, weight, grad).items():
            bounds.check(name, tensor, expected[name])
        for mora_type in (1, 6):
            matrix = o["lora_A"][:, :R]
            expected = bounds.mora(o["x"], matrix, mora_type, N, weight, 0.5, o["bias"], grad)
            for name, tensor in mora_step(o, weight, grad, mora_type).items():
                bounds.check(name, tensor, expected[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_3_same_input_same_bits(dtype: torch.dtype, isa: str) -> None:
    """Run after run, whatever the thread count, and whatever the other rows hold."""
    weight = peftkern.quantize_4bit(torch.randn(N, K))
    before = torch.get_num_threads()
    try:
        for M in (1, 17, 70):
            o, grad = operands(dtype, M), torch.randn(M, N).to(dtype)
            first = step(o, weight, grad)
            moras = [mora_step(o, weight, grad, mora_type) for mora_type in (1, 6)]
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for name, tensor in step(o, weight, grad).items():
                    assert torch.equal(tensor, first[name]), name
                for mora_type, one in zip((1, 6), moras, strict=True):
                    for name, tensor in mora_step(o, weight, grad, mora_type).items():
                        assert torch.equal(tensor, one[name]), name
            for row in {0, M // 2, M - 1}:
                others = torch.arange(M) != row
                x = o["x"].detach().clone()
                x[others] = torch.randn(M - 1, K).to(dtype) * 100
                rescaled = torch.where(others[:, None], grad * 50, grad)
                second = step({**o, "x": x.requires_grad_()}, weight, rescaled)
                assert torch.equal(second["y"][row], first["y"][row])
                assert torch.equal(second["x"][row], first["x"][row])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("M", [1, 40])
def test_3_same_bits_where_the_caller_flushes_subnormals(M: int, isa: str) -> None:
    """The mode belongs to a thread: the workers take on the caller's for the call."""
    rows, columns = 512, 512  # enough work to be shared out
    weight = peftkern.quantize_4bit(torch.randn(rows, columns))
    x = torch.full((M, columns), 1e-39)
    before = torch.get_num_threads()
    try:
        results = {}
        for flush in (False, True):
            if not torch.set_flush_denormal(flush):
                pytest.skip("this CPU cannot flush subnormals")
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                results[flush, threads] = [peftkern.linear_4bit(x, weight) for _ in range(3)]
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    for flush in (False, True):
        for threads in (1, 2, 4):
            for y in results[flush, threads]:
                assert torch.equal(y, results[flush, 1][0])
    assert results[False, 1][0].abs().max() > 0
    assert results[True, 1][0].abs().max() == 0


def test_4_bad_arguments_raise_and_say_why() -> None:
    """Rubbish in any argument: a TypeError or ValueError that names one, or a result; nothing else."""
    weight = peftkern.quantize_4bit(torch.randn(N, K))
    good = {
        "x": torch.randn(3, K),
        "weight": weight,
        "lora_A": torch.randn(R, K),
        "lora_B": torch.randn(N, R),
        "scaling": 1.0,
        "bias": torch.randn(N),
        "dropout": 0.0,
    }
    rubbish = [
        None, 0, -1, 2**70, True, "x", b"x", [], {}, object(), float("nan"), float("inf"), 1e39, 1 + 2j,
        torch.tensor(1.0), torch.zeros(0), torch.zeros(1, 1, 1), torch.zeros(N, K), torch.zeros(K, N),
        torch.zeros(K), torch.zeros(R, K).double(), torch.zeros(R, K).char(), torch.zeros(R, K).to_sparse(),
        torch.zeros(R, K, dtype=torch.complex64), torch.zeros(R, K, device="meta"), torch.zeros(N, R).bool(),
        torch.zeros(R, K, dtype=torch.float8_e4m3fn), torch.nn.Linear(K, N), weight,
        peftkern.quantize_4bit(torch.randn(K, N)), peftkern.quantize_4bit(torch.randn(1, 1)),
    ]  # fmt: skip
    chance = random.Random(0)
    messages = []
    for _ in range(1500):
        arguments = dict(good)
        for name in chance.sample(sorted(good), chance.choice((1, 1, 2))):
            arguments[name] = chance.choice(rubbish)
        try:
            peftkern.lora_linear(**arguments)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    assert len(messages) > 1000
    for message in messages:
        argument, _, rest = message.partition(": ")
        assert argument in good, message
        assert rest.startswith("expected "), message
        assert "got " in rest, message


def test_5_no_silent_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced backend runs or raises; without the extension a warning comes before the first slow result."""
    x, weight = torch.randn(3, K), peftkern.quantize_4bit(torch.randn(N, K))
    monkeypatch.setattr(cpu, "_missing", "the extension is not there")
    monkeypatch.setattr(dispatch, "_found", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    with peftkern.use_backend("cpu"), pytest.raises(RuntimeError, match="cpu: the extension is not there"):
        peftkern.linear_4bit(x, weight)
    with pytest.warns(RuntimeWarning, match="slow reference backend"):
        peftkern.linear_4bit(x, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftkern.linear_4bit(x, weight)


@pytest.mark.parametrize("dense", [False, True])
def test_5_no_mutation_of_an_input(dense: bool, backend: str) -> None:
    W = torch.randn(N, K)
    weight = W if dense else peftkern.quantize_4bit(W, double_quant=True)
    o, grad = operands(torch.float32), torch.randn(33, N)
    leaves, _ = torch.utils._pytree.tree_flatten((W, weight, o, grad))
    before = [(leaf.detach().clone(), leaf._version) for leaf in leaves]
    step(o, weight, grad)
    for mora_type in (1, 6):
        mora_step(o, weight, grad, mora_type)
    peftkern.lora_linear(o["x"], weight, o["lora_A"], o["lora_B"], 1.0, None, 0.5)
    peftkern.merge(weight, torch.randn(N, K))
    if isinstance(weight, QuantizedWeight):
        peftkern.dequantize_4bit(weight)
    for leaf, (copy, version) in zip(leaves, before, strict=True):
        assert torch.equal(leaf, copy)
        assert leaf._version == version


@pytest.mark.skipif(os.environ.get("PEFTKERN_POISON") == "0", reason="PEFTKERN_POISON=0: nothing is filled")
def test_what_an_op_allocates_is_poisoned_here() -> None:
    """Or no test would see an element that a kernel leaves out."""
    for like in (torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)):
        assert fresh(like, 3, 5).isnan().all()
        assert fresh(like, 3, 5, torch.float16).isnan().all()
        assert torch.empty_like(like).isnan().all()
