"""`python -m peftkern [--json]`: what is installed, what would run, and a self-test.

Exit code 0; 1 when the self-test fails. Runs with the package's own dependencies alone.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern import dispatch
from peftkern.backends import Call, cpu, reference, unavailable
from peftkern.formats import QuantizedWeight

KERNELS = ("matmul", "compress", "mora", "mora_grad", "dropout", "dequantize", "quantize")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PACKAGES = ("numpy", "bitsandbytes", "peft", "transformers", "triton")
VARIABLES = re.compile(r"(PEFTKERN|OMP|KMP|GOMP|MKL|DNNL|ONEDNN)_\w+|ATEN_CPU_CAPABILITY|LD_PRELOAD")
OPENMP = re.compile(r"lib(gomp|omp|iomp5)\b[^/]*\.(so|dylib)[^/]*$")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "peftkern": peftkern.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def extension() -> dict[str, Any]:
    """The compiled module: where it was loaded from and how it was built, or why there is none."""
    folder = Path(peftkern.__file__).parent
    missing = cpu.missing()
    if missing is None:
        from peftkern import _cpu

        return {"loaded": True, "path": _cpu.__file__, "reason": None, "build": dict(_cpu.build_info())}
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    others = sorted(path.name for path in folder.glob("_cpu.*"))
    if not others:
        missing += f"; {folder} has no _cpu{suffixes[0]}: it was not built"
    elif not any((folder / f"_cpu{suffix}").exists() for suffix in suffixes):
        missing += f"; {folder} has {', '.join(others)}, this Python loads _cpu{suffixes[0]}"
    return {"loaded": False, "path": None, "reason": missing, "build": None}


def isa() -> dict[str, Any] | None:
    """Instruction set levels: built into the module, offered by this machine, in use; each kernel's row."""
    if cpu.missing() is not None:
        return None
    from peftkern import _cpu

    kernels = {p: {name_of(dtype): _cpu.kernel(p, dtype) for dtype in DTYPES} for p in KERNELS}
    built, available = list(_cpu.build_info()["levels"]), list(_cpu.isa_levels())
    return {"built": built, "available": available, "active": _cpu.isa(), "kernels": kernels}


def threads() -> dict[str, int | None]:
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "torch": torch.get_num_threads(),
        "cpus_of_this_process": len(affinity(0)) if affinity is not None else None,
        "cpus": os.cpu_count(),
    }


def openmp_runtimes() -> list[str] | None:
    """The OpenMP libraries mapped into this process; None without a /proc/self/maps to tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if OPENMP.search(path))


def backends() -> dict[str, dict[str, str | None]]:
    """For each backend and primitive: None if it can run it on bf16 CPU tensors, else why not."""
    return {
        backend.name: {
            p: unavailable(backend, Call(p, torch.device("cpu"), torch.bfloat16))
            for p in reference.BACKEND.rows
        }
        for backend in dispatch.BACKENDS
    }


def chosen() -> dict[str, str | None]:
    """Who runs linear_4bit on CPU tensors of each dtype, by `explain`."""
    weight = sample(torch.float32)["nf4"]
    inputs = {name_of(dtype): torch.zeros(1, weight.in_features, dtype=dtype) for dtype in DTYPES}
    return {name: peftkern.explain("linear_4bit", x, weight).backend for name, x in inputs.items()}


def environment() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)}


# N·K is odd and K no multiple of the blocksize: packed ends in a padding nibble, and blocks straddle rows.
M, N, K, R = 5, 33, 71, 3
# MoRA's r̂: even, so that rows keep the sign of their output feature; Y ends inside the second of four blocks.
SIZE = 22


def sample(dtype: torch.dtype) -> dict[str, Any]:
    """Random magnitudes; the sign is the output feature's, so nothing cancels in any sum, either way."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).abs()

    sign = 1.0 - 2.0 * (torch.arange(N) % 2)
    w = random(N, K) * sign[:, None]
    x, matrix = random(M, K), random(SIZE, SIZE) * sign[:SIZE, None]
    # Turned by 0 … 1 rad, a pair (a, 0) stays positive, and so does (0, b) turned back.
    second = torch.arange(K) % SIZE >= SIZE // 2
    return {
        "nf4": peftkern.reference.quantize_4bit(w, "nf4", 64, double_quant=True),
        "fp4": peftkern.reference.quantize_4bit(w, "fp4", 32),
        "dense": w.to(dtype),
        "x": x.to(dtype),
        "lora_A": random(R, K),
        "lora_B": random(N, R) * sign[:, None],
        "matrix": matrix,
        "x of type 6": x.masked_fill(second, 0.0).to(dtype),
        "matrix of type 6": matrix.masked_fill(~second[:SIZE], 0.0),
        "bias": random(N) * sign,
        "grad": (random(M, N) * sign).to(dtype),
    }


Values = dict[str, Tensor]


@contextmanager
def one_thread() -> Iterator[None]:
    """For products this small a second thread only waits, and for long where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """One call, its results, and how far off, relatively, they may be (None: the same bits)."""

    what: str
    run: Callable[[], Values]
    expected: Values
    bound: float | None


def gradients(op: Callable[..., Tensor], inputs: Values, grad: Tensor, **fixed: Any) -> Values:
    """The output of op, under "", and the gradient of each input under its name."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    out = op(**leaves, **fixed)
    # the product's gradient is grad itself; passed as grad_outputs it would import sympy first, 0.3 s
    found = torch.autograd.grad((out * grad).sum(), list(leaves.values()))
    return {"": out.detach(), **dict(zip(leaves, found, strict=True))}


def value(op: Callable[..., Tensor], *args: Any) -> Values:
    return {"": op(*args)}


def fields(op: Callable[..., QuantizedWeight], *args: Any) -> Values:
    weight = op(*args)
    return {"packed": weight.packed, "absmax": weight.absmax}


def exact_cases(s: dict[str, Any], dtype: torch.dtype) -> Iterator[Case]:
    for quant_type, blocksize in (("nf4", 64), ("fp4", 32)):
        settings = s["dense"], quant_type, blocksize
        bytes_of = partial(fields, peftkern.quantize_4bit, *settings)
        expected = fields(peftkern.reference.quantize_4bit, *settings)
        yield Case(f"quantize_4bit {quant_type}", bytes_of, expected, None)
    for weight in (s["nf4"], s["fp4"]):
        values_of = partial(value, peftkern.dequantize_4bit, weight, dtype)
        expected = value(peftkern.reference.dequantize_4bit, weight, dtype)
        yield Case(f"dequantize_4bit {weight.quant_type}", values_of, expected, None)


def bounded_cases(s: dict[str, Any], dtype: torch.dtype) -> Iterator[Case]:
    """Against the reference in fp64, forward and backward. Nothing cancels: every bound is a relative one.

    With u the unit roundoff of dtype: the roundings on the longest way (A, B, T or G, the result; one more
    for second order) give 5 u, and fp32 sums of n terms n 2⁻²⁴. MoRA has as many: M, z or g, the addend of a
    dense W, the result.
    """
    bound = 5 * torch.finfo(dtype).eps / 2 + (max(M, N, K) + max(R, SIZE) + 8) * 2.0**-24
    lora, mora = ("x", "lora_A", "lora_B", "bias"), ("x", "matrix", "bias")
    settings: tuple[tuple[str, str, tuple[str, ...], dict[str, Any]], ...] = (
        ("linear_4bit", "fp4", ("x", "bias"), {}),
        ("lora_linear", "nf4", lora, {"scaling": 0.5}),
        ("lora_linear", "dense", lora, {"scaling": 0.5}),
        ("mora_linear", "nf4", mora, {"mora_type": 1}),
        ("mora_linear", "dense", mora, {"mora_type": 3}),
        ("mora_linear", "fp4", mora, {"mora_type": 6}),
    )
    for op, kind, names, fixed in settings:
        fixed = {"weight": s[kind], **fixed}
        turned = " of type 6" if fixed.get("mora_type") == 6 else ""
        inputs, grad = {name: s.get(name + turned, s[name]) for name in names}, s["grad"]
        exact = {name: tensor.double() for name, tensor in inputs.items()}
        expected = gradients(getattr(peftkern.reference, op), exact, grad.double(), **fixed)
        run = partial(gradients, getattr(peftkern, op), inputs, grad, **fixed)
        what = f"{op} {kind}" + (f" type {fixed['mora_type']}" if "mora_type" in fixed else "")
        yield Case(what, run, expected, bound)


def finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def compare(got: Tensor, expected: Tensor, bound: float | None) -> dict[str, Any]:
    """The worst relative error beside its bound; without a bound the bits must be the same."""
    got64, expected64 = got.double(), expected.double()
    error = float(((got64 - expected64).abs() / expected64.abs().clamp(min=2.0**-126)).max())
    same = got.dtype == expected.dtype and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    passed = same if bound is None else error <= bound  # a NaN is not
    return {"passed": passed, "error": finite(error), "bound": bound or 0.0}


def check(case: Case) -> Iterator[dict[str, Any]]:
    try:
        got = case.run()
    except Exception as error:
        what = f"{case.what}: {type(error).__name__}: {error}"
        yield {"check": what, "passed": False, "error": None, "bound": case.bound or 0.0}
        return
    for name, expected in case.expected.items():
        what = f"{case.what} {name}" if case.bound is None else f"{case.what} gradient of {name}"
        yield {"check": what if name else case.what, **compare(got[name], expected, case.bound)}


def self_test() -> dict[str, Any]:
    start = time.perf_counter()
    places: list[tuple[str, str, str | None]] = [("reference", "reference", None)]
    if cpu.missing() is None:
        from peftkern import _cpu

        places += [(level, "cpu", level) for level in _cpu.isa_levels()]
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        inputs = sample(dtype)
        with one_thread():
            cases = [*exact_cases(inputs, dtype), *bounded_cases(inputs, dtype)]
        for place, backend, level in places:
            with ExitStack() as stack:
                stack.enter_context(dispatch.use_backend(backend))
                stack.enter_context(one_thread() if level is None else cpu.use_isa(level))
                where = {"at": place, "dtype": name_of(dtype)}
                rows += [where | row for case in cases for row in check(case)]
    passed = all(row["passed"] for row in rows)
    return {
        "passed": passed,
        "seconds": time.perf_counter() - start,
        "shape": [M, N, K, R, SIZE],
        "checks": rows,
    }


def warnings_of(report: dict[str, Any]) -> Iterator[str]:
    if not report["extension"]["loaded"]:
        yield f"CPU kernels: {report['extension']['reason']}; every op runs on the slow reference backend"
    runtimes = report["openmp_runtimes"] or []
    if len(runtimes) > 1:
        yield f"{len(runtimes)} OpenMP runtimes in this process: their threads compete, and a fork may hang"
    levels = report["isa"]
    if levels is not None and levels["active"] != levels["available"][-1]:
        yield f"instruction set {levels['active']} is in use, this machine offers {levels['available'][-1]}"
    cpus = report["threads"]["cpus_of_this_process"]
    if cpus is not None and report["threads"]["torch"] > cpus:
        yield f"torch uses {report['threads']['torch']} threads, this process may run on {cpus} CPUs"
    if not report["self_test"]["passed"]:
        yield "the self-test failed"


def collect() -> dict[str, Any]:
    report: dict[str, Any] = {
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}",
        "extension": extension(),
        "isa": isa(),
        "threads": threads(),
        "backends": backends(),
        "forced_backend": dispatch.forced_backend(),
        "chosen": chosen(),
        "environment": environment(),
        "self_test": self_test(),
        "openmp_runtimes": openmp_runtimes(),
    }
    return report | {"warnings": list(warnings_of(report))}


def table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def grid_of(test: dict[str, Any], dtypes: list[str]) -> list[list[str]]:
    """For each place and dtype the worst relative error beside its bound."""
    grid = [["", *dtypes]]
    for place in dict.fromkeys(row["at"] for row in test["checks"]):
        cells = []
        for dtype in dtypes:
            rows = [row for row in test["checks"] if (row["at"], row["dtype"]) == (place, dtype)]
            passed = all(row["passed"] for row in rows)
            error, bound = (max(row[key] or 0.0 for row in rows) for key in ("error", "bound"))
            cells.append(f"{error:.1e} / {bound:.1e}" if passed else "FAILED")
        grid.append([place, *cells])
    return grid


def failures(test: dict[str, Any]) -> Iterator[str]:
    for row in test["checks"]:
        if not row["passed"]:
            error = "not finite" if row["error"] is None else f"{row['error']:.3e}"
            where = f"{row['at']}, {row['dtype']}"
            yield f"FAILED at {where}: {row['check']} (error {error}, bound {row['bound']:.3e})"


def sections(report: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    dtypes = [name_of(dtype) for dtype in DTYPES]
    yield "versions", table([[name, found or "not installed"] for name, found in report["versions"].items()])

    module, levels = report["extension"], report["isa"]
    if levels is None:
        yield "compiled CPU kernels", [f"none: {module['reason']}"]
    else:
        facts = [["loaded from", module["path"]]]
        facts += [
            [name.replace("_", " "), str(fact)] for name, fact in module["build"].items() if name != "levels"
        ]
        facts += [
            [f"levels {name}", ", ".join(levels[key])]
            for name, key in (("built", "built"), ("here", "available"))
        ]
        yield "compiled CPU kernels", table([*facts, ["level in use", levels["active"]]])
        rows = [
            [primitive, *(row[dtype] for dtype in dtypes)] for primitive, row in levels["kernels"].items()
        ]
        yield "kernel that runs", table([["", *dtypes], *rows])

    yield (
        "threads",
        table([[name.replace("_", " "), str(count)] for name, count in report["threads"].items()]),
    )
    runtimes = report["openmp_runtimes"]
    unknown = ["unknown: this system has no /proc/self/maps"]
    yield "OpenMP runtimes in this process", unknown if runtimes is None else runtimes or ["none"]

    lines = []
    for name, primitives in report["backends"].items():
        reasons = sorted({reason for reason in primitives.values() if reason is not None})
        lines.append(f"{name}: {'; '.join(reasons) or 'can run every primitive'}")
    lines.append(
        "would run: " + ", ".join(f"{dtype} {name or 'nobody'}" for dtype, name in report["chosen"].items())
    )
    forced = report["forced_backend"]
    yield "backends for CPU tensors, best first" + (f" ({forced} is forced)" if forced else ""), lines

    variables = [[name, setting] for name, setting in report["environment"].items()]
    yield "environment variables in force", table(variables) if variables else ["none"]

    test = report["self_test"]
    m, n, k, r, size = test["shape"]
    verdict = (
        f"{'passed' if test['passed'] else 'FAILED'}: {len(test['checks'])} checks in {test['seconds']:.2f} s"
    )
    title = (
        f"self-test, every op forward and backward, M={m} N={n} K={k} R={r} r̂={size}: relative error / bound"
    )
    yield title, [*table(grid_of(test, dtypes)), *failures(test), verdict]
    if report["warnings"]:
        yield "warnings", report["warnings"]


def render(report: dict[str, Any]) -> str:
    return "\n\n".join(
        "\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections(report)
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m peftkern", description="What is installed, what runs, a self-test."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    arguments = parser.parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=1, allow_nan=False) if arguments.json else render(report))
    return 0 if report["self_test"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
