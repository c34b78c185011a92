"""What a training step keeps for backward, and its peak: each implementation in a process of its own."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import cases
from bench.cases import Case, Shape
from bench.machine import ROOT, Machine, describe

WHO = {
    "train_step": (cases.OURS, cases.DENSE, cases.PEFT),
    "mora_linear_step": (cases.OURS, cases.EAGER, cases.BNB_EAGER, cases.LORA),
}


def saved_bytes(forward: Any, known: list[Tensor]) -> tuple[Tensor, dict[int, int]]:
    """The result, and the bytes of the storages that backward keeps, by address, but for those in `known`."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    return y, kept


def _status(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _return_free_pages() -> None:
    """Pages that malloc holds though nobody uses them would hide as many of what is allocated next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        raise RuntimeError("malloc_trim: expected glibc, whose allocator gives free pages back")
    trim(0)


def _parameters(who: str, case: Case, machine: Machine) -> tuple[Any, list[Tensor]]:
    """forward(x) and the tensors that exist anyway: weights and adapters."""
    import torch.nn.functional as F

    import peftkern
    from bench.peers import SCALING, Inputs, Weights, bnb_matmul, eager_mora, peft_layer

    weights = Weights(case.shape, case.dtype, case.quant_type, case.blocksize, False, machine)
    if case.mora_type and who == cases.LORA:
        case = replace(case, op="train_step", rank=case.lora_rank, mora_type=0)
    inputs = Inputs(case, weights)
    W = weights.quantized[0]
    if case.mora_type:
        matrix = inputs.matrix.requires_grad_()
        if who == cases.OURS:
            return lambda x: peftkern.mora_linear(x, W, matrix, case.mora_type), [W.packed, W.absmax, matrix]
        matrix = matrix.detach().to(weights.dtype).requires_grad_()
        adapter = eager_mora(case)
        if who == cases.EAGER:
            D = weights.dense[0]
            return lambda x: F.linear(x, D) + adapter(x, matrix), [D, matrix, *adapter.tables]
        packed, state = weights.bnb[0]
        base = bnb_matmul(weights)
        return lambda x: base(x, 0) + adapter(x, matrix), [packed, state.absmax, matrix, *adapter.tables]
    A, B = inputs.A.requires_grad_(), inputs.B.requires_grad_()
    if who in (cases.OURS, cases.LORA):
        return lambda x: peftkern.lora_linear(x, W, A, B, SCALING), [W.packed, W.absmax, A, B]
    if who == cases.DENSE:
        D = weights.dense[0]
        A16, B16 = A.detach().to(D.dtype).requires_grad_(), B.detach().to(D.dtype).requires_grad_()
        forward = lambda x: F.linear(x, D) + SCALING * F.linear(F.linear(x, A16), B16)  # noqa: E731
        return forward, [D, A16, B16]
    packed, state = weights.bnb[0]
    layer = peft_layer(packed, state, inputs.x.dtype, A, B).train()
    return layer, [packed, state.absmax, *layer.parameters()]


def child(who: str, case: Case) -> dict[str, int]:
    """Runs in its own process: one training step, after a tiny one that loads every library."""
    machine = describe()
    for small in (True, False):
        shape = Shape(64, 64, "") if small else case.shape
        now = replace(case, shape=shape, M=4 if small else case.M)
        forward, known = _parameters(who, now, machine)
        x = torch.randn(now.M, shape.K).bfloat16().requires_grad_()
        dy = torch.randn(now.M, shape.N).bfloat16()
        _return_free_pages()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
        before = _status("VmRSS")
        y, kept = saved_bytes(lambda f=forward, x=x: f(x), known)
        y.backward(dy)  # type: ignore[no-untyped-call]
        peak = _status("VmHWM") - before
    held = kept.get(x.untyped_storage().data_ptr(), 0)
    return {"kept_bytes": sum(kept.values()), "input_bytes": held, "peak_bytes": peak}


def measure(case: Case, threads: int) -> dict[str, dict[str, int] | str]:
    """For each implementation: bytes kept for backward, x's bytes if it is among them, peak beyond before."""
    found: dict[str, dict[str, int] | str] = {}
    for who in WHO[case.op]:
        words = [who, case.op, case.shape.name, str(case.M), str(case.rank), case.dtype, str(case.mora_type)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, "-m", "bench.memory", *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode == 0 and lines:
            found[who] = json.loads(lines[-1])
        else:
            found[who] = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return found


if __name__ == "__main__":
    who, op, shape, M, rank, dtype, mora_type = sys.argv[1:]
    N, K = (int(side) for side in shape.split("x"))
    case = Case(op, Shape(N, K, ""), int(M), False, dtype, int(rank), mora_type=int(mora_type))
    print(json.dumps(child(who, case)))
