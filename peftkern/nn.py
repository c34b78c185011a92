"""LoRALinear: a thin module over lora_linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from peftkern.formats import QuantizedWeight
from peftkern.ops.linear import DTYPES, check_tensor, linear_4bit
from peftkern.ops.lora import check_dropout, check_scaling, lora_delta, lora_linear
from peftkern.ops.merge import merge


class LoRALinear(nn.Module):
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
    describes the unmerged module. Raises TypeError or ValueError naming the argument.
    """

    weight: nn.Parameter | QuantizedWeight
    bias: nn.Parameter | None
    _unmerged: nn.Parameter | QuantizedWeight | None

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
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("r", r)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        check_dropout(dropout)
        self.in_features, self.out_features, self.r = in_features, out_features, r
        if alpha is not None and (not isinstance(alpha, (int, float)) or isinstance(alpha, bool)):
            raise TypeError(f"alpha: expected a number or None, got {type(alpha).__name__}")
        self.alpha = float(r if alpha is None else alpha)
        self.scaling = self.alpha / r
        check_scaling(self.scaling)
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
        place = weight.device
        self.lora_A = nn.Parameter(torch.empty((r, in_features), dtype=adapter_dtype, device=place))
        self.lora_B = nn.Parameter(torch.empty((out_features, r), dtype=adapter_dtype, device=place))
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int = 8, alpha: float | None = None, **options: Any
    ) -> LoRALinear:
        """An adapter beside `linear`, whose weight and bias are shared, not copied, and frozen here."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
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
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"weight: expected a QuantizedWeight, got {type(weight).__name__}")
        return cls(weight.in_features, weight.out_features, r, alpha, weight, bias, **options)

    def reset_parameters(self) -> None:
        """The adapter as at the start: A Kaiming-uniform with a = √5, B zero, so that ΔW = 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        if self._unmerged is not None:
            if isinstance(self.weight, QuantizedWeight):
                return linear_4bit(x, self.weight, self.bias)
            return F.linear(x, self.weight, None if self.bias is None else self.bias.to(self.weight.dtype))
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, self.scaling, self.bias, dropout)

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def delta(self) -> Tensor:
        """ΔW = (alpha / r) B A, fp32 [out_features, in_features]."""
        return lora_delta(self.lora_A, self.lora_B, self.scaling)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
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
        else:
            device = self.weight.device
            self.weight = _apply_quantized(lambda tensor: tensor.to(device, copy=True), weight)

    def extra_repr(self) -> str:
        weight = self.weight
        kind = str(weight.dtype).removeprefix("torch.")
        if isinstance(weight, QuantizedWeight):
            kind = f"{weight.quant_type}, blocksize={weight.blocksize}"
            kind += ", double_quant=True" if weight.nested is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"alpha={self.alpha:g}, dropout={self.dropout:g}, bias={self.bias is not None}, weight={kind}"
            + (", merged" if self.merged else "")
        )


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
