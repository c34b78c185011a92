"""peftkern._cpu itself: what reaches a kernel is checked; a refusal names the argument and what came."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from guarded import guarded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_cpu = pytest.importorskip("peftkern._cpu", reason="peftkern._cpu is not built", exc_type=ImportError)

M, K, N, R = 3, 96, 64, 4
BLOCKSIZE = 64


def packed_weight(double: bool = False, **changes: Any) -> tuple[Any, ...]:
    blocks = N * K // BLOCKSIZE
    parts: dict[str, Any] = {
        "packed": torch.zeros(N * K // 2, dtype=torch.uint8),
        "absmax": torch.zeros(blocks, dtype=torch.uint8) if double else torch.ones(blocks),
        "nested": None,
        "quant_type": "nf4",
        "blocksize": BLOCKSIZE,
        "N": N,
        "K": K,
    }
    if double:
        inner = {
            "absmax2": torch.ones(-(-blocks // 256)),
            "code": torch.zeros(256),
            "offset": torch.ones(()),
            "blocksize2": 256,
        }
        inner.update({key: changes.pop(key) for key in list(changes) if key in inner})
        parts["nested"] = tuple(inner.values())
    parts.update(changes)
    return tuple(parts.values())


def matmul(**changes: Any) -> Tensor:
    a: dict[str, Any] = {
        "out": torch.empty(M, N),
        "x": torch.randn(M, K),
        "weight": torch.randn(N, K),
        "transposed": False,
        "alpha": 1.0,
        "t": None,
        "u": None,
        "bias": None,
        "spread": None,
        "threads": 1,
    }
    a.update(changes)
    _cpu.matmul(*a.values())
    return a["out"]


def quantize(**changes: Any) -> None:
    a: dict[str, Any] = {
        "weight": torch.randn(N, K),
        "packed": torch.empty(N * K // 2, dtype=torch.uint8),
        "absmax": torch.empty(N * K // BLOCKSIZE),
        "quant_type": "nf4",
        "blocksize": BLOCKSIZE,
        "threads": 1,
    }
    a.update(changes)
    _cpu.quantize(*a.values())


def misaligned(*shape: int) -> Tensor:
    count = int(np.prod(shape))
    return torch.frombuffer(bytearray(4 * count + 1), dtype=torch.float32, count=count, offset=1).view(shape)


def fake(*shape: int) -> Tensor:
    with FakeTensorMode():
        return torch.empty(shape)


def without_memory(*shape: int) -> Tensor:
    x = torch.zeros(shape)
    x.untyped_storage().resize_(0)
    return x


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, *shape: int) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


# each gives something of this shape that must not reach a kernel
NOT_TENSORS: dict[str, Callable[..., Any]] = {
    "None": lambda *shape: None,
    "int": lambda *shape: 3,
    "list": lambda *shape: torch.zeros(shape).tolist(),
    "numpy": lambda *shape: np.zeros(shape, np.float32),
    "type": lambda *shape: torch.Tensor,
}
BAD_TENSORS: dict[str, Callable[..., Any]] = {
    "meta": lambda *shape: torch.empty(shape, device="meta"),
    "fake": fake,
    "float64": lambda *shape: torch.zeros(shape, dtype=torch.float64),
    "int32": lambda *shape: torch.zeros(shape, dtype=torch.int32),
    "int8": lambda *shape: torch.zeros(shape, dtype=torch.int8),
    "bool": lambda *shape: torch.zeros(shape, dtype=torch.bool),
    "uint8": lambda *shape: torch.zeros(shape, dtype=torch.uint8),
    "float8": lambda *shape: torch.zeros(shape).to(torch.float8_e4m3fn),
    "complex": lambda *shape: torch.zeros(shape, dtype=torch.complex64),
    "conjugate": lambda *shape: torch.zeros(shape, dtype=torch.complex64).conj(),
    "negative bit": lambda *shape: torch.zeros(shape, dtype=torch.complex64).conj().imag,
    "sparse": lambda *shape: torch.zeros(shape).to_sparse(),
    "quantized": lambda *shape: torch.quantize_per_tensor(torch.zeros(shape), 0.1, 0, torch.qint8),
    "zero tensor": lambda *shape: torch._efficientzerotensor(shape),
    "no memory": without_memory,
    "wrapper": Wrapper,
    "misaligned": misaligned,
    "one dimension more": lambda *shape: torch.zeros(1, *shape),
    "one row more": lambda *shape: torch.zeros(shape[0] + 1, *shape[1:]),
}
MATMUL_SHAPES = {"out": (M, N), "x": (M, K), "weight": (N, K), "t": (M, R), "u": (N, R), "bias": (N,)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("argument", "kind"),
    [(a, k) for a in MATMUL_SHAPES for k in (*NOT_TENSORS, *BAD_TENSORS) if (a, k) != ("bias", "None")],
)
def test_matmul_refuses(argument: str, kind: str) -> None:
    changes = {"t": torch.randn(M, R), "u": torch.randn(N, R), "bias": torch.randn(N)}
    bad = {**NOT_TENSORS, **BAD_TENSORS}[kind](*MATMUL_SHAPES[argument])
    # a shape that disagrees is reported for either of the two
    name = r"\w+" if kind.startswith("one") else f"(t, )?{argument}"
    expected = ValueError if kind in BAD_TENSORS or (kind == "None" and argument in "tu") else TypeError
    with pytest.raises(expected, match=rf"^{name}(, u)?: expected .*, got "):
        matmul(**{**changes, argument: bad})


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_packed_weight_is_accepted(nested: bool) -> None:
    out = torch.full((N, K), torch.nan)
    _cpu.dequantize(out, packed_weight(nested), 1)
    assert torch.equal(out, torch.full((N, K), -1.0))  # NF4 nibble 0 is -1; absmax 1 = 0 * 1 + 1
    assert matmul(weight=packed_weight(nested)).isfinite().all()


@pytest.mark.parametrize(
    ("nested", "change", "message"),
    [
        (
            False,
            {"packed": torch.zeros(N * K // 2 - 1, dtype=torch.uint8)},
            "packed: expected 3072 elements, got 3071",
        ),
        (
            False,
            {"packed": torch.zeros(N * K // 2 + 1, dtype=torch.uint8)},
            "packed: expected 3072 elements, got 3073",
        ),
        (
            False,
            {"packed": torch.zeros(N * K, dtype=torch.uint8)[::2]},
            "packed: expected a contiguous tensor",
        ),
        (False, {"packed": torch.zeros(N * K // 2)}, "packed: expected dtype torch.uint8, got torch.float32"),
        (
            False,
            {"packed": torch.zeros(N * K // 2, dtype=torch.int8)},
            "packed: expected dtype .*, got .*int8",
        ),
        (False, {"packed": None}, "packed: expected a torch.Tensor, got NoneType"),
        (False, {"absmax": torch.ones(95)}, "absmax: expected 96 elements, got 95"),
        (False, {"absmax": torch.ones(192)[::2]}, "absmax: expected a contiguous tensor"),
        (
            False,
            {"absmax": torch.ones(96).bfloat16()},
            "absmax: expected dtype torch.float32, got torch.bfloat16",
        ),
        (
            False,
            {"absmax": torch.ones(96, dtype=torch.uint8)},
            "absmax: expected dtype torch.float32, got torch.uint8",
        ),
        (False, {"absmax": torch.ones(96, device="meta")}, "absmax: expected a dense CPU tensor"),
        (False, {"quant_type": "nf5"}, 'quant_type: expected "nf4" or "fp4", got \'nf5\''),
        (False, {"quant_type": 4}, 'quant_type: expected "nf4" or "fp4", got 4'),
        (False, {"blocksize": 0}, "blocksize: expected a power of two from 32 to 4096, got 0"),
        (False, {"blocksize": 16}, "blocksize: expected .*, got 16"),
        (False, {"blocksize": 96}, "blocksize: expected .*, got 96"),
        (False, {"blocksize": 8192}, "blocksize: expected .*, got 8192"),
        (False, {"blocksize": -64}, "blocksize: expected .*, got -64"),
        (False, {"blocksize": 2**70}, "blocksize: expected an int of 64 bits, got 1180591620717411303424"),
        (False, {"blocksize": 64.0}, "blocksize: expected an int, got float"),
        (
            False,
            {"N": 2**40, "K": 2**40},
            "expected N and K whose product fits 63 bits, got 1099511627776 and",
        ),
        (False, {"N": -N, "K": -K}, "expected N and K whose product fits 63 bits, got -64 and -96"),
        (False, {"N": 2**62, "K": 1}, "packed: expected 2305843009213693952 elements, got 3072"),
        (False, {"N": K, "K": N}, r"weight: expected \[outputs, inner\] = \[64, 96\] .*, got \[96, 64\]"),
        (False, {"nested": (1, 2, 3)}, "nested: expected None or .*, got a tuple of 3"),
        (False, {"nested": 1}, "nested: expected None or .*, got a int"),
        (True, {"absmax": torch.ones(96)}, "absmax: expected dtype torch.uint8, got torch.float32"),
        (True, {"absmax": torch.ones(95, dtype=torch.uint8)}, "absmax: expected 96 elements, got 95"),
        (True, {"absmax2": torch.ones(2)}, "nested absmax: expected 1 elements, got 2"),
        (True, {"absmax2": torch.ones(0)}, "nested absmax: expected 1 elements, got 0"),
        (True, {"code": torch.zeros(255)}, "nested code: expected 256 elements, got 255"),
        (
            True,
            {"code": torch.zeros(256).half()},
            "nested code: expected dtype torch.float32, got torch.float16",
        ),
        (True, {"offset": torch.ones(2)}, "nested offset: expected 1 elements, got 2"),
        (True, {"offset": 1.0}, "nested offset: expected a torch.Tensor, got float"),
        (True, {"offset": torch.ones((), device="meta")}, "nested offset: expected a dense CPU tensor"),
        (True, {"blocksize2": 0}, "nested blocksize: expected a power of two"),
        (True, {"blocksize2": 255}, "nested blocksize: expected a power of two"),
    ],
)
def test_packed_weight_is_refused(nested: bool, change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        matmul(weight=packed_weight(nested, **change))


@pytest.mark.parametrize("weight", [(), (1, 2), packed_weight()[:6], (*packed_weight(), 1)], ids=len)
def test_weight_tuple_length(weight: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=rf"weight: expected \(packed, .*\), got a tuple of {len(weight)}"):
        matmul(weight=weight)
    with pytest.raises(TypeError, match="weight: expected"):
        _cpu.dequantize(torch.empty(N, K), list(weight), 1)


def test_matmul_sizes_that_disagree() -> None:
    with pytest.raises(ValueError, match=r"weight: expected shape \[96, 64\], got \[64, 96\]"):
        matmul(transposed=True)
    with pytest.raises(ValueError, match="t, u: expected both or neither, got only t"):
        matmul(t=torch.randn(M, R))
    with pytest.raises(ValueError, match=r"u: expected shape \[64, 4\], got \[64, 5\]"):
        matmul(t=torch.randn(M, R), u=torch.randn(N, R + 1))
    with pytest.raises(ValueError, match=r"bias: expected shape \[64\], got \[1, 64\]"):
        matmul(bias=torch.randn(1, N))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"threads": 0}, ValueError),
        ({"threads": -1}, ValueError),
        ({"threads": 10**6}, ValueError),
        ({"threads": 2**40}, TypeError),
        ({"threads": "2"}, TypeError),
        ({"threads": None}, TypeError),
        ({"transposed": None}, TypeError),
        ({"transposed": 1}, TypeError),
        ({"alpha": "1"}, TypeError),
        ({"alpha": None}, TypeError),
    ],
    ids=str,
)
def test_matmul_scalars(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        matmul(**change)


def test_out_must_not_share_memory() -> None:
    square = torch.randn(64, 64)
    with pytest.raises(ValueError, match=r"out: expected memory apart from .*, got memory shared with x"):
        matmul(out=square, x=square, weight=torch.randn(64, 64))
    with pytest.raises(ValueError, match="shared with weight"):
        matmul(out=square[:M], weight=square, x=torch.randn(M, 64))
    with pytest.raises(ValueError, match="shared with bias"):
        matmul(out=square[:M], weight=torch.randn(64, K), bias=square[1])
    for out in (torch.empty(1, N).expand(M, N), torch.empty(500).as_strided((M, N), (N - 1, 1))):
        with pytest.raises(ValueError, match=r"out: expected elements that do not share .* \[3, 64\]"):
            matmul(out=out)
    memory = torch.zeros(N * K)
    weight = packed_weight(packed=memory.view(torch.uint8)[: N * K // 2])
    with pytest.raises(ValueError, match="shared with weight packed"):
        _cpu.dequantize(memory, weight, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*NOT_TENSORS, *BAD_TENSORS, "bfloat16", "columns apart"])
def test_spread_values_are_refused(kind: str) -> None:
    bad: Callable[..., Any] = {
        **NOT_TENSORS,
        **BAD_TENSORS,
        "bfloat16": lambda *shape: torch.zeros(shape).bfloat16(),
        "columns apart": lambda m, p: torch.zeros(p, m).t(),
    }[kind]
    with pytest.raises(
        TypeError if kind in NOT_TENSORS else ValueError, match=r"^spread values: expected .*, got "
    ):
        matmul(spread=(bad(M, 8), False, N))


@pytest.mark.parametrize(
    ("spread", "error", "message"),
    [
        (torch.zeros(M, 8), TypeError, r"spread: expected None or \(values, grouped, length\), got a Tensor"),
        ((torch.zeros(M, 8), False), TypeError, "spread: expected .*, got a tuple of 2"),
        ((torch.zeros(M, 0), False, N), ValueError, r"values: expected 1 column or more, got \[3, 0\]"),
        ((torch.zeros(M - 1, 8), False, N), ValueError, r"values: expected shape \[3, 8\], got \[2, 8\]"),
        ((torch.zeros(M, 8), 1, N), TypeError, "spread grouped: expected a bool, got int"),
        ((torch.zeros(M, 8), None, N), TypeError, "spread grouped: expected a bool, got NoneType"),
        ((torch.zeros(M, 8), False, None), TypeError, "spread length: expected an int, got NoneType"),
        ((torch.zeros(M, 8), False, -1), ValueError, r"spread length: expected 0 to 2\^48, got -1"),
        ((torch.zeros(M, 8), False, 2**48 + 1), ValueError, r"length: expected 0 to 2\^48, got 2814749"),
        ((torch.zeros(M, 8), True, -1), ValueError, r"spread length: expected 0 to 2\^48, got -1"),
        ((torch.zeros(M, 8), True, 2**64), ValueError, "spread length: expected an int of 64 bits"),
    ],
)  # fmt: skip
def test_spread_is_refused(spread: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        matmul(spread=spread)


def test_spread_shares_no_memory_with_out() -> None:
    out = torch.empty(M, N)
    with pytest.raises(
        ValueError, match=r"out: expected memory apart from .*, got memory shared with spread"
    ):
        matmul(out=out, spread=(out[:, :8], False, N))


def test_dequantize_refuses() -> None:
    with pytest.raises(ValueError, match="out: expected 6144 elements, got 6143"):
        _cpu.dequantize(torch.empty(N * K - 1), packed_weight(), 1)
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        _cpu.dequantize(torch.empty(K, N).t(), packed_weight(), 1)
    with pytest.raises(ValueError, match=r"out: expected dtype .*, got torch.uint8"):
        _cpu.dequantize(torch.empty(N, K, dtype=torch.uint8), packed_weight(), 1)
    with pytest.raises(ValueError, match="out: expected a dense CPU tensor"):
        _cpu.dequantize(torch.empty(N, K, device="meta"), packed_weight(), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(K, N).t()}, "weight: expected a contiguous tensor"),
        ({"weight": torch.zeros(N, K, dtype=torch.float64)}, "weight: expected dtype"),
        ({"weight": torch.zeros(N, K, dtype=torch.uint8)}, "weight: expected dtype"),
        ({"weight": torch.zeros(N, K + 1)}, "packed: expected 3104 elements, got 3072"),
        ({"packed": torch.empty(3072)}, "packed: expected dtype torch.uint8"),
        ({"absmax": torch.empty(97)}, "absmax: expected 96 elements, got 97"),
        ({"absmax": torch.empty(96).double()}, "absmax: expected dtype"),
        ({"quant_type": "int4"}, "quant_type: expected"),
        ({"quant_type": None}, "quant_type: expected"),
        ({"blocksize": 100}, "blocksize: expected"),
        ({"threads": 0}, "threads: expected"),
    ],
)
def test_quantize_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(**change)


def test_quantize_outputs_apart() -> None:
    memory = torch.empty(N * K)
    with pytest.raises(ValueError, match=r"packed: expected memory apart .* weight"):
        quantize(weight=memory, packed=memory.view(torch.uint8)[: N * K // 2])
    with pytest.raises(ValueError, match=r"absmax: expected memory apart .* packed"):
        quantize(packed=memory.view(torch.uint8)[: N * K // 2], absmax=memory[: N * K // BLOCKSIZE])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p": 1.5}, ValueError, r"p: expected a probability in \[0, 1\], got 1.5"),
        ({"p": -0.1}, ValueError, r"p: expected a probability in \[0, 1\], got -0.1"),
        ({"p": math.nan}, ValueError, r"p: expected a probability in \[0, 1\], got nan"),
        ({"p": None}, TypeError, "incompatible function arguments"),
        ({"seed": 2**64}, ValueError, "seed: expected an int of 64 bits, got 18446744073709551616"),
        ({"seed": 1.0}, TypeError, "seed: expected an int, got float"),
        ({"start": -1}, ValueError, r"start: expected 0 or more, and start \+ 288 .* 63 bits, got -1"),
        ({"start": 2**63 - 288}, ValueError, r"start: expected .*, got 9223372036854775520"),
        ({"start": 2**63}, ValueError, "start: expected an int of 64 bits, got 9223372036854775808"),
        ({"start": None}, TypeError, "start: expected an int, got NoneType"),
        ({"out": torch.empty(M, K + 1)}, ValueError, "out: expected 288 elements, got 291"),
        ({"out": torch.empty(K, M).t()}, ValueError, "out: expected a contiguous tensor"),
        (
            {"out": torch.empty(M, K).half()},
            ValueError,
            "out: expected dtype torch.float32, got torch.float16",
        ),
        ({"x": torch.empty(M, K, device="meta")}, ValueError, "x: expected a dense CPU tensor"),
        ({"x": torch.empty(M)}, ValueError, r"x: expected a 2-D tensor, got shape \[3\]"),
        ({"threads": 0}, ValueError, "threads: expected 1 to 1024, got 0"),
    ],
)
def test_dropout_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    a: dict[str, Any] = {
        "out": torch.empty(M, K),
        "x": torch.randn(M, K),
        "p": 0.5,
        "seed": 1,
        "start": 0,
        "threads": 1,
    }
    a.update(change)
    with pytest.raises(error, match=message):
        _cpu.dropout(*a.values())


def compress(**changes: Any) -> Tensor:
    a: dict[str, Any] = {
        "out": torch.full((M, 8), torch.nan),
        "x": torch.randn(M, K),
        "grouped": False,
        "length": K,
        "rotation": None,
        "inverse": False,
        "threads": 1,
    }
    a.update(changes)
    _cpu.compress(*a.values())
    return a["out"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*NOT_TENSORS, *BAD_TENSORS])
@pytest.mark.parametrize("argument", ["out", "x", "rotation"])
def test_compress_refuses_tensors(argument: str, kind: str) -> None:
    shape = {"out": (M, 8), "x": (M, K), "rotation": (2, 2, 2)}[argument]
    bad = {**NOT_TENSORS, **BAD_TENSORS}[kind](*shape)
    if (argument, kind) == ("rotation", "None"):
        return compress(rotation=bad)
    name = r"(out|x)" if kind.startswith("one row") and argument != "rotation" else argument
    with pytest.raises(
        TypeError if kind in NOT_TENSORS else ValueError, match=rf"^{name}: expected .*, got "
    ):
        compress(**{argument: bad})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": torch.empty(8, M).t()}, ValueError, r"out: expected neighbouring columns, got .*1, 3"),
        ({"out": torch.empty(M, 16)[:, ::2]}, ValueError, "out: expected neighbouring columns"),
        ({"out": torch.empty(1, 8).expand(M, 8)}, ValueError, "out: expected elements that do not share"),
        ({"out": torch.empty(20).as_strided((M, 8), (6, 1))}, ValueError, "out: expected elements that do"),
        ({"x": torch.randn(M + 1, K)}, ValueError, r"x: expected shape \[3, 96\], got \[4, 96\]"),
        ({"grouped": 0}, TypeError, "grouped: expected a bool, got int"),
        ({"grouped": None}, TypeError, "grouped: expected a bool, got NoneType"),
        ({"length": 1.0}, TypeError, "length: expected an int, got float"),
        ({"length": -1}, ValueError, r"length: expected 0 to 2\^48, got -1"),
        ({"length": 2**48 + 1}, ValueError, r"length: expected 0 to 2\^48, got 281474976710657"),
        ({"length": 2**63}, ValueError, "length: expected an int of 64 bits"),
        ({"inverse": 1}, TypeError, "incompatible function arguments"),
        ({"inverse": None}, TypeError, "incompatible function arguments"),
        ({"rotation": torch.zeros(1, 2, 3)}, ValueError, r"rotation: expected shape .* with 2 n h = 8"),
        ({"rotation": torch.zeros(4, 1, 2)}, ValueError, r"rotation: expected shape .*, got \[4, 1, 2\]"),
        ({"rotation": torch.zeros(2, 4)}, ValueError, r"rotation: expected shape .*, got \[2, 4\]"),
        ({"rotation": torch.zeros(2, 2, 2).half()}, ValueError, "rotation: expected dtype torch.float32"),
        ({"rotation": torch.zeros(2, 2, 4)[..., ::2]}, ValueError, "rotation: expected a contiguous tensor"),
        ({"threads": 0}, ValueError, "threads: expected 1 to 1024, got 0"),
    ],
)  # fmt: skip
def test_compress_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compress(**change)


def test_compress_shares_no_memory() -> None:
    memory = torch.randn(M, K)
    with pytest.raises(ValueError, match=r"out: expected memory apart from .*, got memory shared with x"):
        compress(out=memory[:, :8], x=memory)
    with pytest.raises(ValueError, match=r"out: expected memory apart from .* shared with rotation"):
        compress(out=memory.view(-1)[: 8 * M].view(M, 8), rotation=memory.view(-1)[:8].view(1, 2, 4))


def mora(**changes: Any) -> Tensor:
    a: dict[str, Any] = {
        "out": torch.full((M, 20), torch.nan),
        "z": torch.full((M, 24), torch.nan),
        "x": torch.randn(M, 22),
        "weight": None,
        "transposed": False,
        "matrix": torch.randn(6, 6),
        "alpha": 1.0,
        "bias": torch.randn(20),
        "inner": (False, 24),
        "outer": (False, 20),
        "columns": 24,
        "rotation": torch.randn(4, 2, 3),
        "threads": 1,
    }
    a.update(changes)
    _cpu.mora(*a.values())
    return a["out"]


def mora_grad(**changes: Any) -> Tensor:
    a: dict[str, Any] = {
        "out": torch.full((6, 6), torch.nan),
        "grad": torch.randn(M, 20),
        "x": torch.randn(M, 22),
        "alpha": 1.0,
        "columns": 24,
        "rotation": torch.randn(4, 2, 3),
        "threads": 1,
    }
    a.update(changes)
    _cpu.mora_grad(*a.values())
    return a["out"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*NOT_TENSORS, *BAD_TENSORS])
@pytest.mark.parametrize(
    ("call", "argument", "shape"),
    [
        (mora, "out", (M, 20)),
        (mora, "z", (M, 24)),
        (mora, "x", (M, 22)),
        (mora, "matrix", (6, 6)),
        (mora, "bias", (20,)),
        (mora, "rotation", (4, 2, 3)),
        (mora_grad, "out", (6, 6)),
        (mora_grad, "grad", (M, 20)),
        (mora_grad, "x", (M, 22)),
        (mora_grad, "rotation", (4, 2, 3)),
    ],
)
def test_mora_refuses_tensors(
    call: Callable[..., Tensor], argument: str, shape: tuple[int, ...], kind: str
) -> None:
    bad = {**NOT_TENSORS, **BAD_TENSORS}[kind](*shape)
    if kind == "None" and argument in ("z", "bias", "rotation"):
        call(**{argument: bad})
        return
    # one row more than the other's: which of them is wrong cannot be said
    name = rf"(out|x|grad|matrix|{argument})" if kind.startswith("one row") else argument
    with pytest.raises(
        TypeError if kind in NOT_TENSORS else ValueError, match=rf"^{name}: expected .*, got "
    ):
        call(**{argument: bad})


@pytest.mark.parametrize(
    ("call", "change", "error", "message"),
    [
        (mora, {"out": torch.empty(1, 20).expand(M, 20)}, ValueError, "out: expected elements that do not"),
        (mora, {"weight": packed_weight()}, ValueError, r"\[outputs, inner\] = \[20, 22\] .*"),
        (
            mora,
            {"weight": packed_weight(), "transposed": True},
            ValueError,
            r"weight: expected \[inner, outputs\] = \[22, 20\] .*",
        ),
        (mora, {"weight": torch.randn(20, 22)}, TypeError, r"weight: expected \(packed"),
        (mora, {"x": torch.randn(M + 1, 22)}, ValueError, r"x: expected shape \[3, 22\], got \[4, 22\]"),
        (mora, {"z": torch.empty(M, 24).bfloat16()}, ValueError, "z: expected dtype torch.float32, got"),
        (mora, {"z": torch.empty(M, 18)}, ValueError, r"z: expected shape \[3, 24\], got \[3, 18\]"),
        (mora, {"z": torch.empty(24, M).t()}, ValueError, "z: expected a contiguous tensor"),
        (mora, {"matrix": torch.randn(6, 5)}, ValueError, r"matrix: expected shape \[6, 6\], got \[6, 5\]"),
        (mora, {"matrix": torch.randn(0, 0)}, ValueError, "columns: expected a multiple of .* 0, .* got 24"),
        (mora, {"columns": 20}, ValueError, "columns: expected a multiple of .* 6, .* got 20"),
        (mora, {"columns": 0}, ValueError, "columns: expected a multiple of .* got 0"),
        (mora, {"columns": -6}, ValueError, "columns: expected a multiple of .* got -6"),
        (mora, {"columns": 30}, ValueError, "columns: expected .* that covers 22 columns and no block more"),
        (mora, {"columns": 6 * 2**45}, ValueError, r"columns: expected at most 2\^40, got 211106232532992"),
        (mora, {"columns": 2**63}, ValueError, "columns: expected an int of 64 bits"),
        (mora, {"columns": 24.0}, TypeError, "columns: expected an int, got float"),
        (mora, {"inner": 24}, TypeError, r"inner: expected \(grouped, length\), got a int"),
        (mora, {"inner": (False,)}, TypeError, r"inner: expected \(grouped, length\), got a tuple of 1"),
        (mora, {"outer": (0, 20)}, TypeError, "outer: expected a bool, got int"),
        (mora, {"outer": (False, -1)}, ValueError, r"outer: expected 0 to 2\^48, got -1"),
        (mora, {"transposed": None}, TypeError, "incompatible function arguments"),
        (mora, {"rotation": torch.zeros(2, 2, 6)}, ValueError, r"rotation: expected blocks of .* 6 / 2\]"),
        (mora, {"rotation": torch.zeros(3, 2, 3)}, ValueError, r"rotation: expected shape .* 2 n h = 24"),
        (mora, {"bias": torch.zeros(19)}, ValueError, r"bias: expected shape \[20\], got \[19\]"),
        (mora, {"threads": 0}, ValueError, "threads: expected 1 to 1024, got 0"),
        (mora_grad, {"out": torch.empty(6, 6).half()}, ValueError, "out: expected dtype torch.float32, got"),
        (mora_grad, {"out": torch.empty(6, 5)}, ValueError, r"out: expected shape \[6, 6\], got \[6, 5\]"),
        (mora_grad, {"out": torch.empty(6, 12)[:, ::2]}, ValueError, "out: expected a contiguous tensor"),
        (mora_grad, {"grad": torch.randn(M, 20).half()}, ValueError, "grad: expected dtype torch.float32"),
        (mora_grad, {"grad": torch.randn(M + 1, 20)}, ValueError, r"grad: expected shape \[3, 20\], got"),
        (mora_grad, {"columns": 30}, ValueError, "columns: expected .* no block more, got 30"),
        (mora_grad, {"columns": 18 + 1}, ValueError, "columns: expected a multiple of .* got 19"),
        (mora_grad, {"rotation": torch.zeros(2, 2, 6)}, ValueError, "rotation: expected blocks of"),
        (mora_grad, {"threads": 1025}, ValueError, "threads: expected 1 to 1024, got 1025"),
    ],
)  # fmt: skip
def test_mora_refuses(
    call: Callable[..., Tensor], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**change)


def test_mora_shares_no_memory() -> None:
    memory = torch.randn(M, 64)
    flat = memory.view(-1)
    shared = {
        "x": memory[:, :22],
        "matrix": flat[:36].view(6, 6),
        "bias": flat[:20],
        "rotation": flat[:24].view(4, 2, 3),
    }
    for written, place in (("out", memory[:, :20]), ("z", flat[: 24 * M].view(M, 24))):
        for name, tensor in shared.items():
            with pytest.raises(ValueError, match=rf"{written}: expected memory apart from .* with {name}$"):
                mora(**{written: place, name: tensor})
    with pytest.raises(ValueError, match=r"z: expected memory apart from .* shared with out$"):
        mora(out=memory[:, :20], z=flat[: 24 * M].view(M, 24))
    for name, tensor in {"x": memory[:, :22], "grad": memory[:, :20], "rotation": shared["rotation"]}.items():
        with pytest.raises(ValueError, match=rf"out: expected memory apart from .* shared with {name}$"):
            mora_grad(out=shared["matrix"], **{name: tensor})


# ---- linear and linear_grad: the products of a low-rank adapter, in one call each

LINEAR = ("out", "t", "x", "weight", "A", "B", "scaling", "bias", "threads")
GRADIENTS = ("dx", "dA", "dB", "dbias")
LINEAR_GRAD = (*GRADIENTS, "dY", "x", "weight", "A", "B", "t", "scaling", "threads")
# what each gradient is made of, beside dY
NEEDS = {"dx": ("weight", "A", "B"), "dA": ("x", "B"), "dB": ("t",), "dbias": ()}
LINEAR_SHAPES = {"out": (M, N), "t": (M, R), "x": (M, K), "A": (R, K), "B": (N, R), "bias": (N,)}
LINEAR_GRAD_SHAPES = {
    **{"dx": (M, K), "dA": (R, K), "dB": (N, R), "dbias": (N,), "dY": (M, N)},
    **{"x": (M, K), "A": (R, K), "B": (N, R), "t": (M, R)},
}  # fmt: skip


def linear(**changes: Any) -> dict[str, Any]:
    a: dict[str, Any] = {name: torch.randn(shape) for name, shape in LINEAR_SHAPES.items()}
    a.update({"weight": packed_weight(), "scaling": 1.0, "threads": 1, **changes})
    _cpu.linear(*(a[name] for name in LINEAR))
    return a


def linear_grad(**changes: Any) -> dict[str, Any]:
    a: dict[str, Any] = {name: torch.randn(shape) for name, shape in LINEAR_GRAD_SHAPES.items()}
    a.update({"weight": packed_weight(), "scaling": 1.0, "threads": 1, **changes})
    _cpu.linear_grad(*(a[name] for name in LINEAR_GRAD))
    return a


def nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def unwritten(like: Tensor) -> Tensor:
    return guarded(torch.full_like(like, torch.nan), "end")


def product_of(
    out: Tensor, x: Tensor, weight: Any, transposed: bool, alpha: float = 1.0, *rest: Any
) -> Tensor:
    t, u, bias = (*rest, None, None, None)[:3]
    _cpu.matmul(out, x, weight, transposed, alpha, t, u, bias, None, 1)
    return out


def by_products(a: dict[str, Any], parameter: torch.dtype) -> dict[str, Tensor]:
    """Every output of both calls, by _cpu.matmul; a holds the inputs, W [N, K]."""
    x, w, A, B, dY, s = (a[name] for name in ("x", "weight", "A", "B", "dY", "scaling"))
    (rows, columns), outputs, dtype = x.shape, dY.shape[1], x.dtype
    t = G = None
    found: dict[str, Tensor] = {}
    if A is not None:
        rank = A.shape[0]
        found["t"] = t = product_of(nan(rows, rank, dtype=dtype), x, A, False, s)
        G = product_of(nan(rows, rank, dtype=dY.dtype), dY, B, True, s)
        found["dA"] = product_of(nan(rank, columns, dtype=parameter), G.t(), x, True)
        found["dB"] = nan(outputs, rank, dtype=parameter)
        product_of(found["dB"].t(), t.t(), dY, True)
    found["out"] = product_of(nan(rows, outputs, dtype=dtype), x, w, False, 1.0, t, B, a["bias"])
    found["dx"] = nan(rows, columns, dtype=dtype)
    product_of(found["dx"], dY, w, True, 1.0, G, None if A is None else A.t())
    ones = dY.new_ones(1, 1).expand(1, rows)
    found["dbias"] = product_of(nan(1, outputs, dtype=parameter), ones, dY, True)[0]
    return found


def random_weight(outputs: int, columns: int, blocksize: int, nested: bool) -> tuple[Any, ...]:
    blocks = -(-outputs * columns // blocksize)
    packed = torch.randint(0, 256, (-(-outputs * columns // 2),), dtype=torch.uint8)
    if not nested:
        return packed, torch.rand(blocks), None, "nf4", blocksize, outputs, columns
    inner = torch.rand(-(-blocks // 256)), torch.randn(256), torch.rand(()), 256
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    return packed, absmax, inner, "fp4", blocksize, outputs, columns


def apart(tensor: Tensor, layout: str) -> Tensor:
    """The same values: contiguous, as a transposed view, or in every other column."""
    if layout == "contiguous" or tensor.dim() != 2:
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.t().contiguous().t()
    return tensor.repeat_interleave(2, 1)[:, ::2]


# M, N, K, R, blocksize, nested, layout; M = 70 is three blocks of rows to no kernel, 33 no whole tile of any
LINEAR_CASES = [
    (1, 64, 64, 16, 64, False, "contiguous"),
    (3, 65, 96, 3, 64, True, "contiguous"),
    (3, 128, 192, 16, 32, True, "transposed"),
    (33, 7, 31, 5, 32, False, "strided"),
    (33, 192, 128, 64, 128, True, "contiguous"),
    (70, 130, 256, 8, 64, False, "transposed"),
    (70, 64, 330, 70, 256, True, "strided"),
    (70, 128, 64, 0, 64, False, "contiguous"),
    (0, 64, 96, 4, 64, True, "contiguous"),
    (3, 0, 96, 4, 64, False, "contiguous"),
    (3, 64, 0, 4, 64, False, "contiguous"),
    (33, 0, 0, 0, 64, False, "contiguous"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: "x".join(map(str, case)))
def test_linear_is_its_products(case: tuple[Any, ...], dtype: torch.dtype, isa: str) -> None:
    """The same bits as product by product, all gradients at once and each alone, with and without the
    adapter, on two threads as on one, every tensor between forbidden pages."""
    rows, outputs, columns, rank, blocksize, nested, layout = case
    for parameter in {dtype, torch.float32}:
        a: dict[str, Any] = {
            "x": apart(torch.randn(rows, columns).to(dtype), layout),
            "weight": random_weight(outputs, columns, blocksize, nested),
            "A": apart(torch.randn(rank, columns).to(parameter), layout),
            "B": apart(torch.randn(outputs, rank).to(parameter), layout),
            "dY": apart(torch.randn(rows, outputs).to(dtype), layout),
            "bias": torch.randn(outputs).to(parameter),
            "scaling": 0.75,
        }
        if layout == "contiguous":
            a = {name: guarded(v, "end") if isinstance(v, Tensor) else v for name, v in a.items()}
            packed, absmax, *rest = a["weight"]
            a["weight"] = guarded(packed, "start"), guarded(absmax, "end"), *rest
        expected = by_products(a, parameter)

        for threads in (1, 2):
            found = {name: unwritten(value) for name, value in expected.items()}
            linear(**{**a, "out": found["out"], "t": found["t"], "threads": threads})
            linear_grad(**{**a, **found, "threads": threads})
            for name, value in found.items():
                assert torch.equal(value, expected[name]), (name, parameter, threads)
            out = linear(**{**a, "out": unwritten(expected["out"]), "t": None, "threads": threads})["out"]
            assert torch.equal(out, expected["out"]), ("without t", parameter, threads)
        for name in GRADIENTS:
            needed = {k: a[k] if k in a else expected[k] for k in NEEDS[name]}
            nothing = dict.fromkeys((*GRADIENTS, "x", "weight", "A", "B", "t"))
            alone = linear_grad(**{**a, **nothing, **needed, name: unwritten(expected[name])})[name]
            assert torch.equal(alone, expected[name]), (name, "alone", parameter)

        bare = {**a, "A": None, "B": None, "bias": None}
        expected = by_products(bare, parameter)
        found = {name: unwritten(expected[name]) for name in ("out", "dx", "dbias")}
        linear(**{**bare, "out": found["out"], "t": None})
        linear_grad(**{**bare, **found, "dA": None, "dB": None, "t": None})
        for name, value in found.items():
            assert torch.equal(value, expected[name]), (name, "no adapter", parameter)


def test_linear_of_nothing() -> None:
    """A sum of no terms is zero, also where nothing else of the call is computed."""
    none = (torch.empty(0, dtype=torch.uint8), torch.empty(0), None, "nf4", 64)
    a = linear(x=torch.empty(M, 0), A=torch.empty(R, 0), weight=(*none, N, 0))
    assert torch.equal(a["t"], torch.zeros(M, R))
    assert torch.equal(a["out"], a["bias"].expand(M, N))
    a = linear(out=torch.empty(M, 0), B=torch.empty(0, R), bias=torch.empty(0), weight=(*none, 0, K))
    assert torch.equal(a["t"], product_of(torch.empty(M, R), a["x"], a["A"], False))
    rows = {"dY": torch.empty(0, N), "x": torch.empty(0, K), "t": torch.empty(0, R), "dx": torch.empty(0, K)}
    a = linear_grad(**rows)
    for name in ("dA", "dB", "dbias"):
        assert torch.equal(a[name], torch.zeros(LINEAR_GRAD_SHAPES[name])), name
    outputs = {
        "dY": torch.empty(M, 0),
        "B": torch.empty(0, R),
        "dB": torch.empty(0, R),
        "dbias": torch.empty(0),
    }
    a = linear_grad(**outputs, weight=(*none, 0, K))
    for name in ("dx", "dA"):
        assert torch.equal(a[name], torch.zeros(LINEAR_GRAD_SHAPES[name])), name
    a = linear_grad(**dict.fromkeys((*GRADIENTS, "x", "weight", "A", "B", "t")))  # nothing is asked for


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*NOT_TENSORS, *BAD_TENSORS])
@pytest.mark.parametrize(
    ("call", "argument", "shape"),
    [(linear, *item) for item in LINEAR_SHAPES.items()]
    + [(linear_grad, *item) for item in LINEAR_GRAD_SHAPES.items()],
)
def test_linear_refuses_tensors(
    call: Callable[..., Any], argument: str, shape: tuple[int, ...], kind: str
) -> None:
    bad = {**NOT_TENSORS, **BAD_TENSORS}[kind](*shape)
    optional = ("t", "bias") if call is linear else GRADIENTS
    if kind == "None" and argument in optional:
        call(**{argument: bad})
        return
    name = rf"({argument}|A, B)"
    if kind.startswith("one"):  # which of them is wrong cannot be said
        name = r"\w+"
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*, got ") as caught:
        call(**{argument: bad})
    if kind != "None":
        assert caught.type is (TypeError if kind in NOT_TENSORS else ValueError)


@pytest.mark.parametrize(
    ("call", "change", "error", "message"),
    [
        (linear, {"A": None}, ValueError, "A, B: expected both or neither .*, got None, a value and a value"),
        (linear, {"A": None, "B": None}, ValueError, "A, B: expected both .*, got None, None and a value"),
        (linear, {"t": None, "B": None}, ValueError, "A, B: expected both .*, got a value, None and None"),
        (linear, {"t": None, "B": torch.zeros(N, R + 1)}, ValueError, r"B: expected shape \[64, 4\], got"),
        (
            linear,
            {
                "t": None,
                "x": torch.empty(1 << 30, 0),
                "A": torch.empty(1 << 30, 0),
                "B": torch.empty(0, 1 << 30),
                "out": torch.empty(1 << 30, 0),
                "bias": None,
                "weight": (torch.empty(0, dtype=torch.uint8), torch.empty(0), None, "nf4", 64, 0, 0),
            },
            ValueError,
            r"x, A: expected at most 2\^48 elements of t \[M, R\], got shape \[1073741824, 1073741824\]",
        ),
        (
            linear,
            {"t": torch.empty(M, R).half()},
            ValueError,
            "t: expected x's dtype, torch.float32, got torch.fl",
        ),
        (linear, {"t": torch.empty(R, M).t()}, ValueError, "t: expected a contiguous tensor"),
        (linear, {"t": torch.empty(1, R).expand(M, R)}, ValueError, "t: expected a contiguous tensor"),
        (linear, {"t": torch.empty(M + 1, R)}, ValueError, r"t: expected shape \[3, 4\], got \[4, 4\]"),
        (linear, {"out": torch.empty(1, N).expand(M, N)}, ValueError, "out: expected elements that do not"),
        (linear, {"A": torch.zeros(R, K - 1)}, ValueError, r"A: expected shape \[4, 96\], got \[4, 95\]"),
        (linear, {"A": torch.zeros(R + 1, K)}, ValueError, r"A: expected shape \[4, 96\], got \[5, 96\]"),
        (linear, {"B": torch.zeros(N, R + 1)}, ValueError, r"B: expected shape \[64, 4\], got \[64, 5\]"),
        (linear, {"B": torch.zeros(N - 1, R)}, ValueError, r"B: expected shape \[64, 4\], got \[63, 4\]"),
        (linear, {"bias": torch.zeros(1, N)}, ValueError, r"bias: expected shape \[64\], got \[1, 64\]"),
        (linear, {"weight": torch.zeros(N, K)}, TypeError, r"weight: expected \(packed, .*\), got a Tensor"),
        (linear, {"weight": None}, TypeError, r"weight: expected \(packed, .*\), got a NoneType"),
        (
            linear,
            {"weight": packed_weight(N=K, K=N)},
            ValueError,
            r"weight: expected .* \[64, 96\] .*, got \[96",
        ),
        (linear, {"threads": 0}, ValueError, "threads: expected 1 to 1024, got 0"),
        (linear, {"scaling": None}, TypeError, "incompatible function arguments"),
        (linear_grad, {"A": None}, ValueError, "A, B: expected both or neither for dx, got only B"),
        (
            linear_grad,
            {"B": None, "dA": None},
            ValueError,
            "A, B: expected both or neither for dx, got only A",
        ),
        (linear_grad, {"B": None, "A": None}, TypeError, "B: expected a torch.Tensor, got NoneType"),
        (linear_grad, {"x": None}, TypeError, "x: expected a torch.Tensor, got NoneType"),
        (linear_grad, {"t": None}, TypeError, "t: expected a torch.Tensor, got NoneType"),
        (linear_grad, {"weight": None}, TypeError, r"weight: expected \(packed, .*\), got a NoneType"),
        (
            linear_grad,
            {"weight": torch.zeros(N, K)},
            TypeError,
            r"weight: expected \(packed, .*\), got a Tensor",
        ),
        (
            linear_grad,
            {"weight": packed_weight(N=K, K=N)},
            ValueError,
            r"weight: .*\[N, K\] = \[64, 96\] .*, got",
        ),
        (linear_grad, {"dx": torch.zeros(M, K + 1)}, ValueError, r"weight: .*\[N, K\] = \[64, 97\] .*, got"),
        (
            linear_grad,
            {"dx": torch.zeros(M + 1, K)},
            ValueError,
            r"dx: expected shape \[3, 96\], got \[4, 96\]",
        ),
        (
            linear_grad,
            {"dA": torch.zeros(R, K + 1)},
            ValueError,
            r"dA: expected shape \[4, 96\], got \[4, 97\]",
        ),
        (
            linear_grad,
            {"dB": torch.zeros(N, R + 1)},
            ValueError,
            r"dB: expected shape \[64, 4\], got \[64, 5\]",
        ),
        (linear_grad, {"dbias": torch.zeros(N + 1)}, ValueError, r"dbias: expected shape \[64\], got \[65\]"),
        (
            linear_grad,
            {"x": torch.zeros(M, K - 1)},
            ValueError,
            r"x: expected shape \[3, 96\], got \[3, 95\]",
        ),
        (linear_grad, {"t": torch.zeros(M, R + 1)}, ValueError, r"t: expected shape \[3, 4\], got \[3, 5\]"),
        (
            linear_grad,
            {"dA": torch.empty(1, K).expand(R, K)},
            ValueError,
            "dA: expected elements that do not",
        ),
        (
            linear_grad,
            {"dbias": torch.empty(1).expand(N)},
            ValueError,
            "dbias: expected elements that do not",
        ),
        (linear_grad, {"threads": 1025}, ValueError, "threads: expected 1 to 1024, got 1025"),
    ],
)
def test_linear_refuses(
    call: Callable[..., Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**change)


@pytest.mark.parametrize(
    ("call", "shapes", "outputs"),
    [(linear, LINEAR_SHAPES, ("out", "t")), (linear_grad, LINEAR_GRAD_SHAPES, GRADIENTS)],
)
def test_linear_outputs_share_no_memory(
    call: Callable[..., Any], shapes: dict[str, tuple[int, ...]], outputs: tuple[str, ...]
) -> None:
    memory = torch.zeros(N * K)

    def placed(name: str) -> Tensor:
        return memory[: math.prod(shapes[name])].view(shapes[name])

    for written in outputs:
        for other in shapes.keys() - {written}:
            names = rf"({written}: .* with {other}|{other}: .* with {written})"
            with pytest.raises(ValueError, match=names.replace(": ", ": expected memory apart from")):
                call(**{written: placed(written), other: placed(other)})
        weights = {
            "packed": packed_weight(packed=memory.view(torch.uint8)[: N * K // 2]),
            "absmax": packed_weight(absmax=memory[: N * K // BLOCKSIZE]),
            "nested absmax": packed_weight(True, absmax2=memory[:1]),
            "nested code": packed_weight(True, code=memory[:256]),
            "nested offset": packed_weight(True, offset=memory[:1].view(())),
        }
        for part, weight in weights.items():
            with pytest.raises(ValueError, match=rf"{written}: .* shared with weight {part}$"):
                call(**{written: placed(written), "weight": weight})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dropout_starts_anywhere(dtype: torch.dtype, isa: str) -> None:
    """Rows dropped block by block are dropped as within the whole, across 2^32 elements too."""
    rows, columns = 70, 37
    x = torch.rand(rows, columns).add(0.5).to(dtype)
    for first in (0, 12345, 2**32 - 1000, 2**33 + 7, 2**63 - 1 - rows * columns):
        whole = nan(rows, columns, dtype=dtype)
        _cpu.dropout(whole, x, 0.4, -5, first, 2)
        assert 0.5 < (whole != 0).float().mean() < 0.7
        for begin, end in ((0, 1), (1, 40), (40, 70)):
            part = nan(end - begin, columns, dtype=dtype)
            _cpu.dropout(part, apart(x[begin:end], "strided"), 0.4, -5, first + begin * columns, 1)
            assert torch.equal(part, whole[begin:end]), (first, begin)
    in_place = x.clone()
    _cpu.dropout(in_place, in_place, 0.4, -5, first, 2)
    assert torch.equal(in_place, whole)
    with pytest.raises(ValueError, match="out: expected memory apart"):
        _cpu.dropout(in_place.view(-1)[:30].view(5, 6), in_place.view(-1)[:30].view(6, 5).t(), 0.4, -5, 0, 1)
    moved = nan(rows, columns, dtype=dtype)
    _cpu.dropout(moved, x, 0.4, -5, 2**32 + 12345, 1)  # the high half of the index counts
    _cpu.dropout(whole, x, 0.4, -5, 12345, 1)
    assert not torch.equal(moved, whole)


def test_sizes_that_no_memory_could_hold() -> None:
    """Expanded tensors have as many elements as they like; what is made of them is refused, not wrapped."""
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"x: expected at most 2\^48 elements, got shape \[1, 46116"):
        _cpu.matmul(one.clone(), one.expand(1, 2**62), one, False, 1.0, None, None, None, None, 1)
    row = one.expand(1, -(-(2**62) // 1025))  # 4 bytes each for 1025 copies: 2^64 and a little
    with pytest.raises(ValueError, match=r"x: expected at most 2\^48 elements"):
        _cpu.matmul(one.clone(), row, row, False, 1.0, None, None, None, None, 1024)
    for rows in (2**31, 2**40):
        dA, x = torch.empty(rows, 0), torch.empty(rows, 0)
        dY, B = one.expand(rows, 1), one.expand(1, rows)
        with pytest.raises(ValueError, match=r"dY, B: expected at most 2\^48 elements of G"):
            _cpu.linear_grad(None, dA, None, None, dY, x, None, None, B, None, 1.0, 1)


def test_one_row_may_have_any_stride() -> None:
    """Nothing follows it: the stride is of no consequence, and too much to multiply by anything."""
    row = torch.randn(1, K)
    far, out = (t.as_strided(t.shape, (2**62, 1)) for t in (row, torch.empty(1, N)))
    matrix, ends = torch.randn(8, 8), ((False, K), (False, N), K)
    expected = torch.empty(1, N)
    for x, y in ((row, expected), (far, out)):
        _cpu.mora(y, None, x, packed_weight(), False, matrix, 1.0, None, *ends, None, 1)
    assert torch.equal(out, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are renewed on Linux alone")
def test_renewed_pages_are_those_of_the_tensor_alone() -> None:
    """Whole pages of 2 MiB inside it come back fresh, the memory around it stays, whatever the address."""
    MiB = 1 << 20
    memory = torch.empty(16 * MiB, dtype=torch.uint8)
    for begin, size in ((0, 4 * MiB - 1), (5, 8 * MiB + 7), (MiB + 3, 9 * MiB), (3 * MiB, 4 * MiB)):
        memory.fill_(1)
        _cpu.renew_pages(memory[begin : begin + size])
        first, last = memory.data_ptr() + begin, memory.data_ptr() + begin + size
        first, last = (-(-first // (2 * MiB)) * 2 * MiB - memory.data_ptr(), last // (2 * MiB) * 2 * MiB)
        last = last - memory.data_ptr() if size >= 4 * MiB else first
        assert not bool(memory[first:last].any())
        assert bool(memory[:first].all())
        assert bool(memory[last:].all())
    with pytest.raises(ValueError, match="data: expected"):
        _cpu.renew_pages(memory[::2])


@pytest.mark.parametrize("threads", [1, 3])
def test_probes(threads: int, isa: str) -> None:
    """What benchmarks compare with does what it says, and refuses what it cannot read."""
    for words in (0, 1, 33, 1000):
        data = torch.randint(0, 256, (8 * words,), dtype=torch.uint8)
        expected = 0
        for word in data.view(torch.int64).tolist():
            expected ^= word % 2**64
        assert _cpu.probe_read(data, threads) == expected
    for dtype in ("float32", "bfloat16", "float16"):
        one, ten = (_cpu.probe_peak(dtype, iterations, threads) for iterations in (1, 10))
        assert 0 < one * 10 == pytest.approx(ten)
    with pytest.raises(ValueError, match="data: expected data aligned to 8 bytes, got address"):
        _cpu.probe_read(torch.zeros(65, dtype=torch.uint8)[1:], threads)
    with pytest.raises(ValueError, match="data: expected dtype"):
        _cpu.probe_read(torch.zeros(8), threads)
    with pytest.raises(ValueError, match="iterations: expected 1 or more, got 0"):
        _cpu.probe_peak("bfloat16", 0, threads)


def test_tensors_of_every_ordinary_kind_are_accepted() -> None:
    x, w = torch.randn(M, K), torch.randn(N, K)
    expected = matmul(x=x, weight=w)

    class Sub(torch.Tensor):
        pass

    kinds = {
        "requires_grad": x.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(x.clone()),
        "non-leaf": x.clone().requires_grad_() * 1.0,
        "inference": torch.inference_mode()(lambda: x.clone())(),
        "subclass": x.as_subclass(Sub),
        "transposed": x.t().contiguous().t(),
        "strided": torch.stack([x, x], 2)[..., 0],
        "copy on write": torch._lazy_clone(x),
        "shared memory": x.clone().share_memory_(),
    }
    for name, tensor in kinds.items():
        assert torch.equal(matmul(x=tensor, weight=w), expected), name
    before = w.clone()
    matmul(x=torch._lazy_clone(x), weight=w)
    assert torch.equal(w, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func.jvp compiles its decompositions
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize"])
def test_functorch_wrappers_are_refused(transform: str) -> None:
    """A wrapped tensor's memory is not its value: a kernel that read it would ignore the transform."""

    x, weight, out = torch.randn(M, K), torch.randn(N, K), torch.empty(M, N)

    def f(x: Tensor) -> Tensor:
        _cpu.matmul(out, x, weight, False, 1.0, None, None, None, None, 1)
        return x.sum()

    calls: dict[str, Callable[[], Any]] = {
        "vmap": lambda: torch.vmap(f)(x[None]),
        "grad": lambda: torch.func.grad(f)(x),
        "jvp": lambda: torch.func.jvp(f, (x,), (x,)),
        "functionalize": lambda: torch.func.functionalize(f)(x),
    }
    with pytest.raises(ValueError, match="x: expected"):
        calls[transform]()


def test_empty_sizes() -> None:
    matmul(out=torch.empty(0, N), x=torch.empty(0, K))
    matmul(out=torch.empty(M, 0), weight=torch.empty(0, K))
    assert torch.equal(matmul(x=torch.empty(M, 0), weight=torch.empty(N, 0)), torch.zeros(M, N))
    bias = torch.randn(N)
    out = matmul(
        x=torch.empty(M, 0), weight=torch.empty(N, 0), bias=bias, t=torch.empty(M, 0), u=torch.empty(N, 0)
    )
    assert torch.equal(out, bias.expand(M, N))
    nothing = (torch.empty(0, dtype=torch.uint8), torch.empty(0), None, "nf4", 64)
    _cpu.dequantize(torch.empty(0, K), (*nothing, 0, K), 1)
    assert torch.equal(matmul(x=torch.empty(M, 0), weight=(*nothing, N, 0)), torch.zeros(M, N))
    quantize(weight=torch.empty(0, K), packed=nothing[0], absmax=nothing[1])
    values = torch.empty(0, 8), False, N
    matmul(out=torch.empty(0, N), x=torch.empty(0, K), spread=values)
    matmul(out=torch.empty(M, 0), weight=torch.empty(0, K), spread=(torch.empty(M, 8), True, 0))
    compress(out=torch.empty(0, 8), x=torch.empty(0, K))
    compress(out=torch.empty(M, 0))
    for grouped in (False, True):
        assert torch.equal(compress(x=torch.empty(M, 0), grouped=grouped), torch.zeros(M, 8))
    mora(out=torch.empty(0, 20), z=torch.empty(0, 24), x=torch.empty(0, 22))
    z = torch.full((M, 24), torch.nan)
    mora(out=torch.empty(M, 0), bias=torch.empty(0), outer=(False, 0), z=z)
    assert z.isfinite().all()
    bias = torch.randn(20)
    assert torch.equal(mora(x=torch.empty(M, 0), bias=bias), bias.expand(M, 20))
    for empty in ({"x": torch.empty(0, 22), "grad": torch.empty(0, 20)}, {"grad": torch.empty(M, 0)}):
        assert torch.equal(mora_grad(**empty), torch.zeros(6, 6))


def test_threads_of_python_share_no_state() -> None:
    """The GIL is released around a kernel; working memory belongs to the calling thread."""
    w = packed_weight(
        absmax=torch.rand(N * K // BLOCKSIZE), packed=torch.randint(0, 256, (N * K // 2,)).byte()
    )
    inputs = [torch.randn(m, K).to(dtype) for m in (1, 5, 40) for dtype in (torch.float32, torch.bfloat16)]

    def outputs() -> list[Tensor]:
        return [matmul(out=torch.empty(len(x), N, dtype=x.dtype), x=x, weight=w, threads=2) for x in inputs]

    expected = outputs()
    failures: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(outputs(), expected, strict=True)):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


FORK = """
import os, sys, torch, peftkern
from peftkern import _cpu
torch.set_num_threads(4)
w = torch.randn(512, 512)
packed = torch.empty(w.numel() // 2, dtype=torch.uint8)
absmax = torch.empty(w.numel() // 64)
def step():
    _cpu.quantize(w, packed, absmax, "nf4", 64, 4)
    weight = (packed, absmax, None, "nf4", 64, 512, 512)
    results = [torch.empty(512, 512)]
    _cpu.dequantize(results[0], weight, 4)
    results.append(torch.empty(512, 512))
    _cpu.dropout(results[1], w, 0.5, 1, 0, 4)
    results.append(torch.empty(512, 64))
    _cpu.compress(results[2], w, False, 512, None, False, 4)
    results.append(torch.empty(512, 512))
    spread = (results[2], True, 0)
    _cpu.matmul(results[3], w[:, :0], w[:, :0], False, 1.0, None, None, None, spread, 4)
    results += [torch.empty(512, 512), torch.empty(64, 64)]
    ends = (False, 512), (False, 512)
    _cpu.mora(results[4], None, w, None, False, w[:64, :64], 1.0, None, *ends, 512, None, 4)
    _cpu.mora_grad(results[5], w, w, 1.0, 512, None, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 8, 300):
            x = torch.linspace(-1, 1, rows * 512).view(rows, 512).to(dtype)
            for transposed in (False, True):
                results.append(torch.empty(rows, 512, dtype=dtype))
                _cpu.matmul(results[-1], x, weight, transposed, 1.0, None, None, None, None, 4)
    return results
expected = step()
def descend(depth):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own parallel loops would wait for ever
        same = all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
        if depth and descend(depth - 1) != 0:
            os._exit(2)
        os._exit(0 if same else 1)
    return os.waitpid(child, 0)[1]
assert descend(1) == 0, "child"
assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True)), "parent, afterwards"
print("done")
"""


def test_fork_after_use() -> None:
    """libgomp's threads do not survive fork(): a parallel region in the child would wait for ever."""
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=100)
    assert result.stdout == "done\n", result.stderr


def test_the_file_under_a_second_name() -> None:
    """Two modules of one file: each works, and the process ends as it should."""
    code = """
import importlib.util
from peftkern import _cpu
spec = importlib.util.spec_from_file_location("_cpu", _cpu.__file__)
second = importlib.util.module_from_spec(spec)
spec.loader.exec_module(second)
assert second is not _cpu and second.isa_levels() == _cpu.isa_levels()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


def test_one_openmp_runtime() -> None:
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("no /proc/self/maps")
    info = _cpu.build_info()
    if not info["compiler"].startswith("GNU"):
        pytest.skip(f"{info['compiler']} builds without OpenMP")
    assert info["openmp"] is not None
    code = """
import torch, peftkern
from peftkern import _cpu
w = torch.randn(256, 256)
_cpu.quantize(w, torch.empty(w.numel() // 2, dtype=torch.uint8), torch.empty(w.numel() // 64), "nf4", 64, 2)
print(open("/proc/self/maps").read())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    runtimes = set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)\b\S*", result.stdout))
    assert len(runtimes) == 1, runtimes
