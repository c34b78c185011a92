"""The compiled CPU kernels (csrc/bind_cpu.cpp). Each checks its arguments: ValueError or TypeError."""

from typing import Any

from torch import Tensor, dtype

# (absmax fp32, code fp32 [256], offset fp32 of one element, blocksize)
_Nested = tuple[Tensor, Tensor, Tensor, int]
# (packed, absmax, nested, quant_type, blocksize, N, K)
_PackedWeight = tuple[Tensor, Tensor, _Nested | None, str, int, int, int]
# (values fp32 [rows, P], grouped, length)
_Spread = tuple[Tensor, bool, int]

def matmul(
    out: Tensor,
    x: Tensor,
    weight: Tensor | _PackedWeight,
    transposed: bool,
    alpha: float,
    t: Tensor | None,
    u: Tensor | None,
    bias: Tensor | None,
    spread: _Spread | None,
    threads: int,
) -> None: ...
def linear(
    out: Tensor,
    t: Tensor | None,
    x: Tensor,
    weight: _PackedWeight,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    threads: int,
) -> None: ...
def linear_grad(
    dx: Tensor | None,
    dA: Tensor | None,
    dB: Tensor | None,
    dbias: Tensor | None,
    dY: Tensor,
    x: Tensor | None,
    weight: _PackedWeight | None,
    A: Tensor | None,
    B: Tensor | None,
    t: Tensor | None,
    scaling: float,
    threads: int,
) -> None: ...
def dequantize(out: Tensor, weight: _PackedWeight, threads: int) -> None: ...
def quantize(
    weight: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int, threads: int
) -> None: ...
def dropout(out: Tensor, x: Tensor, p: float, seed: int, start: int, threads: int) -> None: ...
def compress(
    out: Tensor, x: Tensor, grouped: bool, length: int, rotation: Tensor | None, inverse: bool, threads: int
) -> None: ...
def mora(
    out: Tensor,
    z: Tensor | None,
    x: Tensor,
    weight: _PackedWeight | None,
    transposed: bool,
    matrix: Tensor,
    alpha: float,
    bias: Tensor | None,
    inner: tuple[bool, int],
    outer: tuple[bool, int],
    columns: int,
    rotation: Tensor | None,
    threads: int,
) -> None: ...
def mora_grad(
    out: Tensor, grad: Tensor, x: Tensor, alpha: float, columns: int, rotation: Tensor | None, threads: int
) -> None: ...
def renew_pages(data: Tensor) -> None: ...
def probe_read(data: Tensor, threads: int) -> int: ...
def probe_peak(dtype: dtype | str, iterations: int, threads: int) -> float: ...
def isa_levels() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str | None) -> None: ...
def kernel(primitive: str, dtype: dtype | str) -> str: ...
def build_info() -> dict[str, Any]: ...
