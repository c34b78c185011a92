"""4-bit weights in bitsandbytes' layout: the record, its checks, and the ways in and out.

Layout (bitsandbytes 0.50): the weight [N, K] is flattened row-major; weight i has a 4-bit code q[i] and
belongs to block i // blocksize, so a block may straddle rows and the last one may be short.

    packed[i // 2] = q[i] << 4 | q[i + 1]          i even: high nibble first; an odd tail is padded
    w[i]           = code[q[i]] * absmax[i // blocksize]

Double quantization stores absmax itself in 8 bits:

    absmax[j]      = nested.code[u8[j]] * nested.absmax[j // nested.blocksize] + nested.offset

Sources: Dettmers et al., "QLoRA" (arXiv 2305.14314) for NF4 and double quantization; Dettmers, "8-bit
approximations for parallelism in deep learning" (arXiv 1511.04561) for the dynamic 8-bit map; bitsandbytes
for the byte layout and the names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftkern.backends import cpu

# The only copy in Python (csrc/format.h holds the only one in C++). Each literal is an fp32 value, exactly.
# NF4: quantiles of N(0, 1) scaled to [-1, 1], ascending. FP4: bit 3 is the sign, the magnitudes are
# {0, 1/16, 8, 12, 4, 6, 2, 3} / 12, and nibble 8 is +0.
CODES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": (
        0.0,
        0.0052083334885537624,
        0.6666666865348816,
        1.0,
        0.3333333432674408,
        0.5,
        0.1666666716337204,
        0.25,
        0.0,
        -0.0052083334885537624,
        -0.6666666865348816,
        -1.0,
        -0.3333333432674408,
        -0.5,
        -0.1666666716337204,
        -0.25,
    ),
}
QUANT_TYPES = tuple(CODES)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STORAGE_DTYPES = (torch.uint8, *DTYPES.values())
_QUANT_STATE = "quant_state.bitsandbytes__"
_MAX_BLOB_BYTES = 1 << 16
_JSON_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_JSON_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}


def _dynamic_code() -> tuple[float, ...]:
    """The signed dynamic 8-bit map: 2^e midpoints of [0.1, 1] × 10^(e-6) for e = 0…6, ±; 0; 1; sorted."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32, device="cpu")
        magnitudes = (edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (exponent - 6)
        values += magnitudes.tolist()
        values += (-magnitudes).tolist()
    return tuple(sorted(values))


DYNAMIC_CODE = _dynamic_code()


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got if isinstance(got, str) else _show(got)}")


def _check_not_nested(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:  # it has no shape
        raise TypeError(f"{name}: expected a strided tensor, got a nested one")


def _check_tensor(name: str, value: object, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    _check_not_nested(name, value)
    if value.dtype is not dtype:
        raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
    return value


def _check_vector(name: str, value: object, dtype: torch.dtype, size: int, device: torch.device) -> None:
    tensor = _check_tensor(name, value, dtype)
    if tensor.dim() != 1 or tensor.shape[0] != size:
        raise _refuse(name, f"shape [{size}]", f"{list(tensor.shape)}")
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise _refuse(
            name,
            "a contiguous tensor",
            f"strides {tensor.stride()}" if tensor.layout is torch.strided else tensor.layout,
        )
    if tensor.device != device:
        raise _refuse(name, f"device {device} (as packed)", f"{tensor.device}")


def _check_dimensions(name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected (out_features, in_features), got {type(value).__name__}")
    if len(value) != 2:
        raise _refuse(name, "two dimensions (out_features, in_features)", value)
    for size in value:
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected integers, got {_show(value)}")
        if size < 0:
            raise _refuse(name, "no negative size", value)
    rows, columns = value
    if max(rows, 1) * max(columns, 1) >= 2**62:
        raise _refuse(name, "fewer than 2^62 weights", value)
    return rows, columns


def _check_nested_blocksize(name: str, value: object) -> None:
    if type(value) is not int:
        raise TypeError(f"{name}: expected an integer, got {_show(value)}")
    if value not in BLOCKSIZES:
        raise _refuse(name, f"one of {BLOCKSIZES}", value)


@dataclass(frozen=True, eq=False)
class DoubleQuant:
    """What turns 8-bit absmax codes u8[j] back into scales: ``code[u8[j]] * absmax[j // blocksize] +
    offset``.

    absmax fp32 [ceil(blocks / blocksize)], code fp32 [256], offset fp32 scalar tensor, blocksize 256 (as
    bitsandbytes writes it). The product is rounded to fp32, then the sum. Checked by the QuantizedWeight it
    belongs to.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int = NESTED_BLOCKSIZE

    @property
    def nbytes(self) -> int:
        return self.absmax.nbytes + self.code.nbytes + self.offset.nbytes

    def __repr__(self) -> str:
        return f"DoubleQuant({self.absmax.numel()} groups of {self.blocksize})"


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A 4-bit weight [N, K] = [out_features, in_features] in bitsandbytes' bytes (see the module's formulas).

    packed      uint8 [ceil(N K / 2)]
    absmax      fp32 [ceil(N K / blocksize)], or uint8 of that length when `nested` is set
    shape       (N, K)
    quant_type  "nf4" or "fp4"
    blocksize   32, 64, … 4096
    dtype       fp32, bf16 or fp16: what dequantize gives by default
    nested      None, or the DoubleQuant of absmax

    The tensors are contiguous, on one device, of any alignment, and are kept by reference. It is a pytree:
    torch.compile, torch.export and torch.func see its tensors. Raises TypeError or ValueError, naming the
    field, when the fields don't agree.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    quant_type: str
    blocksize: int
    dtype: torch.dtype
    nested: DoubleQuant | None = None

    def __post_init__(self) -> None:
        rows, columns = _check_dimensions("shape", self.shape)
        if type(self.shape) is not tuple:
            object.__setattr__(self, "shape", (rows, columns))
        if not isinstance(self.quant_type, str):
            raise TypeError(f"quant_type: expected a string, got {type(self.quant_type).__name__}")
        if self.quant_type not in CODES:
            raise _refuse("quant_type", f"one of {QUANT_TYPES}", self.quant_type)
        if type(self.blocksize) is not int:
            raise TypeError(f"blocksize: expected an integer, got {_show(self.blocksize)}")
        if self.blocksize not in BLOCKSIZES:
            raise _refuse("blocksize", f"one of {BLOCKSIZES}", self.blocksize)
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype: expected a torch.dtype, got {type(self.dtype).__name__}")
        if self.dtype not in DTYPE_NAMES:
            raise TypeError(f"dtype: expected one of {list(DTYPE_NAMES)}, got {self.dtype}")

        numel = rows * columns
        blocks = -(-numel // self.blocksize)
        device = _check_tensor("packed", self.packed, torch.uint8).device
        _check_vector("packed", self.packed, torch.uint8, (numel + 1) // 2, device)
        if self.nested is None:
            _check_vector("absmax", self.absmax, torch.float32, blocks, device)
            return
        if not isinstance(self.nested, DoubleQuant):
            raise TypeError(f"nested: expected a DoubleQuant or None, got {type(self.nested).__name__}")
        _check_nested_blocksize("nested.blocksize", self.nested.blocksize)
        groups = -(-blocks // self.nested.blocksize)
        _check_vector("absmax", self.absmax, torch.uint8, blocks, device)
        _check_vector("nested.absmax", self.nested.absmax, torch.float32, groups, device)
        _check_vector("nested.code", self.nested.code, torch.float32, 256, device)
        offset = _check_tensor("nested.offset", self.nested.offset, torch.float32)
        if offset.dim() != 0:
            raise _refuse("nested.offset", "a scalar tensor", f"shape {list(offset.shape)}")
        if offset.device != device:
            raise _refuse("nested.offset", f"device {device} (as packed)", f"{offset.device}")

    def __repr__(self) -> str:
        rows, columns = self.shape
        nested = ", double quantization" if self.nested is not None else ""
        return (
            f"QuantizedWeight([{rows}, {columns}], {self.quant_type}, blocksize {self.blocksize}{nested}, "
            f"{DTYPE_NAMES[self.dtype]}, {self.packed.device})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "kernel_args"}

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return (
            self.packed.nbytes + self.absmax.nbytes + (self.nested.nbytes if self.nested is not None else 0)
        )

    @cached_property
    def kernel_args(self) -> tuple[Any, ...]:
        """(packed, absmax, nested or None, quant_type, blocksize, N, K), nested = (absmax, code, offset,
        blocksize).

        What the compiled modules take as a 4-bit weight; made once per object.
        """
        nested = self.nested
        return (
            self.packed,
            self.absmax,
            None if nested is None else (nested.absmax, nested.code, nested.offset, nested.blocksize),
            self.quant_type,
            self.blocksize,
            self.shape[0],
            self.shape[1],
        )

    def to(self, device: torch.device | str | int, copy: bool = False) -> QuantizedWeight:
        """The same weight on `device`; itself when it is there already, unless copy=True.

        What this makes of 4 MB and more on the CPU lies in huge pages, where the system gives them to who
        asks: a cold product of few rows takes some percent less. A weight that was loaded, unpickled or moved
        with its module has the pages of whoever allocated it: weight.to("cpu", copy=True) gives a copy in
        huge ones, and the first can be let go.

        Raises TypeError or ValueError naming the argument.
        """
        if isinstance(device, (bool, torch.dtype)) or not isinstance(device, (torch.device, str, int)):
            raise TypeError(f"device: expected a device, got {_show(device)}")
        if not isinstance(copy, bool):
            raise TypeError(f"copy: expected True or False, got {_show(copy)}")
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise _refuse("device", "a device of this machine", repr(device)) from error
        if place.type == "cpu":
            place = torch.device("cpu")  # torch takes "cpu:0" for another one, and copies
        leaves, spec = pytree.tree_flatten(self)
        moved = [_moved(leaf, place, copy) for leaf in leaves]
        if all(new is old for new, old in zip(moved, leaves, strict=True)):
            return self
        weight: QuantizedWeight = pytree.tree_unflatten(moved, spec)
        return weight

    @classmethod
    def from_bitsandbytes(cls, packed: Tensor, quant_state: Any) -> QuantizedWeight:
        """From bitsandbytes' packed tensor (any quant_storage dtype) and its `QuantState`, nested or not.
        The memory is shared; `to` makes a copy in huge pages.

        Raises ValueError or TypeError, naming what was found, when the two don't agree, when the weight is
        not a matrix, when the code table is not that of the quant_type, or when bitsandbytes has repacked the
        bytes for its CPU inference kernel (which drops the double quantization; its own
        `Linear4bit.state_dict()` undoes that).
        """
        for name in ("absmax", "shape", "quant_type", "blocksize", "dtype"):
            if getattr(quant_state, name, None) is None:
                raise TypeError(
                    f"quant_state.{name}: expected a value, got None (of {type(quant_state).__name__})"
                )
        if getattr(quant_state, "packing_format_for_cpu", False):
            raise _refuse("quant_state", "plain packed bytes", "bitsandbytes' CPU inference packing")
        quant_type = quant_state.quant_type
        if quant_type not in CODES:
            raise _refuse("quant_state.quant_type", f"one of {QUANT_TYPES}", quant_type)
        code = getattr(quant_state, "code", None)
        if code is not None:
            _check_table("quant_state.code", code, quant_type)
        nested = None
        state2 = getattr(quant_state, "state2", None)
        if state2 is not None:
            for name in ("absmax", "code", "blocksize"):
                if getattr(state2, name, None) is None:
                    raise TypeError(f"quant_state.state2.{name}: expected a value, got None")
            offset = _check_tensor("quant_state.offset", getattr(quant_state, "offset", None), torch.float32)
            if offset.numel() != 1:
                raise _refuse("quant_state.offset", "one element", f"shape {list(offset.shape)}")
            nested = DoubleQuant(
                _plain(state2.absmax), _plain(state2.code), _plain(offset).reshape(()), state2.blocksize
            )
        return cls(
            packed=_bytes_of("packed", packed),
            absmax=_plain(quant_state.absmax),
            shape=_check_dimensions("quant_state.shape", quant_state.shape),
            quant_type=quant_type,
            blocksize=quant_state.blocksize,
            dtype=quant_state.dtype,
            nested=nested,
        )

    def to_bitsandbytes(self) -> tuple[Tensor, Any]:
        """(packed [ceil(N K / 2), 1], bitsandbytes' QuantState), sharing this weight's tensors."""
        from bitsandbytes.functional import QuantState

        nested = self.nested
        state2 = offset = None
        if nested is not None:
            offset = nested.offset
            state2 = QuantState(
                absmax=nested.absmax, code=nested.code, blocksize=nested.blocksize, dtype=torch.float32
            )
        quant_state = QuantState(
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            code=code_table(self.quant_type, self.device),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=offset,
            state2=state2,
        )
        return self.packed.unsqueeze(1), quant_state

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """bitsandbytes' keys for the weight named `prefix` ("…q_proj.weight"), as Linear4bit writes them.

        prefix                                        uint8 [ceil(N K / 2), 1]
        prefix.absmax, prefix.quant_map               fp32 [blocks] (uint8 when nested), fp32 [16]
        prefix.nested_absmax, prefix.nested_quant_map fp32 [groups], fp32 [256]               when nested
        prefix.quant_state.bitsandbytes__{quant_type} uint8: JSON of the rest

        The tensors are shared, not copied, but for the tables. safetensors and torch.load(weights_only=True)
        take them as they are; for a pickled QuantizedWeight the latter wants
        torch.serialization.safe_globals([QuantizedWeight, DoubleQuant]).
        """
        _check_prefix(prefix)
        nested = self.nested
        tensors = {
            prefix: self.packed.unsqueeze(1),
            f"{prefix}.absmax": self.absmax,
            f"{prefix}.quant_map": code_table(self.quant_type, self.device),
        }
        record: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": DTYPE_NAMES[self.dtype],
            "shape": list(self.shape),
        }
        if nested is not None:
            tensors[f"{prefix}.nested_absmax"] = nested.absmax
            tensors[f"{prefix}.nested_quant_map"] = nested.code.clone()
            record["nested_blocksize"] = nested.blocksize
            record["nested_dtype"] = "float32"
            record["nested_offset"] = nested.offset.item()
        # a default device, "meta" where a model is drawn up, is not for what has data
        blob = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8, device="cpu")
        tensors[f"{prefix}.{_QUANT_STATE}{self.quant_type}"] = blob
        return tensors

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], prefix: str) -> QuantizedWeight:
        """The weight that `state_dict(prefix)`, or bitsandbytes' Linear4bit, wrote. Other keys are left
        alone; the memory is shared, be it mapped from a file; `to` makes a copy in huge pages.

        Every size, dtype, name and number is checked against the tensors that are there before it is used;
        what doesn't agree raises ValueError or TypeError naming the key, what was expected and what came.
        Nothing is allocated by a number read from the record.
        """
        if not isinstance(tensors, Mapping):
            raise TypeError(f"tensors: expected a mapping of names to tensors, got {type(tensors).__name__}")
        _check_prefix(prefix)

        def take(suffix: str) -> Tensor:
            key = f"{prefix}{suffix}"
            if key not in tensors:
                raise _refuse(key, "a tensor of this name", "none")
            return _plain(tensors[key], key)

        blobs = [kind for kind in QUANT_TYPES if f"{prefix}.{_QUANT_STATE}{kind}" in tensors]
        if len(blobs) != 1:
            raise _refuse(f"{prefix}.{_QUANT_STATE}*", f"exactly one of {QUANT_TYPES}", blobs or "none")
        key = f"{prefix}.{_QUANT_STATE}{blobs[0]}"
        record = _read_record(key, take(f".{_QUANT_STATE}{blobs[0]}"))
        if record["quant_type"] != blobs[0]:
            raise _refuse(f"{key}: quant_type", repr(blobs[0]), record["quant_type"])
        present = {name: f"{prefix}.{name}" in tensors for name in ("nested_absmax", "nested_quant_map")}
        is_nested = "nested_offset" in record
        for name, there in present.items():
            if there is not is_nested:
                where = (
                    "a tensor, as the record is nested"
                    if is_nested
                    else "no tensor, as the record is not nested"
                )
                raise _refuse(f"{prefix}.{name}", where, "one" if there else "none")

        shape: tuple[int, int] = record["shape"]
        numel = shape[0] * shape[1]
        blocks = -(-numel // record["blocksize"])
        packed = _bytes_of(prefix, take(""))
        _check_vector(prefix, packed, torch.uint8, (numel + 1) // 2, packed.device)
        absmax = take(".absmax")
        _check_vector(
            f"{prefix}.absmax", absmax, torch.uint8 if is_nested else torch.float32, blocks, packed.device
        )
        _check_table(f"{prefix}.quant_map", take(".quant_map"), blobs[0])
        nested = None
        if is_nested:
            groups = -(-blocks // record["nested_blocksize"])
            nested_absmax, nested_code = take(".nested_absmax"), take(".nested_quant_map")
            _check_vector(f"{prefix}.nested_absmax", nested_absmax, torch.float32, groups, packed.device)
            _check_vector(f"{prefix}.nested_quant_map", nested_code, torch.float32, 256, packed.device)
            offset = torch.tensor(record["nested_offset"], dtype=torch.float32, device=packed.device)
            nested = DoubleQuant(nested_absmax, nested_code, offset, record["nested_blocksize"])
        return cls(packed, absmax, shape, blobs[0], record["blocksize"], DTYPES[record["dtype"]], nested)


def _moved(tensor: Tensor, device: torch.device, copy: bool) -> Tensor:
    """tensor.to(device, copy=copy); what is new on the CPU asks for huge pages before it is written."""
    kept = tensor.device.type == "cpu" and not copy
    if device.type != "cpu" or kept or cpu.missing() is not None or torch.compiler.is_compiling():
        return tensor.to(device, copy=copy)
    moved = torch.empty_like(tensor, device=device)
    # no stand-in for memory: a fake tensor, or one that functorch wraps
    if type(moved) is Tensor and not torch._C._are_functorch_transforms_active():
        cpu.renew_pages(moved)
    return moved.copy_(tensor)


def code_table(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """fp32 [16]: the value of each nibble."""
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


def double_quantize(absmax: Tensor) -> tuple[Tensor, DoubleQuant]:
    """absmax fp32 [blocks] → (uint8 [blocks], DoubleQuant), the bytes that bitsandbytes' CPU library gives.

        offset = mean(absmax);  d = absmax - offset
        s      = max|d| over a group of 256;  v = clamp(d * (1 / s), -1, 1)
        bin    = floor(fma((v + 1) / 2, 65535, 0.5))
        u8     = the code nearest to 2 bin / 65535 - 1          a tie goes down

    bitsandbytes' CUDA library takes the code nearest to v itself, without the 65536 bins, so its bytes can
    differ by one code where v is within 1.6e-5 of a midpoint and for tiny v. A group of zeros has s = 0 and
    codes 0. The mean is torch's as one thread of the CPU computes it, at any thread count (bitsandbytes'
    depends on the thread count in its last bit beyond 32768 blocks) and on any device: absmax is copied to
    the CPU for it. The rest rounds alike everywhere, so the bytes do not depend on the device. No blocks:
    offset 0.

    Raises ValueError for an absmax that is not finite: through the mean, one NaN or Inf would spread to every
    weight.
    """
    device = absmax.device
    code = torch.tensor(DYNAMIC_CODE, dtype=torch.float32, device=device)
    blocks = absmax.numel()
    if blocks == 0:
        offset = torch.zeros((), dtype=torch.float32, device=device)
        return absmax.to(torch.uint8), DoubleQuant(absmax, code, offset)
    has_data = type(absmax) is Tensor and device.type != "meta" and not torch.compiler.is_compiling()
    if has_data and not bool(absmax.isfinite().all()):
        bad = int((~absmax.isfinite()).sum())
        raise _refuse(
            "weight", "finite values with double_quant=True", f"NaN or Inf in {bad} of {blocks} blocks"
        )
    # A GPU would sum in another order. Two equal rows: torch splits a reduction to one element over its
    # threads, but not a reduction to two.
    source = absmax if device.type == "meta" else absmax.cpu()
    offset = source.expand(2, -1).mean(1)[0].clone().to(device)
    groups = -(-blocks // NESTED_BLOCKSIZE)
    centred = torch.nn.functional.pad(absmax - offset, (0, groups * NESTED_BLOCKSIZE - blocks)).view(
        groups, -1
    )
    scale = centred.abs().amax(1)
    unit = (centred * scale.reciprocal()[:, None]).clamp(-1.0, 1.0)
    # fp64 holds the product and the sum exactly: the one rounding to fp32 is that of the fused multiply-add.
    bins = (((unit + 1.0) * 0.5).double() * 65535.0 + 0.5).float().nan_to_num(0.0).floor()
    midpoints = (code[:-1] + code[1:]) * 0.5
    # torch divides by a number on the CPU and multiplies by its reciprocal on a GPU: no bin's code differs
    codes = torch.bucketize((bins + bins) / 65535.0 - 1.0, midpoints).to(torch.uint8)
    codes = torch.where(scale[:, None] == 0, torch.zeros_like(codes), codes)
    return codes.view(-1)[:blocks].clone(), DoubleQuant(scale, code, offset)


def _check_prefix(prefix: object) -> None:
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected the weight's name, got {type(prefix).__name__}")
    if not prefix:
        raise _refuse("prefix", "the weight's name", "''")


def _plain(value: object, name: str = "quant_state") -> Tensor:
    """A tensor without its Parameter subclass and its graph, sharing the memory unless that is misaligned."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    _check_not_nested(name, value)
    tensor = value.data if isinstance(value, torch.nn.Parameter) else value.detach()
    # torch.frombuffer and memory-mapped files give such tensors; no kernel reads a float at an odd address
    if tensor.device.type == "cpu" and type(tensor) is Tensor and tensor.layout is torch.strided:
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor
    return tensor


def _bytes_of(name: str, value: object) -> Tensor:
    """The packed bytes, uint8 [n], of a tensor of shape [n], [n, 1] or [1, n] of any quant_storage dtype."""
    tensor = _plain(value, name)
    if tensor.dtype not in _STORAGE_DTYPES:
        raise TypeError(f"{name}: expected one of {list(_STORAGE_DTYPES)}, got {tensor.dtype}")
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise _refuse(
            name,
            "a contiguous tensor",
            tensor.layout if tensor.layout is not torch.strided else f"strides {tensor.stride()}",
        )
    if tensor.dim() != 1 and not (tensor.dim() == 2 and 1 in tensor.shape):
        raise _refuse(name, "shape [n], [n, 1] or [1, n]", f"{list(tensor.shape)}")
    # a view by bytes asks for a stride of 1 of a single element too
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _values(name: str, tensor: Tensor) -> list[Any]:
    try:
        return tensor.tolist()
    except RuntimeError:  # on meta, sparse, of a storage that was let go
        got = f"device {tensor.device}, {tensor.layout}"
        raise _refuse(name, "a tensor with data", got) from None


def _check_table(name: str, value: object, quant_type: str) -> None:
    table = _check_tensor(name, value, torch.float32)
    if tuple(table.shape) != (16,):
        raise _refuse(name, "shape [16]", f"{list(table.shape)}")
    values = _values(name, table)
    if tuple(values) != CODES[quant_type]:
        raise _refuse(name, f"the {quant_type} code table", values)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("duplicate names")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"the number {name}")


def _read_record(key: str, blob: Tensor) -> dict[str, Any]:
    """The JSON record in bitsandbytes' uint8 blob: every value typed, in range, none missing or extra."""
    if blob.dtype is not torch.uint8:
        raise TypeError(f"{key}: expected {torch.uint8}, got {blob.dtype}")
    if blob.dim() != 1 or not 0 < blob.numel() <= _MAX_BLOB_BYTES:
        raise _refuse(key, f"1…{_MAX_BLOB_BYTES} bytes of JSON", f"shape {list(blob.shape)}")
    values = _values(key, blob)
    try:
        record = json.loads(
            bytes(values).decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: expected a JSON record, got {_show(error)}") from error
    if not isinstance(record, dict):
        raise _refuse(key, "a JSON object", record)
    names = set(record)
    expected = _JSON_KEYS | _JSON_NESTED_KEYS if names & _JSON_NESTED_KEYS else _JSON_KEYS
    if names != expected:
        raise _refuse(key, f"the names {sorted(expected)}", sorted(names))

    if not isinstance(record["quant_type"], str):
        raise TypeError(f"{key}: quant_type: expected a string, got {_show(record['quant_type'])}")
    record["shape"] = _check_dimensions(f"{key}: shape", record["shape"])
    if type(record["blocksize"]) is not int:
        raise TypeError(f"{key}: blocksize: expected an integer, got {_show(record['blocksize'])}")
    if record["blocksize"] not in BLOCKSIZES:
        raise _refuse(f"{key}: blocksize", f"one of {BLOCKSIZES}", record["blocksize"])
    if not isinstance(record["dtype"], str) or record["dtype"] not in DTYPES:
        raise _refuse(f"{key}: dtype", f"one of {list(DTYPES)}", record["dtype"])
    if expected is _JSON_KEYS:
        return record
    _check_nested_blocksize(f"{key}: nested_blocksize", record["nested_blocksize"])
    if record["nested_dtype"] != "float32":
        raise _refuse(f"{key}: nested_dtype", "'float32'", record["nested_dtype"])
    offset = record["nested_offset"]
    if type(offset) not in (int, float):
        raise TypeError(f"{key}: nested_offset: expected a number, got {_show(offset)}")
    if not abs(offset) <= torch.finfo(torch.float32).max or not math.isfinite(offset):
        raise _refuse(f"{key}: nested_offset", "a finite fp32 number", offset)
    return record


# A pytree node: the tensors are the leaves, in field order; the rest is the context.


def _rebuild(cls: type[Any], fields: dict[str, Any]) -> Any:
    # Unchecked: torch unflattens with placeholders, batched tensors and the like.
    instance = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(instance, name, value)
    return instance


def _flatten_nested(nested: DoubleQuant) -> tuple[list[Any], int]:
    return [nested.absmax, nested.code, nested.offset], nested.blocksize


def _unflatten_nested(leaves: Iterable[Any], blocksize: Any) -> DoubleQuant:
    absmax, code, offset = leaves
    nested: DoubleQuant = _rebuild(
        DoubleQuant, {"absmax": absmax, "code": code, "offset": offset, "blocksize": blocksize}
    )
    return nested


def _flatten(weight: QuantizedWeight) -> tuple[list[Any], tuple[Any, ...]]:
    leaves = [weight.packed, weight.absmax] + ([] if weight.nested is None else [weight.nested])
    return leaves, (weight.shape, weight.quant_type, weight.blocksize, weight.dtype)


def _unflatten(leaves: Iterable[Any], context: Any) -> QuantizedWeight:
    packed, absmax, *nested = leaves
    shape, quant_type, blocksize, dtype = context
    fields = {
        "packed": packed,
        "absmax": absmax,
        "shape": shape,
        "quant_type": quant_type,
        "blocksize": blocksize,
        "dtype": dtype,
        "nested": nested[0] if nested else None,
    }
    weight: QuantizedWeight = _rebuild(QuantizedWeight, fields)
    return weight


def _with_keys(names: tuple[str, ...], leaves: list[Any]) -> list[tuple[pytree.KeyEntry, Any]]:
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(names, leaves, strict=False)]


pytree.register_pytree_node(
    DoubleQuant,
    _flatten_nested,
    _unflatten_nested,
    serialized_type_name="peftkern.DoubleQuant",
    flatten_with_keys_fn=lambda nested: (
        _with_keys(("absmax", "code", "offset"), _flatten_nested(nested)[0]),
        nested.blocksize,
    ),
)
pytree.register_pytree_node(
    QuantizedWeight,
    _flatten,
    _unflatten,
    serialized_type_name="peftkern.QuantizedWeight",
    to_dumpable_context=lambda context: [list(context[0]), context[1], context[2], DTYPE_NAMES[context[3]]],
    from_dumpable_context=lambda saved: (tuple(saved[0]), saved[1], saved[2], DTYPES[saved[3]]),
    flatten_with_keys_fn=lambda weight: (
        _with_keys(("packed", "absmax", "nested"), _flatten(weight)[0]),
        _flatten(weight)[1],
    ),
)
