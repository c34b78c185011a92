"""Checks of the public ops' arguments: TypeError or ValueError, "argument: expected …, got …"."""

from __future__ import annotations

import numbers
from typing import Any, NoReturn

import torch
from torch import Tensor

from peftkern.formats import QuantizedWeight
from peftkern.reference import adapter_scale

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
PLAIN = frozenset((Tensor, torch.nn.Parameter))
_INTEGER: tuple[type, ...] = (int, torch.SymInt)
_FLOAT32_MAX = float(torch.finfo(torch.float32).max)
_MOST = 1 << 48  # features, ranks: the compiled modules' own limit, far past any memory
_STRIDED = torch.strided
_AUTOCAST_CPU: Any = torch._C._parse_dispatch_key("AutocastCPU")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """A strided fp32, bf16 or fp16 tensor of exactly this shape, on this device."""
    try:
        if (
            (type(tensor) in PLAIN or isinstance(tensor, Tensor))
            and tensor.shape == shape
            and tensor.dtype in DTYPES
            and tensor.device == device
            and tensor.layout is _STRIDED
        ):
            return
    except RuntimeError:  # a nested tensor has no shape
        pass
    refuse(name, tensor, f"shape {list(shape)}", None, device)


def check_x(x: Tensor, columns: int, device: torch.device) -> None:
    """A strided fp32, bf16 or fp16 tensor [..., columns], on this device."""
    try:
        if (
            (type(x) in PLAIN or isinstance(x, Tensor))
            and x.ndim > 0
            and x.shape[-1] == columns
            and x.dtype in DTYPES
            and x.device == device
            and x.layout is _STRIDED
        ):
            return
    except RuntimeError:  # a nested tensor has no shape
        pass
    refuse("x", x, f"shape [..., {columns}]", None, device)


def matrix_shape(value: object) -> tuple[int, int] | None:
    """Rows and columns; None of what is no matrix."""
    if not isinstance(value, Tensor):
        return None
    try:
        rows, columns = value.shape
    except (ValueError, RuntimeError):  # not two dimensions; a nested tensor has no shape
        return None
    return rows, columns


def check_base(x: Tensor, weight: QuantizedWeight | Tensor) -> tuple[int, int, torch.device, torch.dtype]:
    """N, K, the device and the dtype to compute in, of a frozen W [N, K], dense or 4-bit, and an x for it."""
    if isinstance(weight, QuantizedWeight):
        rows, columns = weight.shape
        device = weight.packed.device
        check_x(x, columns, device)
        return rows, columns, device, autocast_dtype(x)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor or a QuantizedWeight, got {type(weight).__name__}")
    shape = matrix_shape(weight)
    if shape is None:
        refuse("weight", weight, "a QuantizedWeight or shape [N, K]", None, None)
    rows, columns = shape
    device = weight.device
    check_tensor("weight", weight, shape, device)
    check_x(x, columns, device)
    dtype = autocast_dtype(x)
    if weight.dtype is not dtype and not is_autocast(x):
        refuse("weight", weight, "", x.dtype, device)
    return rows, columns, device, dtype


def check_size(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, _INTEGER):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if value > _MOST:
        raise ValueError(f"{name}: expected at most 2^48, got {value}")


def _check_real(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_scaling(scaling: float) -> None:
    if type(scaling) is not float:
        _check_real("scaling", scaling)
    if not -_FLOAT32_MAX <= scaling <= _FLOAT32_MAX:
        raise ValueError(f"scaling: expected a finite number in float32's range, got {scaling}")


def check_dropout(dropout: float, scaling: float = 1.0) -> None:
    if type(dropout) is not float:
        _check_real("dropout", dropout)
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")
    if abs(adapter_scale(scaling, dropout)) > _FLOAT32_MAX:
        raise ValueError(
            f"scaling: expected scaling / (1 - dropout) in float32's range, got {scaling} and {dropout}"
        )


def refuse(
    name: str, value: Any, shape: str, dtype: torch.dtype | None, device: torch.device | None
) -> NoReturn:
    """Raise for an argument that failed its check, naming it, what was expected and what came."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout is not _STRIDED or value.is_nested:
        got = "a nested one" if value.layout is _STRIDED else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a strided tensor, got {got}")
    if value.dtype not in DTYPES or (dtype is not None and value.dtype != dtype):
        wanted = "float32, bfloat16 or float16" if dtype is None else f"{_short(dtype)} as x's"
        raise TypeError(f"{name}: expected dtype {wanted}, got {_short(value.dtype)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    raise ValueError(f"{name}: expected {shape}, got shape {list(value.shape)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that F.linear would compute in: autocast's where that is on, else the tensor's."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def is_autocast(x: Tensor) -> bool:
    if x.is_cpu and not torch.compiler.is_dynamo_compiling():
        # what is_autocast_enabled("cpu") looks at, once it has read the name: 6 µs less with cold caches
        return not torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOCAST_CPU)
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)
