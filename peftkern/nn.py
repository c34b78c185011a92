"""LoRALinear and MoRALinear: thin modules over lora_linear and mora_linear."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from peftkern.formats import QuantizedWeight
from peftkern.ops.checks import DTYPES, check_dropout, check_scaling, check_size, check_tensor
from peftkern.ops.linear import linear_4bit
from peftkern.ops.lora import lora_delta, lora_linear
from peftkern.ops.merge import merge
from peftkern.ops.mora import mora, mora_delta, mora_linear, mora_rank
from peftkern.reference import mora_kind


class _AdaptedLinear(nn.Module, ABC):
    """A frozen weight and bias beside an adapter, which the subclass has: its parameters, what it adds to W
    (`delta`), how it starts (`reset_parameters`), and the product with it (`_adapted`)."""

    weight: nn.Parameter | QuantizedWeight
    bias: nn.Parameter | None
    _unmerged: nn.Parameter | QuantizedWeight | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        weight: Tensor | QuantizedWeight | None,
        bias: Tensor | None,
        dropout: float,
        adapter_dtype: torch.dtype,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("r", r)):
            check_size(name, value, 1)
        check_dropout(dropout)
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.dropout = float(dropout)
        self._put_aside(None)

        for name, kind in (("dtype", dtype), ("adapter_dtype", adapter_dtype)):
            if kind is not None and kind not in DTYPES:
                raise TypeError(f"{name}: expected torch.float32, bfloat16 or float16, got {kind!r}")
        if weight is None:
            weight = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype).weight
        elif not isinstance(weight, (Tensor, QuantizedWeight)):
            raise TypeError(f"weight: expected a tensor or a QuantizedWeight, got {type(weight).__name__}")
        else:
            for name, given in (("dtype", dtype), ("device", device)):
                if given is not None:
                    raise ValueError(f"{name}: expected None beside a weight, which has its own, got {given}")
        shape = (out_features, in_features)
        if isinstance(weight, QuantizedWeight):
            if weight.shape != shape:
                raise ValueError(f"weight: expected shape {list(shape)}, got shape {list(weight.shape)}")
        else:
            check_tensor("weight", weight, shape, weight.device)
        if bias is not None:
            check_tensor("bias", bias, (out_features,), weight.device)
        if isinstance(weight, QuantizedWeight):
            self.weight = weight
        else:
            self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @abstractmethod
    def reset_parameters(self) -> None:
        """The adapter as at the start: ΔW = 0."""

    @abstractmethod
    def delta(self) -> Tensor:
        """ΔW [out_features, in_features]."""

    @abstractmethod
    def _adapted(self, x: Tensor) -> Tensor:
        """X Wᵀ + adapter(X) + b."""

    def _frozen(self, x: Tensor) -> Tensor:
        """X Wᵀ + b."""
        if isinstance(self.weight, QuantizedWeight):
            return linear_4bit(x, self.weight, self.bias)
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self._adapted(x) if self._unmerged is None else self._frozen(x)

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with W + ΔW from now on; the unmerged W is kept for `unmerge`."""
        if self._unmerged is None:
            before = self.weight
            self._set_weight(merge(before, self.delta()))
            self._put_aside(before)

    def unmerge(self) -> None:
        """Back to W beside its adapter, exactly: the very weight that `merge` put aside."""
        if self._unmerged is not None:
            before = self._unmerged
            self._put_aside(None)
            self.weight = before

    @torch.no_grad()
    def absorb(self) -> None:
        """W becomes W + ΔW for good, and the adapter starts anew; the unmerged W is let go."""
        self.unmerge()
        self._set_weight(merge(self.weight, self.delta()))
        self.reset_parameters()

    def _set_weight(self, weight: QuantizedWeight | Tensor) -> None:
        if not isinstance(weight, QuantizedWeight):
            weight = nn.Parameter(weight, requires_grad=False)
        self.weight = weight

    def _put_aside(self, weight: nn.Parameter | QuantizedWeight | None) -> None:
        # past Module.__setattr__, which would make it a parameter
        object.__setattr__(self, "_unmerged", weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _AdaptedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self.weight, QuantizedWeight):
            self.weight = _apply_quantized(fn, self.weight)
        if isinstance(self._unmerged, QuantizedWeight):
            self._put_aside(_apply_quantized(fn, self._unmerged))
        elif self._unmerged is not None:
            self._put_aside(nn.Parameter(fn(self._unmerged.data), requires_grad=False))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight if self._unmerged is None else self._unmerged
        if isinstance(weight, QuantizedWeight):
            destination.update(weight.state_dict(f"{prefix}weight"))
        else:
            destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.unmerge()
        name = f"{prefix}weight"
        if not isinstance(self.weight, QuantizedWeight):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        parts = {key: value for key, value in state_dict.items() if key == name or key.startswith(f"{name}.")}
        rest = {key: value for key, value in state_dict.items() if key not in parts}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not parts:
            missing_keys.append(name)
            return
        try:
            weight = QuantizedWeight.from_state_dict(parts, name)
            if weight.shape != self.weight.shape:
                expected = list(self.weight.shape)
                raise ValueError(f"{name}: expected shape {expected}, got {list(weight.shape)}")
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))
            return
        if strict:
            unexpected_keys.extend(parts.keys() - weight.state_dict(name).keys())
        if local_metadata.get("assign_to_params_buffers", False):
            self.weight = weight
            return
        device = self.weight.device
        if device.type == "meta" and weight.device.type != "meta":  # as torch does for parameters
            text = f"{name}: the module is on the meta device and stays without data, but for assign=True"
            warnings.warn(text, stacklevel=2)
        self.weight = weight.to(device, copy=True)

    def extra_repr(self) -> str:
        weight = self.weight
        kind = str(weight.dtype).removeprefix("torch.")
        if isinstance(weight, QuantizedWeight):
            kind = f"{weight.quant_type}, blocksize={weight.blocksize}"
            kind += ", double_quant=True" if weight.nested is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"{self._adapter_repr()}, dropout={self.dropout:g}, bias={self.bias is not None}, weight={kind}"
            + (", merged" if self.merged else "")
        )

    @abstractmethod
    def _adapter_repr(self) -> str:
        """What extra_repr says of the adapter."""


class LoRALinear(_AdaptedLinear):
    """Y = X Wᵀ + (alpha / r) · dropout(X) Aᵀ Bᵀ + b with W and b frozen; only lora_A and lora_B train.

    - weight: [out_features, in_features], dense (fp32, bf16 or fp16) or QuantizedWeight, kept by reference;
      None draws a dense one as nn.Linear does, of `dtype` on `device`, which are for that alone
    - lora_A [r, in_features] and lora_B [out_features, r], of adapter_dtype (fp32, bf16 or fp16): A
      Kaiming-uniform, B zero, as PEFT starts them
    - alpha: scaling is alpha / r; None means r, a scaling of 1
    - bias: a tensor [out_features] or None
    - dropout: probability on the adapter's input, in training mode only

    A QuantizedWeight moves with .to(device); .to(dtype), .half() and the like leave its bytes and scales as
    they are. The state_dict holds it under bitsandbytes' keys ("weight", "weight.absmax", …) and always
    describes the unmerged module. load_state_dict puts a copy of the state's weight, made as by
    `QuantizedWeight.to`, in the place of the module's; assign=True takes the state's own.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float | None = None,
        weight: Tensor | QuantizedWeight | None = None,
        bias: Tensor | None = None,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, r, weight, bias, dropout, adapter_dtype, device, dtype)
        if alpha is not None and (not isinstance(alpha, (int, float)) or isinstance(alpha, bool)):
            raise TypeError(f"alpha: expected a number or None, got {type(alpha).__name__}")
        try:
            self.alpha = float(r if alpha is None else alpha)
        except OverflowError:  # its digits may be more than Python prints
            raise ValueError("alpha: expected a finite number, got an integer beyond float's range") from None
        self.scaling = self.alpha / r
        check_scaling(self.scaling)
        place = self.weight.device
        self.lora_A = nn.Parameter(torch.empty((r, in_features), dtype=adapter_dtype, device=place))
        self.lora_B = nn.Parameter(torch.empty((out_features, r), dtype=adapter_dtype, device=place))
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int = 8, alpha: float | None = None, **options: Any
    ) -> LoRALinear:
        """An adapter beside `linear`, whose weight and bias are shared, not copied, and frozen here."""
        _check_linear(linear)
        return cls(linear.in_features, linear.out_features, r, alpha, linear.weight, linear.bias, **options)

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        r: int = 8,
        alpha: float | None = None,
        **options: Any,
    ) -> LoRALinear:
        """An adapter beside a 4-bit weight, shared, not copied."""
        _check_quantized(weight)
        return cls(weight.in_features, weight.out_features, r, alpha, weight, bias, **options)

    def reset_parameters(self) -> None:
        """The adapter as at the start: A Kaiming-uniform with a = √5, B zero, so that ΔW = 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def _adapted(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, self.scaling, self.bias, dropout)

    def delta(self) -> Tensor:
        """ΔW = (alpha / r) B A, fp32 [out_features, in_features]."""
        return lora_delta(self.lora_A, self.lora_B, self.scaling)

    def _adapter_repr(self) -> str:
        return f"alpha={self.alpha:g}"


class MoRALinear(_AdaptedLinear):
    """Y = X Wᵀ + mora(dropout(X)) + b with W and b frozen; only `matrix` trains.

    - r: a LoRA's rank; matrix is [r̂, r̂], r̂ = mora_rank(in_features, out_features, r, mora_type), of about
      as many parameters, of adapter_dtype (fp32, bf16 or fp16); it starts at zero
    - mora_type: 1, 2, 3, 4, 6, "sharing" (1), "rotation" (6), "truncation" or "decoupling": see `mora`
    - weight: [out_features, in_features], dense (fp32, bf16 or fp16) or QuantizedWeight, kept by reference;
      None draws a dense one as nn.Linear does, of `dtype` on `device`, which are for that alone
    - bias: a tensor [out_features] or None
    - dropout: probability on the adapter's input, in training mode only. mora_linear has none: where it is
      on, the adapter is a pass of its own, which writes Y a second time

    There is no alpha: MoRA's scaling is 1. A QuantizedWeight moves with .to(device); .to(dtype), .half() and
    the like leave its bytes and scales as they are.

    The state_dict always describes the unmerged module: the weight (a QuantizedWeight under bitsandbytes'
    keys, "weight", "weight.absmax", …), bias, "matrix", and "mora_type", the type's name as the bytes of a
    uint8 tensor; loading sets mora_type to it, and takes the weight as LoRALinear does. The adapters that
    MoRA's authors save (kongds/MoRA, a fork of PEFT) load too: "lora_A.weight" and "lora_B.weight", or
    "lora_A.default.weight" as a whole model's state names them, with strict=False where the base is not in
    the file. Their code has one matrix under both names and computes with lora_A; two that differ are
    refused. The type stands in their config alone, as `mora_type` beside `r`, LoRA's rank, and stays the
    run's first one there when ReMoRA has switched it.

    Raises TypeError or ValueError naming the argument. Method: MoRA, Jiang et al., arXiv 2405.12130.
    """

    mora_type: int | str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        mora_type: int | str = 1,
        weight: Tensor | QuantizedWeight | None = None,
        bias: Tensor | None = None,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, r, weight, bias, dropout, adapter_dtype, device, dtype)
        self.mora_type = mora_kind(mora_type)
        size = mora_rank(in_features, out_features, r, mora_type)
        self.matrix = nn.Parameter(torch.empty((size, size), dtype=adapter_dtype, device=self.weight.device))
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int = 8, mora_type: int | str = 1, **options: Any
    ) -> MoRALinear:
        """An adapter beside `linear`, whose weight and bias are shared, not copied, and frozen here."""
        _check_linear(linear)
        shape = linear.in_features, linear.out_features
        return cls(*shape, r, mora_type, linear.weight, linear.bias, **options)

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        r: int = 8,
        mora_type: int | str = 1,
        **options: Any,
    ) -> MoRALinear:
        """An adapter beside a 4-bit weight, shared, not copied."""
        _check_quantized(weight)
        return cls(weight.in_features, weight.out_features, r, mora_type, weight, bias, **options)

    def reset_parameters(self) -> None:
        """The adapter as at the start: M = 0."""
        nn.init.zeros_(self.matrix)

    def _adapted(self, x: Tensor) -> Tensor:
        if self.training and self.dropout:
            dropped = F.dropout(x, self.dropout)
            return self._frozen(x) + mora(dropped, self.matrix, self.out_features, self.mora_type)
        return mora_linear(x, self.weight, self.matrix, self.mora_type, 1.0, self.bias)

    def delta(self) -> Tensor:
        """ΔW, fp32 [out_features, in_features]: mora_linear's, before M's rounding to x's dtype."""
        return mora_delta(self.matrix.float(), self.in_features, self.out_features, self.mora_type)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = str(self.mora_type).encode()
        destination[f"{prefix}mora_type"] = torch.tensor(list(name), dtype=torch.uint8, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = dict(state_dict)
        type_key, matrix_key = f"{prefix}mora_type", f"{prefix}matrix"
        foreign = {key: state.pop(key) for key in _original_keys(state, prefix)}
        kind, errors = self.mora_type, len(error_msgs)
        try:
            if matrix_key in state:
                if strict:
                    unexpected_keys.extend(foreign)
            elif foreign:
                state[matrix_key] = _original_matrix(prefix, foreign)
            if type_key in state:
                kind = _read_kind(type_key, state.pop(type_key), self.matrix.shape[0])
            elif not foreign:
                missing_keys.append(type_key)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(error_msgs) == errors:
            self.mora_type = kind

    def _adapter_repr(self) -> str:
        return f"mora_type={self.mora_type!r}, size={self.matrix.shape[0]}"


def _original_keys(state: Mapping[str, Any], prefix: str) -> list[str]:
    """The names of M in the MoRA authors' adapters: lora_A.weight, lora_A.<adapter>.weight, lora_B…"""
    names = (f"{prefix}lora_A.", f"{prefix}lora_B.")
    return [key for key in state if key.startswith(names) and key.endswith(".weight")]


def _original_matrix(prefix: str, tensors: Mapping[str, Any]) -> Tensor:
    """The one matrix that all of them are."""
    (first, matrix), *others = tensors.items()
    for key, other in others:
        if matrix.shape != other.shape or not torch.equal(matrix, other):
            raise ValueError(
                f"{prefix}lora_A, {prefix}lora_B: expected one square matrix under every name, got "
                f"{first} {list(matrix.shape)} and {key} {list(other.shape)}, which differ"
            )
    result: Tensor = matrix
    return result


def _read_kind(key: str, name: Any, size: int) -> int | str:
    if not isinstance(name, Tensor) or name.dtype != torch.uint8 or name.dim() != 1:
        raise ValueError(f"{key}: expected a type's name as the bytes of a uint8 tensor, got {name!r}")
    text = bytes(name.tolist()).decode("ascii", "replace")
    try:
        kind = mora_kind(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if kind == 6 and size % 2:
        raise ValueError(f"{key}: expected a type that takes r̂ = {size}, got 6, which takes even ones")
    return kind


@torch.no_grad()
def remora_merge_(layer: MoRALinear, types: Sequence[int] = (1, 2, 3, 4)) -> None:
    """A step of ReMoRA: ΔW is merged into the layer's weight for good, M is zeroed, in place, and the type
    becomes the one that follows the layer's own in `types`, circularly.

    The updates of several steps then add up to more than one square matrix can hold. A QuantizedWeight is
    quantized again with its own settings, at the cost that `merge_error` tells; a weight shared with another
    module stays as it is there. A type that is not among `types` is kept: 6, "decoupling" and "truncation"
    have no groups to switch. `matrix` stays the same Parameter; its optimizer state, which the paper resets
    here, is the caller's. layer.mora_type and the state_dict say which type it has now.

    Raises TypeError or ValueError naming the argument. Source: MoRA, Jiang et al., arXiv 2405.12130, after
    ReLoRA; the order of types is that of its authors' train.py, 1 → 2 → 3 → 4 → 1 (their remora_types=2 is
    types=(1, 2)).
    """
    if not isinstance(layer, MoRALinear):
        raise TypeError(f"layer: expected a MoRALinear, got {type(layer).__name__}")
    if not isinstance(types, Sequence):
        raise TypeError(f"types: expected a sequence, got {type(types).__name__}")
    # True == 1 and 1.0 == 1, but neither names a type
    if any(type(kind) is not int or kind not in (1, 2, 3, 4) or types.count(kind) > 1 for kind in types):
        raise ValueError(f"types: expected different ones of 1, 2, 3, 4, got {types!r}")
    layer.absorb()
    if layer.mora_type in types:
        following = types.index(layer.mora_type) + 1
        layer.mora_type = types[following % len(types)]


def _check_linear(linear: nn.Linear) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")


def _check_quantized(weight: QuantizedWeight) -> None:
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight: expected a QuantizedWeight, got {type(weight).__name__}")


def _apply_quantized(fn: Callable[[Tensor], Tensor], weight: QuantizedWeight) -> QuantizedWeight:
    """What Module._apply does to parameters, but a change of dtype touches neither bytes nor scales."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    leaves, structure = pytree.tree_flatten(weight)
    moved = [move(leaf) for leaf in leaves]
    if all(new is old for new, old in zip(moved, leaves, strict=True)):
        return weight
    result: QuantizedWeight = pytree.tree_unflatten(moved, structure)
    return result
