"""python -m bench.gpu: the triton backend on an NVIDIA GPU, beside its peers. Written without a GPU at hand.

    gate       our products against fp64, each element within its bound; a candidate's results against ours:
               a wrong one gets no number
    ceilings   a copy of 4 GiB, and a bf16 product of 8192³
    eager      CUDA events around a run of calls on rotating copies of the weight, together past the L2 cache
    graph      the same calls captured once and replayed: what the device alone takes
    memory     the peak of a training step over what it was given

Candidates take turns within a round, so that a clock that drifts drifts for all; a time is the median of
the rounds, a ratio the median over rounds of peer / ours. Each line is printed and written to the CSV
when it is measured; the goals (bench.goals) and the plot's command come last.
"""

from __future__ import annotations

import csv
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import peftkern
from bench import goals, store
from bench.cases import LLAMA, Shape
from bench.eager_mora import EagerMora
from bench.machine import ROOT, commit
from peftkern import QuantizedWeight

LLAMA_70B = (
    Shape(8192, 8192, "Llama-3-70B q, o"),
    Shape(28672, 8192, "Llama-3-70B gate, up"),
    Shape(8192, 28672, "Llama-3-70B down"),
    Shape(1024, 8192, "Llama-3-70B k, v"),
)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 8192)
TRAINED = goals.TRAINED
OPS = ("dequantize", "linear", "dx", "lora", "lora_step", "mora", "mora_step")
ROWS = {"dequantize": (0,), "linear": TOKENS, "dx": TOKENS}  # of the others TRAINED
RANK, SCALING, MORA_RANK = 16, 2.0, 8
ROTATED = 240 << 20  # bytes of copies: four L2 caches of an H200
MOST_COPIES = 128
ROUNDS, ROUND_MS = 5, 4.0
COLUMNS = (
    "op", "shape", "label", "M", "candidate", "status", "eager_us", "graph_us", "ratio_eager", "ratio_graph",
    "gb_s", "tflop_s", "peak_bytes", "copy_gb_s", "matmul_tflop_s", "device", "versions", "commit", "when",
)  # fmt: skip

Call = Callable[[int], Any]


@dataclass
class Candidate:
    name: str
    make: Callable[[], Call]  # raises what keeps it from running here


class Weights:
    """Copies of one 4-bit weight, so many that a round reads none twice from the L2 cache."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape = shape
        source = torch.randn(shape.N, shape.K, device=device, dtype=torch.bfloat16) * 0.02
        first = peftkern.quantize_4bit(source, "nf4", 64, True)
        self.count = min(MOST_COPIES, math.ceil(ROTATED / first.nbytes))
        self.quantized = [_copied(first) for _ in range(self.count)]
        self.dense = peftkern.dequantize_4bit(first, torch.bfloat16)
        self.dense_count = min(MOST_COPIES, math.ceil(ROTATED / self.dense.nbytes))
        self.denses = [self.dense.clone() for _ in range(self.dense_count)]
        # bitsandbytes reads the very same bytes
        self.theirs: list[Any] = []

    def bnb(self) -> list[Any]:
        if not self.theirs:
            self.theirs = [weight.to_bitsandbytes() for weight in self.quantized]
        return self.theirs


def _copied(weight: QuantizedWeight) -> QuantizedWeight:
    leaves, spec = torch.utils._pytree.tree_flatten(weight)
    return torch.utils._pytree.tree_unflatten([leaf.clone() for leaf in leaves], spec)  # type: ignore[no-any-return]


def _step(y: Tensor, leaves: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    return y, *torch.autograd.grad(y, leaves, dy)


def candidates(op: str, weights: Weights, M: int, device: torch.device) -> list[Candidate]:
    """Ours first. Each returns the op's results, in one order."""
    N, K = weights.shape.N, weights.shape.K
    bf16 = torch.bfloat16
    x = torch.randn(max(M, 1), K, device=device, dtype=bf16)
    dy = torch.randn(max(M, 1), N, device=device, dtype=bf16)
    leaf = x.clone().requires_grad_()
    A = torch.randn(RANK, K, device=device) / math.sqrt(K)
    B = torch.randn(N, RANK, device=device) * 0.02
    quantized, denses = weights.quantized, weights.denses
    n, dense_n = weights.count, weights.dense_count

    def dequantized(i: int) -> Tensor:
        return peftkern.dequantize_4bit(quantized[i % n], bf16)

    def theirs_dense(i: int) -> Tensor:
        import bitsandbytes.functional as F

        packed, state = weights.bnb()[i % n]
        return F.dequantize_4bit(packed, state)  # type: ignore[no-any-return]

    if op == "dequantize":
        return [Candidate(goals.OURS, lambda: dequantized), Candidate(goals.BNB, lambda: theirs_dense)]

    if op == "linear":

        def bnb_forward() -> Call:
            import bitsandbytes as bnb

            copies = weights.bnb()
            return lambda i: bnb.matmul_4bit(x, copies[i % n][0].t(), quant_state=copies[i % n][1])

        return [
            Candidate(goals.OURS, lambda: lambda i: peftkern.linear_4bit(x, quantized[i % n])),
            Candidate(goals.BNB, bnb_forward),
            Candidate("dequantize + cuBLAS", lambda: lambda i: x @ dequantized(i).t()),
            Candidate("dense bf16", lambda: lambda i: x @ denses[i % dense_n].t()),
        ]

    if op == "dx":

        def product(i: int) -> Tensor:
            out = dy.new_empty(M, K)
            row, nothing = peftkern.dispatch.find("linear_grad", device, bf16), (None, None, None)
            row(out, *nothing, dy, None, quantized[i % n].kernel_args, *nothing, 1.0, None)
            return out

        # the primitive that backward runs: through autograd the forward product would be timed too
        return [
            Candidate(goals.OURS, lambda: product),
            Candidate(goals.BNB, lambda: lambda i: dy @ theirs_dense(i)),
            Candidate("dequantize + cuBLAS", lambda: lambda i: dy @ dequantized(i)),
            Candidate("dense bf16", lambda: lambda i: dy @ denses[i % dense_n]),
        ]

    # forward alone, as in inference, or a step: forward and every gradient
    trains = op.endswith("step")
    source = leaf if trains else x

    def bare(i: int) -> Any:
        y = peftkern.linear_4bit(source, quantized[i % n])
        return _step(y, (source,), dy) if trains else y

    if op in ("lora", "lora_step"):
        A.requires_grad_(trains)
        B.requires_grad_(trains)

        def ours_lora(i: int) -> Any:
            y = peftkern.lora_linear(source, quantized[i % n], A, B, SCALING)
            return _step(y, (source, A, B), dy) if trains else y

        def peft_lora() -> Call:
            layers = [_peft_layer(weights, i, A, B) for i in range(n)]

            def call(i: int) -> Any:
                layer, its_A, its_B = layers[i % n]
                with torch.set_grad_enabled(trains):
                    y = layer(source)
                return _step(y, (source, its_A, its_B), dy) if trains else y

            return call

        def by_hand(i: int) -> Any:
            """What hand-written QLoRA does: dequantize, cuBLAS, and the adapter added in place."""
            with torch.no_grad():
                W, a, b = dequantized(i), A.to(bf16), B.to(bf16)
                t = x @ a.t()
                y = x @ W.t()
                y.addmm_(t, b.t(), alpha=SCALING)
                if not trains:
                    return y
                W = dequantized(i)
                g = dy @ b
                dx = dy @ W
                dx.addmm_(g, a, alpha=SCALING)
                return y, dx, (g.t() @ x * SCALING).float(), (dy.t() @ t * SCALING).float()

        return [
            Candidate(goals.OURS, lambda: ours_lora),
            Candidate(goals.PEFT, peft_lora),
            Candidate(goals.BY_HAND, lambda: by_hand),
            Candidate(goals.BARE, lambda: bare),
        ]

    assert op in ("mora", "mora_step")
    found = []
    for kind in (1, 2, 3, 4, 6):
        side = peftkern.mora_rank(K, N, MORA_RANK, kind)
        matrix = (torch.randn(side, side, device=device) / side).requires_grad_(trains)
        eager = EagerMora(kind, K, N, side, bf16).to(device)
        eager.tables = tuple(table.to(device) for table in eager.tables)

        def ours_mora(i: int, kind: int = kind, matrix: Tensor = matrix) -> Any:
            y = peftkern.mora_linear(source, quantized[i % n], matrix, kind)
            return _step(y, (source, matrix), dy) if trains else y

        def eager_mora(i: int, eager: EagerMora = eager, matrix: Tensor = matrix) -> Any:
            y = source @ dequantized(i).t() + eager(source, matrix.to(bf16))
            return _step(y, (source, matrix), dy) if trains else y

        found.append(Candidate(f"peftkern type {kind}", lambda f=ours_mora: f))  # type: ignore[misc]
        found.append(Candidate(f"eager type {kind}", lambda f=eager_mora: f))  # type: ignore[misc]
    return [*found, Candidate(goals.BARE, lambda: bare)]


def _peft_layer(weights: Weights, i: int, A: Tensor, B: Tensor) -> tuple[Any, Tensor, Tensor]:
    """peft's LoRA on bitsandbytes' Linear4bit, on copy i of the bytes."""
    import bitsandbytes as bnb
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    packed, state = weights.bnb()[i]
    N, K = weights.shape.N, weights.shape.K
    base = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    base.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=base
    )
    base.quant_state = state
    settings = LoraConfig(r=RANK, lora_alpha=RANK * SCALING, lora_dropout=0.0)
    layer = Linear4bit(base, "default", config=settings, r=RANK, lora_alpha=RANK * SCALING)
    its_A, its_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        its_A.data, its_B.data = A.detach().clone(), B.detach().clone()
    return layer, its_A, its_B


def finite(results: tuple[Tensor, ...]) -> bool:
    return all(bool(result.isfinite().all()) for result in results)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def agree(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> str | None:
    """Both are the same sums rounded to bf16 a few times: root mean square within 4 roundings of 2^-8."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        scale = b.detach().double().square().mean().sqrt()
        error = float((a.detach().double() - b.detach().double()).square().mean().sqrt() / scale)
        if not error <= 4 * 2.0**-8:
            return f"result {i}: relative error {error:.2e} beside ours, allowed {4 * 2.0**-8:.2e}"
    return None


def exact_gate(device: torch.device) -> Iterator[str]:
    """Our forward and dX at every tile against fp64 on the device, element by element."""
    for N, K in ((4096, 4096), (1024, 4096), (200, 136), (33, 75)):
        weight = peftkern.quantize_4bit(torch.randn(N, K, device=device) * 0.02, "nf4", 64, True)
        dense = peftkern.dequantize_4bit(weight, torch.float32).double()
        for dtype, unit in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 2.0**-24)):
            for M in (1, 16, 33, 64, 512, 2048):
                x = torch.randn(M, K, device=device).to(dtype).requires_grad_()
                dy = torch.randn(M, N, device=device).to(dtype)
                y = peftkern.linear_4bit(x, weight)
                (dx,) = torch.autograd.grad(y, x, dy)
                for name, got, left, right in (
                    ("y", y, x.detach().double(), dense.t()),
                    ("dx", dx, dy.double(), dense),
                ):
                    want, size = left @ right, left.abs() @ right.abs()
                    # W and the result rounded once each, the sum in fp32
                    bound = (unit + 2 * left.shape[1] * 2.0**-24) * size + unit * want.abs() + 2.0**-24
                    if not bool(((got.detach().double() - want).abs() <= bound).all()):
                        yield f"{name} {N}x{K} M={M} {dtype} is beyond its bound"


def _elapsed(run: Callable[[], object]) -> float:
    """Milliseconds on the device."""
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _calls(call: Call, copies: int) -> int:
    """How many calls fill a turn; every copy once where that is not too long."""
    for i in range(3):
        call(i)
    once = _elapsed(lambda: call(3)) + 1e-3
    return max(2, min(copies, math.ceil(ROUND_MS / once)))


def _graph(call: Call, calls: int) -> Callable[[], None]:
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(2):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(calls)]
    del kept
    return graph.replay


def ceilings(device: torch.device) -> tuple[float, float]:
    """GB/s of a copy, read and write counted; TFLOP/s of a bf16 product of random numbers."""
    source = torch.randn(1 << 30, device=device)
    target = torch.empty_like(source)
    copy = min(_elapsed(lambda: target.copy_(source)) for _ in range(8))
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = min(_elapsed(lambda: torch.mm(a, b, out=out)) for _ in range(12))
    return 2 * source.nbytes / copy / 1e6, 2 * 8192**3 / product / 1e9


def _work(op: str, shape: Shape, M: int) -> tuple[float, float]:
    """Bytes that must move (bf16 x, W at 4.127 bits) and floating-point operations of the base product."""
    packed = shape.N * shape.K * 4.127 / 8
    if op == "dequantize":
        return packed + 2 * shape.N * shape.K, 0.0
    passes = 2 if op.endswith("step") else 1
    moved = packed + 2 * M * (shape.N + shape.K)
    return passes * moved, passes * 2.0 * M * shape.N * shape.K


def measure(op: str, weights: Weights, M: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each candidate, ours first."""
    ready: list[tuple[str, Call, int, Callable[[], None] | None]] = []
    first: tuple[Tensor, ...] | None = None
    for candidate in candidates(op, weights, M, device):
        row = {"candidate": candidate.name}
        try:
            call = candidate.make()
            result = call(0)
            results = result if isinstance(result, tuple) else (result,)
            problem = None if finite(results) else "not finite"
            ours = candidate.name.startswith("peftkern")
            if problem is None and ours and "without" not in candidate.name:
                first = results
            elif problem is None and not ours and first is not None:
                problem = agree(first, results)
            if problem is not None:
                yield {**row, "status": problem}
                continue
            calls = _calls(call, weights.count)
            try:
                graph: Callable[[], None] | None = _graph(call, calls)
            except RuntimeError as error:
                print(f"  {candidate.name}: no graph ({first_line(error)})")
                torch.cuda.synchronize()
                graph = None
            ready.append((candidate.name, call, calls, graph))
        except Exception as error:
            yield {**row, "status": f"unavailable: {first_line(error)}"}
    eager: dict[str, list[float]] = {name: [] for name, *_ in ready}
    replayed: dict[str, list[float]] = {name: [] for name, *_ in ready}
    for _ in range(ROUNDS):
        for name, call, calls, graph in ready:

            def run(call: Call = call, calls: int = calls) -> None:
                for i in range(calls):
                    call(i)

            eager[name].append(_elapsed(run) / calls)
            if graph is not None:
                replayed[name].append(_elapsed(graph) / calls)
    moved, work = _work(op, weights.shape, M)
    for name, call, _, _ in ready:
        own = name.replace("eager", "peftkern") if "type" in name else "peftkern"
        peak = _peak(call) if op.endswith("step") else ""
        device_us = statistics.median(replayed[name] or eager[name]) * 1e3
        yield {
            "candidate": name,
            "status": "ok",
            "eager_us": f"{statistics.median(eager[name]) * 1e3:.2f}",
            "graph_us": f"{statistics.median(replayed[name]) * 1e3:.2f}" if replayed[name] else "",
            "ratio_eager": _ratio(eager[name], eager.get(own, [])),
            "ratio_graph": _ratio(replayed[name], replayed.get(own, [])),
            "gb_s": f"{moved / device_us / 1e3:.0f}",
            "tflop_s": f"{work / device_us / 1e6:.1f}",
            "peak_bytes": peak,
        }


def _ratio(theirs: list[float], ours: list[float]) -> str:
    if not theirs or not ours:
        return ""
    return f"{statistics.median(a / b for a, b in zip(theirs, ours, strict=True)):.3f}"


def _peak(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _versions() -> str:
    import triton

    found = [
        f"torch {torch.__version__}",
        f"triton {triton.__version__}",
        f"python {platform.python_version()}",
    ]
    for name in ("bitsandbytes", "peft"):
        try:
            found.append(f"{name} {__import__(name).__version__}")
        except Exception as error:  # not only ImportError: whatever keeps it from loading here
            found.append(f"no {name} ({first_line(error)})")
    return ", ".join(found)


def _clocks() -> str:
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True)
    except OSError as error:
        return f"unknown ({error})"
    return answer.stdout.strip() or answer.stderr.strip()


def measure_all(
    cases: Sequence[tuple[Shape, str, int]],
    device: torch.device,
    target: Path,
    common: dict[str, str],
    deadline: float,
) -> None:
    """Every case (shape, op, M) that begins before the deadline; then the goals and the plot's command."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, restval="")
        writer.writeheader()
        weights: Weights | None = None
        for i, (shape, op, M) in enumerate(cases):
            if time.monotonic() > deadline:
                print(f"the time is over: {len(cases) - i} of {len(cases)} cases are not measured")
                break
            if weights is None or weights.shape != shape:
                weights = None  # before the next ones are made
                torch.cuda.empty_cache()
                weights = Weights(shape, device)
            for row in measure(op, weights, M, device):
                at = {"op": op, "shape": shape.name, "label": shape.label, "M": M}
                writer.writerow({**at, **row, **common})
                out.flush()
                print(
                    f"{op:10} {shape.name:12} M={M:<5} {row['candidate']:30} {row['status']:8.60} "
                    f"eager {row.get('eager_us', ''):>9} µs ({row.get('ratio_eager', '')})  "
                    f"graph {row.get('graph_us', ''):>9} µs ({row.get('ratio_graph', '')})",
                    flush=True,
                )
    print("\n".join(goals.report(store.read(target))))
    print(f"python -m bench.plot {os.path.relpath(target)}")


def main(
    ops: Annotated[str, typer.Option(help="some of " + ", ".join(OPS))] = ",".join(OPS),
    models: Annotated[str, typer.Option(help="8b, 70b or both")] = "8b,70b",
    m: Annotated[str, typer.Option(help="numbers of rows; empty: those of each operation")] = "",
    minutes: Annotated[float, typer.Option(help="stop before a new case after this time")] = 9.0,
    file: Annotated[
        Path | None, typer.Option("--csv", help="default: bench/results/<device>/gpu.csv")
    ] = None,
) -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device: nothing is measured")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name(device)
    target = file or ROOT / "bench" / "results" / name.split()[-1].lower() / "gpu.csv"
    print(f"{name}: {_versions()}; clocks and power now: {_clocks()}")
    started = time.monotonic()
    wrong = list(exact_gate(device))
    print("\n".join(wrong) or f"gate: every element within its bound ({time.monotonic() - started:.0f} s)")
    if wrong:
        raise typer.Exit(1)
    copy, product = ceilings(device)
    print(f"ceilings: copy {copy:.0f} GB/s, bf16 product {product:.0f} TFLOP/s")
    common = {
        "copy_gb_s": f"{copy:.0f}",
        "matmul_tflop_s": f"{product:.0f}",
        "device": name,
        "versions": _versions(),
        "commit": commit(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }
    shapes = (LLAMA if "8b" in models else ()) + (LLAMA_70B if "70b" in models else ())
    tokens = tuple(int(one) for one in m.split(",")) if m else ()
    cases = [
        (shape, op, M)
        for shape in shapes
        for op in ops.split(",")
        for M in (ROWS.get(op, TRAINED) if op == "dequantize" or not tokens else tokens)
    ]
    measure_all(cases, device, target, common, started + minutes * 60)


if __name__ == "__main__":
    typer.run(main)
