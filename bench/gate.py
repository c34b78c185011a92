"""No number for a wrong answer.

Inputs are random, so an output is a sum of many small independent rounding errors: with u the unit roundoff
of the dtype, weights, T and the result are each rounded once to it (about 0.42 u rms each), and fp32
accumulation adds about sqrt(K)·2⁻²⁴. The root mean square error relative to the root mean square of the
result must stay below

    bound = 1.5 u + 4·sqrt(K)·2⁻²⁴

and no single element may be further off than 12 bounds (12 standard deviations and more). One weight in ten
thousand decoded wrongly is outside. A candidate's slack multiplies the bound; 0 asks for equal bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BYTES_MAY_DIFFER = 1e-3  # of a peer's packed codes: ties and reciprocals round to a neighbour


def as_tuple(result: object) -> tuple[Tensor, ...]:
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, (tuple, list)) and all(isinstance(part, Tensor) for part in result):
        return tuple(result)
    raise TypeError(f"result: expected a tensor or a tuple of tensors, got {type(result).__name__}")


def _wrong(got: Tensor, want: Tensor, unit: float, inner: int, slack: float) -> str | None:
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not got.is_floating_point():
        share = float((got != want).double().mean()) if got.numel() else 0.0
        allowed = BYTES_MAY_DIFFER if slack else 0.0
        return f"{share:.2%} of the bytes differ" if share > allowed else None
    if slack == 0.0:
        return None if torch.equal(got, want.to(got.dtype)) else "not bit-identical to the reference"
    if not got.numel():
        return None
    wide = torch.promote_types(got.dtype, want.dtype)
    difference = got.to(wide) - want.to(wide)
    worst, size = float(difference.abs().max()), float(want.double().square().mean().sqrt())
    error = float(difference.double().square().mean().sqrt())
    bound = slack * (1.5 * unit + 4 * math.sqrt(inner) * 2.0**-24)
    if not error <= bound * size:
        return f"relative error {error / max(size, 1e-300):.2e}, allowed {bound:.2e}"
    if not worst <= 12 * bound * size:
        off = worst / max(size, 1e-300)
        return f"one element is off by {off:.2e} of the typical value, allowed {12 * bound:.2e}"
    return None


def check(
    result: object, expected: tuple[Tensor, ...], dtype: torch.dtype, inner: int, slack: float
) -> str | None:
    """None when `result` is right, else what is wrong with it."""
    parts = as_tuple(result)
    if len(parts) != len(expected):
        return f"{len(parts)} results, expected {len(expected)}"
    for i, (got, want) in enumerate(zip(parts, expected, strict=True)):
        problem = _wrong(got.detach(), want.detach(), UNIT_ROUNDOFF[dtype], inner, slack)
        if problem:
            return problem if len(parts) == 1 else f"result {i}: {problem}"
    return None
