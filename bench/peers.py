"""Who runs a case: peftkern, its peers with the path that each really takes, and the ceilings of the machine.

Every candidate has its own copies of the bytes it reads: a shared copy would be warmed by the one before.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.backends.mkl
import torch.backends.mkldnn
import torch.nn.functional as F
from torch import Tensor, nn

import peftkern
from bench import cases
from bench.cases import Case, Shape
from bench.eager_mora import EagerMora
from bench.machine import Machine
from peftkern import QuantizedWeight, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALING = 2.0
MAX_COPIES = 8192
COLD_FACTOR = 3  # copies of the weight in all, in last-level caches


class UnavailableError(Exception):
    """A candidate cannot run this case: the message says why, and is empty where it has no such operation."""


@dataclass
class Candidate:
    """`call(i)` runs on copy i of the weight and returns its outputs, to be compared with `expected()`.

    slack multiplies the gate's bound; 0 asks for equal bits.
    """

    name: str
    path: str  # as its source and our choice of arguments have it
    call: Callable[[int], Any]
    copies: int
    bytes: int  # that one call must move
    flops: int
    expected: Callable[[], tuple[Tensor, ...]] | None
    slack: float = 1.0
    kind: str = "peer"  # "ours", "peer" or "ceiling"
    gradients: bool = False
    observed: str = ""  # what a traced call went through


def once(function: Callable[[], Any]) -> Callable[[], Any]:
    return functools.lru_cache(maxsize=1)(function)


class Weights:
    """One weight in every candidate's format, as many copies as keep it out of the last-level cache."""

    def __init__(
        self, shape: Shape, dtype: str, quant_type: str, blocksize: int, cold: bool, machine: Machine
    ):
        self.shape, self.dtype, self.cold, self.machine = shape, DTYPES[dtype], cold, machine
        self.quant_type, self.blocksize = quant_type, blocksize
        generator = torch.Generator().manual_seed(shape.N * 31 + shape.K)
        self.source = (torch.randn(shape.N, shape.K, generator=generator) * 0.02).to(self.dtype)
        self.first: QuantizedWeight = peftkern.quantize_4bit(self.source, quant_type, blocksize)
        self.packed_bytes = cases.packed_bytes(shape, blocksize)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.shape, self.dtype, self.quant_type, self.blocksize, self.cold)

    def copies(self, one: int) -> int:
        """How many copies of `one` bytes a candidate rotates."""
        if not self.cold:
            return 1
        wanted = max(2, -(-COLD_FACTOR * self.machine.llc_bytes // one))
        affordable = max(1, self.machine.memory_bytes // 16 // one)
        if wanted > min(affordable, MAX_COPIES):
            reason = "memory" if affordable < wanted else "so small a weight"
            raise UnavailableError(
                f"{wanted} copies of {one} bytes would be needed for a cold cache: too many for {reason}"
            )
        return wanted

    @functools.cached_property
    def dense_f32(self) -> Tensor:
        """The values that the bytes stand for, from the reference, unrounded."""
        return reference.dequantize_4bit(self.first, torch.float32)

    def quantize(self) -> list[QuantizedWeight]:
        """Copies in memory of their own, as quantize_4bit leaves them."""
        settings = self.quant_type, self.blocksize
        return [peftkern.quantize_4bit(self.source, *settings) for _ in range(self.copies(self.packed_bytes))]

    @functools.cached_property
    def quantized(self) -> list[QuantizedWeight]:
        return self.quantize()

    @functools.cached_property
    def plain_bytes(self) -> list[Tensor]:
        """As many bytes as packed and absmax have, in memory that was allocated as theirs was."""
        size = self.first.packed.nbytes + self.first.absmax.nbytes
        source = torch.randn(2, size)
        return [peftkern.quantize_4bit(source).packed for _ in range(self.copies(size))]

    def _dense(self, dtype: torch.dtype) -> list[Tensor]:
        source = self.dense_f32.to(dtype)
        return [source.clone() for _ in range(self.copies(source.nbytes))]

    @functools.cached_property
    def dense(self) -> list[Tensor]:
        return self._dense(self.dtype)

    @functools.cached_property
    def dense_single(self) -> list[Tensor]:
        return self._dense(torch.float32)

    @functools.cached_property
    def bnb(self) -> list[tuple[Tensor, Any]]:
        """(packed, QuantState) as bitsandbytes makes and keeps them."""
        _bitsandbytes()
        packed, state = self.first.to_bitsandbytes()
        state.dtype = self.dtype
        return [(packed.clone(), _clone_state(state)) for _ in range(self.copies(self.packed_bytes))]

    @functools.cached_property
    def bnb_eval(self) -> list[tuple[Tensor, Any]]:
        """The same after bitsandbytes' own repacking for inference (bf16 absmax)."""
        functional = _bitsandbytes().functional
        if self.dtype != torch.bfloat16:
            raise UnavailableError("computes in bf16 only")
        if not functional.has_avx512bf16():
            raise UnavailableError("bitsandbytes repacks for inference only on CPUs with AVX512_BF16")
        if self.shape.N % 32 or self.shape.K % self.blocksize:
            raise UnavailableError("its repacking needs N % 32 == 0 and K % blocksize == 0")
        packed, state = self.first.to_bitsandbytes()
        state.dtype = self.dtype
        packed, state = functional._convert_weight_packed_for_cpu(packed.clone(), _clone_state(state))
        return [(packed.clone(), _clone_state(state)) for _ in range(self.copies(self.packed_bytes))]

    @functools.cached_property
    def int4pack(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """torch's own 4-bit format: uniform steps, groups along K; and the values it stands for."""
        N, K, group = self.shape.N, self.shape.K, self.blocksize
        if self.dtype != torch.bfloat16:
            raise UnavailableError("measured in bf16 only")
        if N % 16 or K % group or group not in (32, 64, 128, 256):
            raise UnavailableError("it needs N % 16 == 0, K % group == 0 and a group of 32, 64, 128 or 256")
        blocks = self.dense_f32.view(N, K // group, group)
        low, high = blocks.amin(2), blocks.amax(2)
        scale = ((high - low) / 15).clamp(min=1e-8).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        codes = ((blocks - zero.float()[..., None]) / scale.float()[..., None] + 8).round_().clamp_(0, 15)
        values = ((codes - 8) * scale.float()[..., None] + zero.float()[..., None]).reshape(N, K)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.reshape(N, K).int(), 1)
        scales = torch.stack([scale.t(), zero.t()], dim=2).contiguous()
        n = self.copies(packed.nbytes + scales.nbytes)
        return [(packed.clone(), scales.clone()) for _ in range(n)], values


def _bitsandbytes() -> Any:
    try:
        # it warns on import that a kernel from a model hub is not there; its own library is what is measured
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        import bitsandbytes
        import bitsandbytes.functional
    except ImportError as error:
        raise UnavailableError(f"bitsandbytes is not installed ({error})") from error
    return bitsandbytes


def _clone_state(state: Any) -> Any:
    """A QuantState with its own bytes."""
    new = copy.copy(state)
    new.absmax = state.absmax.clone()
    return new


class Inputs:
    """The tensors of one case. Activations are hot in both cache states, as they are in a model."""

    def __init__(self, case: Case, weights: Weights):
        generator = torch.Generator().manual_seed(case.M * 7 + case.rank)
        N, K, M, R = case.shape.N, case.shape.K, case.M, case.rank

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            return (torch.randn(rows, columns, generator=generator) * scale).to(DTYPES[case.dtype])

        self.case, self.weights = case, weights
        self.x = normal(M, K, 1.0)
        self.dy = normal(M, N, 1.0)
        # peft keeps adapters in fp32 while training; in serving they have the model's dtype
        adapter = torch.float32 if case.op in cases.BACKWARD_OPS else DTYPES[case.dtype]
        if case.mora_type:
            # of a size that makes mora(X) as large as X Wᵀ
            self.matrix = normal(case.side, case.side, K**-0.5).to(adapter)
            # no base weight: the matrix itself has to come from memory
            alone = cases.weight_passes(case.op) == 0
            self.matrix_copies = weights.copies(self.matrix.nbytes) if alone else len(weights.quantized)
            return
        self.A = normal(R, K, K**-0.5).to(adapter)
        self.B = normal(N, R, 0.02).to(adapter)
        self.adapter_copies = [(self.A.clone(), self.B.clone()) for _ in range(len(weights.quantized))]

    def adapter(self, i: int) -> tuple[Tensor, Tensor]:
        return self.adapter_copies[i % len(self.adapter_copies)]

    def matrices(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Copies of MoRA's matrix, of one candidate's own."""
        return [self.matrix.to(dtype or self.matrix.dtype, copy=True) for _ in range(self.matrix_copies)]

    @functools.cached_property
    def references(self) -> tuple[Tensor, ...]:
        """What every candidate on these bytes must return: peftkern.reference in fp32, in fp64 for fp32."""
        case, wide = self.case, torch.float64 if self.case.dtype == "fp32" else torch.float32
        if case.mora_type:
            return self._mora_references()
        x, dy, A, B = (tensor.to(wide) for tensor in (self.x, self.dy, self.A, self.B))
        weight = self.weights.first
        if case.op == "linear_4bit":
            return (reference.linear_4bit(x, weight),)
        if case.op == "lora_linear":
            return (reference.lora_linear(x, weight, A, B, SCALING),)
        if case.op == "dx":
            x.requires_grad_()
            return torch.autograd.grad(reference.linear_4bit(x, weight), (x,), dy)
        if case.op == "train_step":
            inputs = tuple(tensor.requires_grad_() for tensor in (x, A, B))
            y = reference.lora_linear(x, weight, A, B, SCALING)
            return (y.detach(), *torch.autograd.grad(y, inputs, dy))
        if case.op == "dequantize":
            return (reference.dequantize_4bit(self.weights.first, DTYPES[case.dtype]),)
        quantized = reference.quantize_4bit(self.weights.source, case.quant_type, case.blocksize)
        return quantized.packed.flatten(), quantized.absmax.flatten()

    def _mora_references(self) -> tuple[Tensor, ...]:
        """In fp64 for every dtype."""
        case, differentiated = self.case, self.case.op in cases.BACKWARD_OPS
        x, matrix, dy = (tensor.double() for tensor in (self.x, self.matrix, self.dy))
        with torch.set_grad_enabled(differentiated):
            inputs = (x.requires_grad_(differentiated), matrix.requires_grad_(differentiated))
            if cases.weight_passes(case.op):
                y = reference.mora_linear(x, self.weights.first, matrix, case.mora_type)
            else:
                y = reference.mora(x, matrix, case.shape.N, case.mora_type)
        return (y.detach(), *torch.autograd.grad(y, inputs, dy)) if differentiated else (y,)


# what really ran


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """Everything that C code prints meanwhile, oneDNN's and MKL's verbose lines above all."""
    libc = ctypes.CDLL(None)
    text: list[str] = []
    with tempfile.TemporaryFile() as file:
        libc.fflush(None)
        saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        for fd, _ in saved:
            os.dup2(file.fileno(), fd)
        try:
            yield lambda: "".join(text)
        finally:
            libc.fflush(None)
            for fd, old in saved:
                os.dup2(old, fd)
                os.close(old)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def observe(call: Callable[[], Any]) -> str:
    """What one call went through: bitsandbytes' operators, oneDNN's implementations, MKL's GEMM."""
    mkl, onednn = torch.backends.mkl, torch.backends.mkldnn
    with (
        _captured() as text,
        torch.autograd.profiler.profile() as profile,
        onednn.verbose(onednn.VERBOSE_ON),  # type: ignore[no-untyped-call]
        mkl.verbose(mkl.VERBOSE_ON),  # type: ignore[no-untyped-call]
    ):
        call()
    seen: dict[str, None] = {}
    for event in profile.function_events or ():
        if re.match(r"bitsandbytes::|peftkern::|aten::_weight_int4pack", event.name):
            seen[event.name] = None
    for line in text().splitlines():
        fields = line.split(",")
        if line.startswith("onednn_verbose") and "exec" in fields and len(fields) > 6:
            seen["oneDNN " + fields[fields.index("exec") + 3]] = None
        elif match := re.match(r"MKL_VERBOSE (\w*GEM[MV]\w*)\(", line, re.IGNORECASE):
            seen["MKL " + match[1]] = None
    return " + ".join(seen) or "ATen"


# peftkern


def _ours_path(op: str, *args: Any) -> str:
    choices = peftkern.explain(op, *args).choices
    return "; ".join(dict.fromkeys(f"{c.call.primitive}: {c.backend} {c.detail}".strip() for c in choices))


def _differentiate(inputs: tuple[Tensor, ...], call: Callable[[], Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    y = call()
    return (y.detach(), *torch.autograd.grad(y, inputs, dy))


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


def _graphs(
    forward: Callable[[Tensor, int], Tensor], inputs: Inputs, copies: int
) -> Callable[[int], tuple[Tensor, ...]]:
    """The backward pass alone: one recorded graph for each copy of the weight."""
    recorded: list[tuple[Tensor, Tensor]] = []
    for i in range(copies):
        (x,) = _leaves(inputs.x)
        recorded.append((forward(x, i), x))
    return lambda i: torch.autograd.grad(*recorded[i], inputs.dy, retain_graph=True)


def ours(inputs: Inputs) -> Candidate:
    case, weights, x = inputs.case, inputs.weights, inputs.x
    quantized, n = weights.quantized, len(weights.quantized)
    moved = weights.packed_bytes * cases.weight_passes(case.op) + cases.activation_bytes(case)
    make = functools.partial(
        Candidate,
        cases.OURS,
        copies=n,
        bytes=moved,
        flops=cases.flops(case),
        expected=lambda: inputs.references,
    )
    if case.op == "linear_4bit":
        path = _ours_path("linear_4bit", x, quantized[0])
        return make(path=path, call=lambda i: peftkern.linear_4bit(x, quantized[i]))
    if case.op == "lora_linear":
        path = _ours_path("lora_linear", x, quantized[0], inputs.A, inputs.B, SCALING)
        return make(
            path=path,
            call=lambda i: peftkern.lora_linear(x, quantized[i], *inputs.adapter(i), SCALING),
        )
    if case.op == "dx":
        (leaf,) = _leaves(x)
        path = _ours_path("linear_4bit", leaf, quantized[0])
        call = _graphs(lambda x, i: peftkern.linear_4bit(x, quantized[i]), inputs, n)
        return make(path=path, call=call, gradients=True)
    if case.op == "train_step":
        leaf = _leaves(x)[0]
        adapters = [_leaves(*inputs.adapter(i)) for i in range(n)]

        def step(i: int) -> tuple[Tensor, ...]:
            A, B = adapters[i]
            return _differentiate(
                (leaf, A, B), lambda: peftkern.lora_linear(leaf, quantized[i], A, B, SCALING), inputs.dy
            )

        path = _ours_path("lora_linear", leaf, quantized[0], *adapters[0], SCALING)
        return make(path=path, call=step, gradients=True)
    if case.mora_type:
        return _ours_mora(inputs, make)
    if case.op == "dequantize":
        path = _ours_path("dequantize_4bit", quantized[0], DTYPES[case.dtype])
        dtype = DTYPES[case.dtype]
        return make(path=path, call=lambda i: peftkern.dequantize_4bit(quantized[i], dtype), slack=0.0)
    source = weights.source
    copies = weights.copies(source.nbytes)
    sources = [source.clone() for _ in range(copies)]

    def quantize(i: int) -> tuple[Tensor, Tensor]:
        result = peftkern.quantize_4bit(sources[i], case.quant_type, case.blocksize)
        return result.packed.flatten(), result.absmax.flatten()

    path = _ours_path("quantize_4bit", source, case.quant_type, case.blocksize)
    return make(path=path, call=quantize, slack=0.0, copies=copies)


def _ours_mora(inputs: Inputs, make: Callable[..., Candidate]) -> Candidate:
    case, kind, N = inputs.case, inputs.case.mora_type, inputs.case.shape.N
    x, matrices, over = inputs.x, inputs.matrices(), cases.weight_passes(case.op) > 0
    quantized = inputs.weights.quantized if over else []
    path = (
        _ours_path("mora_linear", x, quantized[0], matrices[0], kind)
        if over
        else _ours_path("mora", x, matrices[0], N, kind)
    )

    def forward(x: Tensor, matrix: Tensor, i: int) -> Tensor:
        if over:
            return peftkern.mora_linear(x, quantized[i], matrix, kind)
        return peftkern.mora(x, matrix, N, kind)

    return make(path=path, copies=len(matrices), **_mora_call(inputs, forward, matrices))


def _mora_call(
    inputs: Inputs, forward: Callable[[Tensor, Tensor, int], Tensor], matrices: list[Tensor]
) -> dict[str, Any]:
    """A Candidate's call, forward(x, matrix, i) or that and its gradients, and whether it has them."""
    x = inputs.x
    if inputs.case.op not in cases.BACKWARD_OPS:
        return {"call": lambda i: forward(x, matrices[i], i), "gradients": False}
    leaf, leaves = _leaves(x)[0], _leaves(*matrices)

    def step(i: int) -> tuple[Tensor, ...]:
        return _differentiate((leaf, leaves[i]), lambda: forward(leaf, leaves[i], i), inputs.dy)

    return {"call": step, "gradients": True}


def ours_without_adapter(inputs: Inputs) -> Candidate:
    """What the adapter costs: the same weight and input, linear_4bit alone, with dX where the case has it."""
    case, weights, x = inputs.case, inputs.weights, inputs.x
    differentiated = case.op in cases.BACKWARD_OPS
    plain = dataclasses.replace(case, op="linear_4bit", mora_type=0)
    quantized = weights.quantize()
    (leaf,) = _leaves(x)

    def step(i: int) -> tuple[Tensor, ...]:
        return _differentiate((leaf,), lambda: peftkern.linear_4bit(leaf, quantized[i]), inputs.dy)

    def expected() -> tuple[Tensor, ...]:
        y = F.linear(x.float(), weights.dense_f32)
        return (y, inputs.dy.float() @ weights.dense_f32) if differentiated else (y,)

    passes = cases.weight_passes(case.op)
    return Candidate(
        cases.LINEAR,
        _ours_path("linear_4bit", leaf if differentiated else x, quantized[0]),
        step if differentiated else lambda i: peftkern.linear_4bit(x, quantized[i]),
        len(quantized),
        passes * (weights.packed_bytes + cases.activation_bytes(plain)),
        passes * cases.flops(plain),
        once(expected),
        gradients=differentiated,
    )


def lora(inputs: Inputs) -> Candidate:
    """peftkern's LoRA with about the parameters of MoRA's matrix, on its own copies of the same weight."""
    case = inputs.case
    op = {"mora_linear": "lora_linear", "mora_linear_step": "train_step"}.get(case.op)
    if op is None:
        raise UnavailableError
    weights = copy.copy(inputs.weights)
    weights.quantized = weights.quantize()
    candidate = ours(Inputs(dataclasses.replace(case, op=op, rank=case.lora_rank, mora_type=0), weights))
    return dataclasses.replace(
        candidate, name=cases.LORA, path=f"r = {case.lora_rank}, {candidate.path}", kind="peer"
    )


# peers


def dense(inputs: Inputs) -> Candidate:
    """torch on the dequantized weight in x's dtype; with LoRA, the three matmuls that one would write."""
    case, weights, x, dy = inputs.case, inputs.weights, inputs.x, inputs.dy
    if case.mora_type or case.op in ("dequantize", "quantize"):
        raise UnavailableError
    W = weights.dense
    call: Callable[[int], Any]
    path = "linear" if case.op == "linear_4bit" else "dY @ W"
    gradients = False
    if case.op == "linear_4bit":
        call = lambda i: F.linear(x, W[i])  # noqa: E731
    elif case.op == "dx":
        call = lambda i: (torch.matmul(dy, W[i]),)  # noqa: E731
    elif case.op == "lora_linear":
        path = "linear + s·linear(linear)"

        def call(i: int) -> Tensor:
            A, B = inputs.adapter(i)
            return F.linear(x, W[i]) + SCALING * F.linear(F.linear(x, A), B)

    else:
        path, gradients = f"linear + s·linear(linear), adapter in {case.dtype}", True
        leaf = _leaves(x)[0]
        A, B = _leaves(inputs.A.to(x.dtype), inputs.B.to(x.dtype))

        def call(i: int) -> tuple[Tensor, ...]:
            return _differentiate(
                (leaf, A, B), lambda: F.linear(leaf, W[i]) + SCALING * F.linear(F.linear(leaf, A), B), dy
            )

    moved = W[0].nbytes * cases.weight_passes(case.op) + cases.activation_bytes(case)
    return Candidate(
        cases.DENSE if case.dtype != "fp32" else cases.DENSE_F32,
        path,
        call,
        len(W),
        moved,
        cases.flops(case),
        lambda: inputs.references,
        slack=2.0,
        gradients=gradients,
    )


def eager_mora(case: Case) -> EagerMora:
    try:
        return EagerMora(case.mora_type, case.shape.K, case.shape.N, case.side, DTYPES[case.dtype])
    except ValueError as error:
        raise UnavailableError(str(error)) from error


def _torch_mora(
    inputs: Inputs, name: str, compile_it: bool, base: Callable[[Tensor, int], Tensor] | None = None
) -> Candidate:
    """The formula step by step, everything in x's dtype, over `base` or torch's product with a dense W."""
    case, weights = inputs.case, inputs.weights
    if not case.mora_type:
        raise UnavailableError
    adapter, matrices = eager_mora(case), inputs.matrices(weights.dtype)
    over = cases.weight_passes(case.op) > 0
    dense_weights = weights.dense if over and base is None else []
    copies, weight_bytes = len(matrices), weights.packed_bytes
    steps = {2: "sums of groups", 3: "sums of groups", 6: "pad, view, rotate"}
    path = f"{steps.get(case.mora_type, 'pad, view, sum')}, linear, repeat in {case.dtype}"

    def prepared(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=False, fullgraph=True) if compile_it else function

    if compile_it:
        torch._dynamo.reset()  # what an earlier case compiled, and its count of recompilations
    if base is not None:

        def forward(x: Tensor, matrix: Tensor, i: int) -> Tensor:
            return base(x, i) + adapter(x, matrix)  # type: ignore[no-any-return]
    elif over:
        together = prepared(lambda x, matrix, W: F.linear(x, W) + adapter(x, matrix))
        copies, weight_bytes = len(dense_weights), dense_weights[0].nbytes
        path = f"linear on a dense {case.dtype} W + {path}"

        def forward(x: Tensor, matrix: Tensor, i: int) -> Tensor:
            return together(x, matrix, dense_weights[i])
    else:
        alone = prepared(adapter)

        def forward(x: Tensor, matrix: Tensor, i: int) -> Tensor:
            return alone(x, matrix)

    candidate = Candidate(
        name,
        f"inductor, dynamic=False: {path}" if compile_it else path,
        copies=copies,
        bytes=weight_bytes * cases.weight_passes(case.op) + cases.activation_bytes(case),
        flops=cases.flops(case),
        expected=lambda: inputs.references,
        slack=3.0,  # each step rounds to x's dtype; in type 6 the table, the products with it and their sum
        **_mora_call(inputs, forward, matrices),
    )
    if compile_it:
        try:
            candidate.call(0)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise UnavailableError(f"torch.compile failed: {type(error).__name__}: {lines[0]}") from error
    return candidate


def eager(inputs: Inputs) -> Candidate:
    """MoRA as its authors compute it, one operator after the other."""
    return _torch_mora(inputs, cases.EAGER, compile_it=False)


def compiled(inputs: Inputs) -> Candidate:
    """The same functions through torch.compile; compiling is not part of the time."""
    return _torch_mora(inputs, cases.COMPILED, compile_it=True)


def dense_single(inputs: Inputs) -> Candidate:
    """torch on the fp32 weight, X given in fp32 too."""
    case, weights = inputs.case, inputs.weights
    if case.op not in ("linear_4bit", "dx") or case.dtype == "fp32":
        raise UnavailableError
    W, x, dy = weights.dense_single, inputs.x.float(), inputs.dy.float()
    if case.op == "dx":
        call: Callable[[int], Any] = lambda i: (torch.matmul(dy, W[i]),)  # noqa: E731
    else:
        call = lambda i: F.linear(x, W[i])  # noqa: E731
    moved = W[0].nbytes + 2 * cases.activation_bytes(case)
    path = "linear" if case.op == "linear_4bit" else "dY @ W"
    return Candidate(cases.DENSE_F32, path, call, len(W), moved, cases.flops(case), lambda: inputs.references)


def _bnb_layer(packed: Tensor, state: Any, dtype: torch.dtype) -> nn.Module:
    """A Linear4bit around bytes that are already quantized."""
    bitsandbytes = _bitsandbytes()
    N, K = state.shape
    with torch.device("meta"):
        layer = bitsandbytes.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type=state.quant_type)
    layer.weight = bitsandbytes.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        bnb_quantized=True,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        compress_statistics=state.nested,
        module=layer,
    )
    layer.quant_state = state
    return layer  # type: ignore[no-any-return]


class _Model(nn.Module):
    """The smallest model that peft takes; the flag is what transformers sets on a 4-bit model."""

    is_loaded_in_4bit = True

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # type: ignore[no-any-return]


def peft_layer(packed: Tensor, state: Any, dtype: torch.dtype, A: Tensor, B: Tensor) -> Any:
    """peft's LoRA around bitsandbytes' Linear4bit, as get_peft_model makes it, with given adapters."""
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora.bnb import Linear4bit
    except ImportError as error:
        raise UnavailableError(f"peft is not installed ({error})") from error
    rank = A.shape[0]
    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["proj"], lora_dropout=0.0)
    layer = get_peft_model(_Model(_bnb_layer(packed, state, dtype)), config).base_model.model.proj
    if type(layer) is not Linear4bit:
        raise UnavailableError(
            f"peft took {type(layer).__module__}.{type(layer).__name__} instead of its Linear4bit"
        )
    layer.lora_A["default"].weight = nn.Parameter(A.clone())
    layer.lora_B["default"].weight = nn.Parameter(B.clone())
    return layer


def bnb_matmul(weights: Weights) -> Callable[[Tensor, int], Tensor]:
    """bitsandbytes' product with copy i of the weight, not repacked."""
    matmul, states = _bitsandbytes().matmul_4bit, weights.bnb
    return lambda x, i: matmul(x, states[i][0], quant_state=states[i][1])


def bnb(inputs: Inputs) -> Candidate:
    """bitsandbytes while training, and for inference wherever it has not repacked the weight."""
    case, weights, x = inputs.case, inputs.weights, inputs.x
    if case.mora_type:
        if not cases.weight_passes(case.op):
            raise UnavailableError
        candidate = _torch_mora(inputs, cases.BNB_EAGER, compile_it=False, base=bnb_matmul(weights))
        return dataclasses.replace(candidate, path=f"matmul_4bit, weight not repacked, + {candidate.path}")
    functional = _bitsandbytes().functional
    matmul = _bitsandbytes().matmul_4bit
    states = weights.bnb
    moved = weights.packed_bytes * cases.weight_passes(case.op) + cases.activation_bytes(case)
    make = functools.partial(
        Candidate,
        copies=len(states),
        bytes=moved,
        flops=cases.flops(case),
        expected=lambda: inputs.references,
        slack=2.0,
    )
    if case.op == "linear_4bit":
        return make(
            cases.BNB,
            path="matmul_4bit, weight not repacked: dequantize, then linear",
            call=lambda i: matmul(x, states[i][0], quant_state=states[i][1]),
        )
    if case.op == "dx":
        call = _graphs(lambda x, i: matmul(x, states[i][0], quant_state=states[i][1]), inputs, len(states))
        return make(cases.BNB, path="MatMul4Bit.backward: dequantize, then dY @ W", call=call, gradients=True)
    if case.op == "dequantize":
        return make(
            cases.BNB,
            path="functional.dequantize_4bit",
            call=lambda i: functional.dequantize_4bit(*states[i]),
        )
    if case.op == "quantize":
        source = weights.source
        sources = [source.clone() for _ in range(weights.copies(source.nbytes))]

        def quantize(i: int) -> tuple[Tensor, Tensor]:
            packed, state = functional.quantize_4bit(
                sources[i], quant_type=case.quant_type, blocksize=case.blocksize
            )
            return packed.flatten(), state.absmax.flatten()

        # its reciprocal of absmax rounds some weights to the neighbouring code
        return make(cases.BNB, path="functional.quantize_4bit", call=quantize, copies=len(sources))
    adapters = [inputs.adapter(i) for i in range(len(states))]
    layers = [peft_layer(*states[i], x.dtype, *adapters[i]).train() for i in range(len(states))]
    if case.op == "lora_linear":
        return make(
            cases.PEFT,
            path="peft lora.bnb.Linear4bit on Linear4bit in train mode (dequantize, then linear)",
            call=lambda i: layers[i](x),
        )
    leaf = _leaves(x)[0]

    def step(i: int) -> tuple[Tensor, ...]:
        layer = layers[i]
        parameters = (leaf, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        return _differentiate(parameters, lambda: layer(leaf), inputs.dy)

    return make(
        cases.PEFT,
        path="peft lora.bnb.Linear4bit on Linear4bit, adapter in fp32 (peft's default)",
        call=step,
        gradients=True,
    )


def bnb_eval(inputs: Inputs) -> Candidate:
    """bitsandbytes in eval mode without gradients: its fused kernel on repacked weights."""
    case, weights, x = inputs.case, inputs.weights, inputs.x
    if case.op not in ("linear_4bit", "lora_linear"):
        raise UnavailableError
    states = weights.bnb_eval
    moved = weights.packed_bytes + cases.activation_bytes(case)
    if case.op == "linear_4bit":
        matmul = _bitsandbytes().matmul_4bit
        call: Callable[[int], Any] = lambda i: matmul(x, states[i][0], quant_state=states[i][1])  # noqa: E731
        name, path = cases.BNB_EVAL, "gemv_4bit on the weight repacked for AVX512_BF16, absmax in bf16"
    else:
        layers = [
            peft_layer(*states[i], x.dtype, *inputs.adapter(i)).eval().requires_grad_(False)
            for i in range(len(states))
        ]
        call = lambda i: layers[i](x)  # noqa: E731
        name, path = (
            cases.PEFT_EVAL,
            "peft lora.bnb.Linear4bit in eval mode, gemv_4bit on the repacked weight",
        )
    return Candidate(
        name, path, call, len(states), moved, cases.flops(case), lambda: inputs.references, slack=3.0
    )


def int4pack(inputs: Inputs) -> Candidate:
    """torch's int4 GEMM on its own format: uniform steps, so other values than NF4."""
    case, weights, x = inputs.case, inputs.weights, inputs.x
    if case.op != "linear_4bit":
        raise UnavailableError
    copies, values = weights.int4pack
    matmul = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Candidate(
        cases.INT4PACK,
        f"_weight_int4pack_mm_for_cpu, uniform int4 in groups of {weights.blocksize}",
        lambda i: matmul(x, copies[i][0], weights.blocksize, copies[i][1]),
        len(copies),
        sum(tensor.nbytes for tensor in copies[0]) + cases.activation_bytes(case),
        cases.flops(case),
        once(lambda: (F.linear(x.float(), values),)),
        slack=3.0,
    )


# ceilings


def _cpu(name: str) -> Any:
    try:
        from peftkern import _cpu
    except ImportError as error:
        raise UnavailableError(f"needs the compiled module ({error})") from error
    if not hasattr(_cpu, name):
        raise UnavailableError(f"the compiled module has no {name}")
    return _cpu


def read_ceiling(inputs: Inputs) -> Candidate:
    """The time of reading the packed bytes and absmax once, with the same threads, doing nothing else."""
    weights, threads = inputs.weights, torch.get_num_threads()
    if inputs.case.op not in ("linear_4bit", "lora_linear", "mora_linear", "dequantize"):
        raise UnavailableError
    probe, buffers = _cpu("probe_read").probe_read, weights.plain_bytes
    return Candidate(
        cases.READ,
        "vector loads of the packed weight and absmax",
        lambda i: probe(buffers[i], threads),
        len(buffers),
        buffers[0].nbytes,
        0,
        None,
        kind="ceiling",
    )


@functools.lru_cache
def _peak_iterations(dtype: torch.dtype, threads: int) -> tuple[int, int]:
    """(iterations of each thread that last some milliseconds, operations of all threads).

    Judged by the fastest of several runs on one thread: where another program has the other core, two threads
    wait for each other, however little they do.
    """
    probe, iterations = _cpu("probe_peak").probe_peak, 1000
    while True:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            probe(dtype, iterations, 1)
            times.append(time.perf_counter() - start)
        if min(times) > 2e-3:
            return iterations, round(probe(dtype, iterations, threads) * 1e9)
        iterations *= 2


def peak_ceiling(inputs: Inputs) -> Candidate:
    """Multiply-adds on registers: the same threads and the instructions of the level in use."""
    case, threads = inputs.case, torch.get_num_threads()
    if case.op in ("dequantize", "quantize"):
        raise UnavailableError
    module = _cpu("probe_peak")
    level = module.kernel("matmul", DTYPES[case.dtype])
    dtype = DTYPES[case.dtype]
    iterations, operations = _peak_iterations(dtype, threads)
    return Candidate(
        cases.PEAK,
        f"{level} multiply-adds on registers",
        lambda i: module.probe_peak(dtype, iterations, threads),
        1,
        0,
        operations,
        None,
        kind="ceiling",
    )


BUILDERS: dict[str, Callable[[Inputs], Candidate]] = {
    "dense": dense,
    "fp32": dense_single,
    "bnb": bnb,
    "bnb-eval": bnb_eval,
    "int4pack": int4pack,
    "eager": eager,
    "compile": compiled,
    "lora": lora,
}


def build(inputs: Inputs, wanted: tuple[str, ...]) -> tuple[list[Candidate], dict[str, str]]:
    """All who can run the case, peftkern first, and for the others why not."""
    builders: dict[str, Callable[[Inputs], Candidate]] = {"ours": ours}
    if inputs.case.op in ("lora_linear", "mora_linear", "mora_linear_step"):
        builders[cases.LINEAR] = ours_without_adapter
    builders |= {name: BUILDERS[name] for name in wanted}
    builders |= {cases.READ: read_ceiling, cases.PEAK: peak_ceiling}
    found: list[Candidate] = []
    missing: dict[str, str] = {}
    for name, builder in builders.items():
        try:
            with torch.set_grad_enabled(inputs.case.op in cases.BACKWARD_OPS):
                found.append(builder(inputs))
        except UnavailableError as reason:
            if str(reason):
                missing[name] = str(reason)
    return found, missing
