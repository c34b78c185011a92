"""Shapes, dtypes and layouts for the linear ops: what a model has, and what breaks kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

import peftkern
from peftkern import QuantizedWeight, mora, mora_linear
from peftkern.backends import triton

_Size = TypeVar("_Size")


def fitting(full: _Size, interpreted: _Size) -> _Size:
    """`full`, or what stands for it under TRITON_INTERPRET=1.

    Triton's interpreter takes some 10 ms for a launch and a few for each of its programs: it gets small and
    odd sizes that take the same ways, where the full ones would take minutes. No test is left out for it.
    """
    return interpreted if triton.INTERPRETED else full


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "sliced", "strided rows", "expanded", "batched")
# odd K puts rows at half bytes, K that is no multiple of the blocksize makes blocks straddle rows
ROWS = (0, 1, 2, 5, 17, 33, 70)
COLUMNS_IN = (1, 2, 3, 7, 33, 64, 100, 130, 256)
COLUMNS_OUT = (1, 2, 3, 16, 31, 33, 64, 65, 100)
RANKS = (1, 3, 16, 64)


@dataclass(frozen=True)
class Case:
    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    quant_type: str  # "dense": no quantization
    blocksize: int
    double_quant: bool
    layout: str
    grad_layout: str
    seed: int

    @property
    def independent(self) -> bool:
        """Whether roundings are: equal rows round alike."""
        return "expanded" not in (self.layout, self.grad_layout)


def cases(dense: bool) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        M=st.sampled_from(ROWS),
        K=st.sampled_from(COLUMNS_IN),
        N=st.sampled_from(COLUMNS_OUT),
        R=st.sampled_from(RANKS),
        dtype=st.sampled_from(DTYPES),
        adapter_dtype=st.sampled_from(DTYPES),
        bias_dtype=st.sampled_from((None, *DTYPES)),
        quant_type=st.sampled_from(("nf4", "fp4", "dense") if dense else ("nf4", "fp4")),
        blocksize=st.sampled_from((32, 64, 128, 4096)),
        double_quant=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        grad_layout=st.sampled_from(LAYOUTS[:-1]),
        seed=st.integers(0, 2**31),
    )


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of these values (of its first row's for "expanded") with other strides and offset."""
    M, K = tensor.shape
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "sliced":
        return torch.randn(M, 2 * K + 3).to(tensor.dtype)[:, 3::2].copy_(tensor)
    if layout == "strided rows":
        return torch.randn(2 * M, K + 1).to(tensor.dtype)[::2, 1:].copy_(tensor)
    if layout == "expanded":
        return tensor[:1].expand(M, K)
    if layout == "batched":
        return tensor.unsqueeze(0)
    return tensor


@dataclass
class Operands:
    x: Tensor
    weight: Tensor | QuantizedWeight
    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    bias: Tensor | None
    grad: Tensor  # dY, [M, N]


def make_weight(case: Case) -> Tensor | QuantizedWeight:
    weight = torch.randn(case.N, case.K).to(case.dtype)
    if case.quant_type == "dense":
        return weight
    return peftkern.quantize_4bit(weight, case.quant_type, case.blocksize, case.double_quant)


def operands(case: Case) -> Operands:
    torch.manual_seed(case.seed)
    bias = None if case.bias_dtype is None else torch.randn(case.N).to(case.bias_dtype).requires_grad_()
    return Operands(
        x=laid_out(torch.randn(case.M, case.K).to(case.dtype), case.layout).requires_grad_(),
        weight=make_weight(case),
        lora_A=torch.randn(case.R, case.K).to(case.adapter_dtype).requires_grad_(),
        lora_B=torch.randn(case.N, case.R).to(case.adapter_dtype).requires_grad_(),
        bias=bias,
        grad=laid_out(torch.randn(case.M, case.N).to(case.dtype), case.grad_layout),
    )


def unbatched(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.flatten(0, -2)


MORA_TYPES = (1, 2, 3, 4, 6, "truncation", "decoupling")
# K, N, r̂: square, ragged, wide, tall; groups of several vectors; 1 × 1; r̂ = 1; r̂ > K (pad ≥ K, and several
# times K); r̂ > N; both
MORA_SHAPES = (
    (12, 12, 4),
    (13, 13, 5),
    (33, 20, 6),
    (7, 30, 4),
    (64, 48, 10),
    (100, 65, 16),
    (40, 130, 34),
    (130, 33, 64),
    (40, 1000, 3),
    (1, 1, 1),
    (6, 5, 1),
    (3, 9, 4),
    (3, 9, 8),
    (2, 17, 7),
    (9, 3, 8),
    (70, 2, 18),
    (3, 4, 16),
    (1, 1, 2),
)


def mora_size(size: int, mora_type: int | str) -> int:
    """r̂, made even for type 6."""
    return size + size % 2 if mora_type in (6, "rotation") else size


@dataclass(frozen=True)
class MoraCase:
    M: int
    shape: tuple[int, int, int]
    mora_type: int | str
    scaling: float
    dtype: torch.dtype
    matrix_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    quant_type: str  # "dense": no quantization, "none": no base weight
    blocksize: int
    double_quant: bool
    layout: str
    grad_layout: str
    seed: int

    @property
    def independent(self) -> bool:
        return "expanded" not in (self.layout, self.grad_layout)


def mora_cases() -> st.SearchStrategy[MoraCase]:
    return st.builds(
        MoraCase,
        M=st.sampled_from(fitting(ROWS, (0, 1, 2, 5, 17))),
        shape=st.sampled_from(MORA_SHAPES),
        mora_type=st.sampled_from(MORA_TYPES),
        scaling=st.sampled_from((1.0, -0.75)),
        dtype=st.sampled_from(DTYPES),
        matrix_dtype=st.sampled_from(DTYPES),
        bias_dtype=st.sampled_from((None, *DTYPES)),
        quant_type=st.sampled_from(("nf4", "fp4", "dense", "none")),
        blocksize=st.sampled_from((32, 64, 128, 4096)),
        double_quant=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        grad_layout=st.sampled_from(LAYOUTS[:-1]),
        seed=st.integers(0, 2**31),
    )


@dataclass
class MoraOperands:
    x: Tensor
    weight: Tensor | QuantizedWeight | None
    matrix: Tensor
    bias: Tensor | None
    grad: Tensor  # dY, [M, O]


def mora_operands(case: MoraCase) -> MoraOperands:
    torch.manual_seed(case.seed)
    columns, outputs, size = case.shape
    size = mora_size(size, case.mora_type)
    weight: Tensor | QuantizedWeight | None = None
    bias = None
    if case.quant_type != "none":
        weight = torch.randn(outputs, columns).to(case.dtype)
        if case.quant_type != "dense":
            weight = peftkern.quantize_4bit(weight, case.quant_type, case.blocksize, case.double_quant)
        if case.bias_dtype is not None:
            bias = torch.randn(outputs).to(case.bias_dtype).requires_grad_()
    return MoraOperands(
        x=laid_out(torch.randn(case.M, columns).to(case.dtype), case.layout).requires_grad_(),
        weight=weight,
        matrix=torch.randn(size, size).to(case.matrix_dtype).requires_grad_(),
        bias=bias,
        grad=laid_out(torch.randn(case.M, outputs).to(case.dtype), case.grad_layout),
    )


Weight = Tensor | QuantizedWeight | None
MORA_K, MORA_N, MORA_R = 40, 56, 10


def mora_base(
    kind: str, dtype: torch.dtype = torch.float32, outputs: int = MORA_N, columns: int = MORA_K
) -> Weight:
    """W: "plain" or "nested" in 4 bits, "dense", or "none"."""
    if kind == "none":
        return None
    W = torch.randn(outputs, columns).to(dtype)
    return W if kind == "dense" else peftkern.quantize_4bit(W, double_quant=kind == "nested")


def mora_inputs(
    M: int = 6,
    dtype: torch.dtype = torch.float32,
    columns: int = MORA_K,
    outputs: int = MORA_N,
    size: int = MORA_R,
) -> dict[str, Tensor]:
    return {
        "x": torch.randn(M, columns).to(dtype).requires_grad_(),
        "matrix": torch.randn(size, size).requires_grad_(),
        "bias": torch.randn(outputs).requires_grad_(),
    }


def mora_inputs_of(o: dict[str, Tensor], weight: Weight) -> dict[str, Tensor]:
    """Those that take part: without a base there is no bias."""
    return {name: tensor for name, tensor in o.items() if weight is not None or name != "bias"}


def mora_run(
    o: dict[str, Tensor],
    weight: Weight,
    mora_type: int | str,
    outputs: int = MORA_N,
    scaling: float = 0.75,
) -> Tensor:
    """mora where there is no base, else mora_linear."""
    if weight is None:
        return mora(o["x"], o["matrix"], outputs, mora_type)
    return mora_linear(o["x"], weight, o["matrix"], mora_type, scaling, o.get("bias"))


def mora_step(
    o: dict[str, Tensor], weight: Weight, mora_type: int | str, grad: Tensor, scaling: float = 0.75
) -> dict[str, Tensor]:
    """y and every gradient."""
    y = mora_run(o, weight, mora_type, grad.shape[-1], scaling)
    inputs = mora_inputs_of(o, weight)
    found = torch.autograd.grad(y, list(inputs.values()), grad)
    return {"y": y.detach(), **dict(zip(inputs, found, strict=True))}
