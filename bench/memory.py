"""What a training step keeps for backward, and its peak: each implementation in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import cases
from bench.cases import Case, Shape
from bench.machine import ROOT, Machine, describe

WHO = (cases.OURS, cases.DENSE, cases.PEFT)


def saved_bytes(forward: Any, known: list[Tensor]) -> tuple[Tensor, int]:
    """The result, and the bytes of the storages that backward keeps and that are not in `known`."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    return y, sum(kept.values())


def _status(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _parameters(who: str, case: Case, machine: Machine) -> tuple[Any, list[Tensor]]:
    """forward(x) and the tensors that exist anyway: weights and adapters."""
    import torch.nn.functional as F

    import peftkern
    from bench.peers import SCALING, Inputs, Weights, peft_layer

    weights = Weights(case.shape, case.dtype, case.quant_type, case.blocksize, False, machine)
    inputs = Inputs(case, weights)
    A, B = inputs.A.requires_grad_(), inputs.B.requires_grad_()
    if who == cases.OURS:
        W = weights.quantized[0]
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
        now = Case("train_step", shape, 4 if small else case.M, False, case.dtype, case.rank)
        forward, known = _parameters(who, now, machine)
        x = torch.randn(now.M, shape.K).bfloat16().requires_grad_()
        dy = torch.randn(now.M, shape.N).bfloat16()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
        before = _status("VmRSS")
        y, kept = saved_bytes(lambda f=forward, x=x: f(x), known)
        y.backward(dy)  # type: ignore[no-untyped-call]
        peak = _status("VmHWM") - before
    return {"kept_bytes": kept, "input_bytes": x.nbytes, "peak_bytes": peak}


def measure(case: Case, threads: int) -> dict[str, dict[str, int] | str]:
    """For each implementation: bytes kept for backward, bytes of x among them, peak beyond before."""
    found: dict[str, dict[str, int] | str] = {}
    for who in WHO:
        words = [who, case.shape.name, str(case.M), str(case.rank), case.dtype]
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
    who, shape, M, rank, dtype = sys.argv[1:]
    N, K = (int(side) for side in shape.split("x"))
    print(json.dumps(child(who, Case("train_step", Shape(N, K, ""), int(M), False, dtype, int(rank)))))
