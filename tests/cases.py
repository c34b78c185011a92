"""Shapes, dtypes and layouts for the linear ops: what a model has, and what breaks kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import peftkern
from peftkern import QuantizedWeight

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
