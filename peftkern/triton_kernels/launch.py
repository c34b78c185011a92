"""A kernel with everything it is launched with: run by a backend, compiled without a GPU by the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

# as peftkern.backends has them: packed, absmax, nested, quant_type, blocksize, N, K
Weight4 = tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, int] | None, str, int, int, int]
Spread = tuple[Tensor, bool, int]  # values fp32 [M, P], grouped, length


class Machine(NamedTuple):
    """What the choice of a tile depends on."""

    capability: int  # 80: Ampere; 90: Hopper
    processors: int


# kernels decide nothing by it but the number of splits: few, so that small cases take both ways
INTERPRETED = Machine(90, 6)

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


Layout = tuple[torch.dtype, torch.Size, tuple[int, ...]]


def layout(tensor: Tensor | None) -> Layout | None:
    """All of a tensor that the choice of a kernel and its numbers depend on: a key, without the tensor."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())


class Launch(NamedTuple):
    kernel: Any  # a JITFunction
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]  # by name, constexprs too
    warps: int = 4
    stages: int = 1
    fuse: bool = True  # whether a product and a sum may be rounded once

    def run(self) -> None:
        self.kernel[self.grid](
            **self.arguments, num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=self.fuse
        )
