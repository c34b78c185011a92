"""python -m bench.compile_report: compiles what the triton backend can dispatch, without a GPU, and reads
the code.

A row for each configuration: registers, spills, shared memory, which tensor-core instructions there are
and from where they take W, and what the loop over W costs: machine instructions of one thread for 32
weights that it decodes. Exits with 1 on a spill, or on a matmul in 16 bits without tensor-core
instructions.

The instructions are counted in the loop that holds the most code lookups (SHFL): one lookup is one
weight. At the memory bandwidth of an H200 a thread may spend about 130 of them on 32 weights; under the
tensor cores, which take 1024 clocks for a step of 256 × 128 × 64, about 500.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

TARGETS = (90, 80)
PROCESSORS = {90: 132, 80: 108, 100: 148, 120: 170}
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Case:
    kernel: str  # the kernel of the launches that is read
    configuration: str
    launches: Any  # list[Launch]
    tensor_cores: bool  # whether there must be some


@dataclass(frozen=True)
class Row:
    kernel: str
    configuration: str
    target: str
    registers: int
    spills: int  # loads and stores of local memory
    shared: int  # bytes
    tensor_cores: str  # "tcgen05", "wgmma", "mma" or ""
    w_from: str  # "registers", "tensor memory", "shared memory" or ""
    per_32_weights: str  # instructions of the loop over W
    seconds: str
    problem: str


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(N: int, K: int, quant_type: str, blocksize: int, nested: bool) -> Any:
    blocks = N * K // blocksize
    packed = _empty(N * K // 2, dtype=torch.uint8)
    if not nested:
        return packed, _empty(blocks, dtype=torch.float32), None, quant_type, blocksize, N, K
    statistics = (
        _empty(-(-blocks // 256), dtype=torch.float32),
        _empty(256, dtype=torch.float32),
        _empty(dtype=torch.float32),
        256,
    )
    return packed, _empty(blocks, dtype=torch.uint8), statistics, quant_type, blocksize, N, K


def cases(capability: int, everything: bool) -> Iterator[Case]:
    """Every tile of the tables with a LoRA addend and bias, then each other choice on one of them, or on each
    for `everything`."""
    from peftkern.triton_kernels import (
        choices,
        compress,
        dequantize,
        matmul,
        mora_grad,
        output_grads,
        quantize,
    )
    from peftkern.triton_kernels.launch import Machine

    machine = Machine(capability, PROCESSORS[capability])
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    N = K = 4096
    seed = _empty(dtype=torch.int64)
    seen: set[Any] = set()

    def product(
        M: int,
        transposed: bool,
        name: str,
        dtype: torch.dtype = bf16,
        quant_type: str = "nf4",
        blocksize: int = 64,
        nested: bool = False,
        rank: int = 16,
        bias: bool = True,
        spread: Any = None,
        odd: int = 0,
        dropout: bool = False,
    ) -> Iterator[Case]:
        weight = _weight(N, K + odd, quant_type, blocksize, nested)
        inner, outputs = (N, K + odd) if transposed else (K + odd, N)
        t, u = (_empty(M, rank, dtype=dtype), _empty(outputs, rank, dtype=fp32)) if rank else (None, None)
        b = _empty(outputs, dtype=fp32) if bias else None
        out, x = _empty(M, outputs, dtype=dtype), _empty(M, inner, dtype=dtype)
        mask = ("addend", 1 << 31, seed) if dropout else None
        launches = matmul.plan(machine, out, x, weight, transposed, 1.0, t, u, b, spread, mask=mask)
        main = next(launch for launch in launches if launch.kernel is matmul.matmul_4bit)
        a = main.arguments
        tile = f"{a['BLOCK_O']}x{a['BLOCK_M']}x{a['BLOCK_C']} {main.warps} warps {main.stages} stages"
        where = "dX" if transposed else "Y"
        how = ", split" if a["SPLIT"] else ""
        configuration = f"{where} {tile}, {name}{how}"
        if configuration not in seen:
            seen.add(configuration)
            yield Case("matmul_4bit", configuration, [main], dtype != fp32)
        for launch in launches:
            if launch.kernel is not matmul.matmul_4bit and launch.kernel.__name__ not in seen:
                seen.add(launch.kernel.__name__)
                yield Case(launch.kernel.__name__, "", [launch], False)

    def tokens(transposed: bool) -> list[int]:
        """M for each row of the table, and one at which a smaller tile fills the machine."""
        rows = choices.of(choices.WORDS_TRANSPOSED if transposed else choices.WORDS, machine)
        return [*(min(limit, choices.of(choices.CROSSOVER, machine) - 1) for limit, _ in rows), 512]

    for transposed in (False, True):
        sizes = tokens(transposed)
        for M in sizes:
            yield from product(M, transposed, "bf16 lora bias", bias=True)
        for M in sizes if everything else sizes[-1:]:
            yield from product(M, transposed, "fp16 lora bias", dtype=fp16)
            yield from product(M, transposed, "bf16", rank=0, bias=False)
            yield from product(M, transposed, "bf16 fp4", quant_type="fp4", rank=0, bias=False)
            yield from product(M, transposed, "bf16 blocks of 32", blocksize=32)
            yield from product(M, transposed, "bf16 nested rank 64", nested=True, rank=64)
            values = _empty(M, 256, dtype=fp32)
            yield from product(M, transposed, "bf16 cyclic", rank=0, bias=False, spread=(values, False, N))
            yield from product(M, transposed, "bf16 grouped", rank=0, bias=False, spread=(values, True, 0))
        if transposed:
            for M in sizes:
                yield from product(M, True, "bf16 lora dropout", bias=False, dropout=True)
            for dtype, odd, name in ((fp16, 0, "fp16"), (bf16, 2, "bf16 bytes"), (fp32, 0, "fp32")):
                name = f"{name} lora dropout"
                yield from product(512, True, name, dtype, odd=odd, bias=False, dropout=True)
            # more than 2^32 elements
            name = "bf16 lora dropout, 64-bit index"
            yield from product(1 << 21, True, name, bias=False, dropout=True)
        yield from product(256, transposed, "bf16 bytes", odd=2)
        yield from product(256, transposed, "fp32", dtype=fp32)

    def several(M: int, transposed: bool, size: int, based: bool, dtype: torch.dtype) -> Iterator[Case]:
        """MoRA of several blocks, which divide K and N or do not, with a base and alone."""
        count = -(-K // size)
        u, x = _empty(size, count * size, dtype=dtype), _empty(M, K, dtype=dtype)
        (base, weight) = (
            (x, _weight(N, K, "nf4", 64, False)) if based else (x[:, :0], _empty(N, 0, dtype=dtype))
        )
        weight = weight if based or not transposed else weight.t()
        out = _empty(M, N, dtype=dtype)
        (main, *_) = matmul.plan(machine, out, base, weight, transposed, 1.0, x, u, None, None, (count, 1.0))
        a, kernel = main.arguments, main.kernel.__name__
        tile = f"{a['BLOCK_O']}x{a['BLOCK_M']}x{a['BLOCK_C']} {main.warps} warps {main.stages} stages"
        how = f"{'dX' if transposed else 'Y'} {tile}, MoRA in blocks of {size} {dtype}".replace("torch.", "")
        if (kernel, how) not in seen:
            seen.add((kernel, how))
            yield Case(kernel, how, [main], dtype != fp32)

    for transposed in (False, True):
        for M in tokens(transposed) if everything else (16, *tokens(transposed)[-2:]):
            for size in (256, 362):
                yield from several(M, transposed, size, True, bf16)
        for size in (256, 362):
            yield from several(512, transposed, size, True, fp32)
            for M in (512, 8192):
                yield from several(M, transposed, size, False, bf16)
        yield from several(512, transposed, 256, False, fp32)

    def thin(
        x: Tensor, w: Tensor, transposed: bool, out: Tensor, name: str, masked: str = ""
    ) -> Iterator[Case]:
        mask = (masked, 1 << 31, seed) if masked else None
        main = matmul.plan(machine, out, x, w, transposed, 1.0, None, None, None, None, mask=mask)[0]
        a = main.arguments
        tile = f"{a['BLOCK_O']}x{a['BLOCK_M']}x{a['BLOCK_C']} {main.warps} warps {main.stages} stages"
        how = ", split" if a["SPLIT"] else ""
        configuration = f"{name} {tile}{how}"
        if configuration not in seen:
            seen.add(configuration)
            yield Case("matmul_dense", configuration, [main], x.dtype != fp32)

    for rank in (16, 32, 64):
        for M in (512, 16384):
            x, G = _empty(M, K, dtype=bf16), _empty(M, rank, dtype=bf16)
            for adapter in (fp32, bf16):
                name = f"{rank} {adapter}".replace("torch.", "")
                yield from thin(x, _empty(rank, K, dtype=adapter), False, G, f"x Aᵀ rank {name}")
                yield from thin(G.t(), x, True, _empty(rank, K, dtype=adapter), f"Gᵀ x rank {name}")
        for M, how in ((512, ""), (16384, ""), (1 << 21, " 64-bit index")):
            x, G, A = _empty(M, K, dtype=bf16), _empty(M, rank, dtype=bf16), _empty(rank, K, dtype=fp32)
            yield from thin(x, A, False, G, f"dropout(x) Aᵀ rank {rank}{how}", "x")
            yield from thin(G.t(), x, True, A, f"Gᵀ dropout(x) rank {rank}{how}", "weight")
    x, A = _empty(512, K, dtype=fp32), _empty(16, K, dtype=fp32)
    yield from thin(x, A, False, _empty(512, 16, dtype=fp32), "x Aᵀ rank 16 fp32")
    yield from thin(x, A, False, _empty(512, 16, dtype=fp32), "dropout(x) Aᵀ rank 16 fp32", "x")
    yield from thin(_empty(16, 512, dtype=fp32), x, True, A, "Gᵀ dropout(x) rank 16 fp32", "weight")

    def gradients(
        M: int, rank: int, asked: str, adapter: torch.dtype, dtype: torch.dtype = bf16, odd: int = 0
    ) -> Iterator[Case]:
        G = _empty(M, rank, dtype=dtype) if "G" in asked.split() else None
        dB = _empty(N + odd, rank, dtype=adapter) if "dB" in asked.split() else None
        dbias = _empty(N + odd, dtype=adapter) if "dbias" in asked.split() else None
        dY, T = _empty(M, N + odd, dtype=dtype), _empty(M, rank, dtype=dtype)
        B = _empty(N + odd, rank, dtype=adapter)
        for launch in output_grads.plan(machine, G, dB, dbias, dY, B, T, 1.0):
            main, a = launch.kernel is output_grads.output_grads, launch.arguments
            tile = f"{a['BLOCK_N']}x{a['BLOCK_M']}x{a['BLOCK_R']} " if main else ""
            types = f"{dtype} {adapter}".replace("torch.", "")
            how = f"{launch.warps} warps {launch.stages} stages, {asked}, rank {rank} {types}"
            configuration = f"{tile}{how}{', odd N' if odd else ''}"
            name = configuration if main else launch.kernel.__name__
            if name not in seen:
                seen.add(name)
                yield Case(launch.kernel.__name__, configuration, [launch], main and dtype != fp32)

    for M in (512, 8192):
        for rank in (8, 16, 32, 64):
            yield from gradients(M, rank, "G dB dbias", fp32)
            yield from gradients(M, rank, "G dB", fp32)
            yield from gradients(M, rank, "G dB", bf16)
            if everything:
                for asked in ("G", "dB", "dbias", "G dbias", "dB dbias"):
                    yield from gradients(M, rank, asked, fp32)
        for rank in (16, 32, 64):
            yield from gradients(M, rank, "G dB dbias", fp32, fp32)
    yield from gradients(512, 16, "G dB dbias", fp32, fp16)
    yield from gradients(512, 16, "G dB dbias", fp32, odd=1)
    for asked in ("G", "dB", "dbias"):
        yield from gradients(512, 16, asked, fp32)

    def square(
        M: int, outputs: int, size: int, turned: bool, dtype: torch.dtype = bf16, columns: int = K
    ) -> Iterator[Case]:
        """dM of MoRA; loads of neighbours are as wide as r̂, the columns and the rows' stride allow."""
        count = -(-columns // size)
        rotation = _empty(count, 2, size // 2, dtype=fp32) if turned else None
        dY, x = _empty(M, outputs, dtype=dtype), _empty(M, columns, dtype=dtype)
        dM = _empty(size, size, dtype=fp32)
        for launch in mora_grad.plan(machine, dM, dY, x, 1.0, count * size, rotation):
            main, a = launch.kernel is mora_grad.mora_grad, launch.arguments
            how = f"in blocks of {size}{' turned' if turned and not main else ''}"
            if main:
                tile = f"{a['BLOCK_I']}x{a['BLOCK_J']}x{a['BLOCK_M']}"
                how = f"{tile} {launch.warps} warps {launch.stages} stages, {how} {dtype}".replace(
                    "torch.", ""
                )
            if (launch.kernel, how) not in seen:
                seen.add((launch.kernel, how))
                yield Case(launch.kernel.__name__, how, [launch], main and dtype != fp32)

    for size, outputs in ((256, N), (202, 1024)):
        for turned in (True, False):
            for M in (16, 100, 512, 1024, 8192):  # each tile
                yield from square(M, outputs, size, turned)
            yield from square(8192, outputs, size, turned, fp16)
            for M in (16, 8192):
                yield from square(M, outputs, size, turned, fp32)
    yield from square(16, 5, 2, True, columns=6)  # half of r̂ is 1
    for size in (348, 389):  # x compressed: its rows are r̂ apart
        yield from square(8192, 11008, size, False, columns=size)

    out = _empty(512, N, dtype=bf16)
    none, empty = _empty(512, 0, dtype=bf16), _empty(N, 0, dtype=bf16)
    spread = (_empty(512, 256, dtype=fp32), False, N)
    addend = matmul.plan(machine, out, none, empty, False, 1.0, None, None, None, spread)
    yield Case("matmul_dense", "addend alone: cyclic", addend[:1], False)
    for dtype in (bf16, fp16, fp32):
        out, none, empty = (
            _empty(8192, K, dtype=dtype),
            _empty(8192, 0, dtype=dtype),
            _empty(0, K, dtype=dtype),
        )
        G, A, mask = _empty(8192, 16, dtype=dtype), _empty(16, K, dtype=fp32), ("addend", 1 << 31, seed)
        addend = matmul.plan(machine, out, none, empty, True, 1.0, G, A.t(), None, None, mask=mask)
        yield Case("matmul_dense", f"addend alone: dropout(G A) {dtype}".replace("torch.", ""), addend, False)

    for dtype in (bf16, fp32):
        for nested in (False, True):
            launches = dequantize.plan(_empty(N, K, dtype=dtype), _weight(N, K, "nf4", 64, nested))
            yield Case("dequantize", f"{dtype} nested={nested}".removeprefix("torch."), launches, False)
    for blocksize in (64, 4096):
        w = _empty(N, K, dtype=bf16)
        packed, absmax, *_ = _weight(N, K, "nf4", blocksize, False)
        launches = quantize.plan(w, packed, absmax, "nf4", blocksize)
        yield Case("quantize", f"bfloat16 blocks of {blocksize}", launches, False)
    x, z = _empty(512, K, dtype=bf16), _empty(512, 256, dtype=bf16)
    yield Case("compress", "cyclic", compress.plan(z, x, False, K, None, False), False)
    yield Case("compress", "grouped", compress.plan(z, x, True, 0, None, False), False)
    rotated = compress.plan(_empty(512, K, dtype=bf16), x, False, K, _empty(16, 2, 128, dtype=fp32), False)
    yield Case("compress", "rotated", rotated, False)


def _source(launch: Any) -> Any:
    """What triton's launcher would compile for these arguments on aligned memory."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and free):
            signature[name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            hints[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and free:
                hints[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, hints)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
        sass = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        )
    return usage.stdout, sass.stdout


def _loops(sass: str) -> tuple[list[str], list[list[str]]]:
    """All instructions, and those of each innermost-first loop: from a backward branch's target to it."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label.group(1)] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            text = re.sub(r"^@!?U?P\w+\s+", "", found.group(1))
            instructions.append(text)
            target = re.match(r"BRA\b.*`\((\.L_\S+)\)", text)
            if target and target.group(1) in labels:
                loops.append(instructions[labels[target.group(1)] :])
    return instructions, loops


def read(case: Case, capability: int) -> Row:
    """Compiles the case's launch and reads its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    (launch,) = case.launches
    start = time.perf_counter()
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": launch.fuse}
    compiled: Any = triton.compile(_source(launch), target=GPUTarget("cuda", capability, 32), options=options)
    usage, sass = _disassemble(compiled.asm["cubin"])
    seconds = time.perf_counter() - start
    instructions, loops = _loops(sass)
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    stack = int(re.findall(r"STACK:(\d+)", usage)[-1])
    spills = sum(bool(re.match(r"(LDL|STL)\b", text)) for text in instructions)
    wgmma = [text for text in instructions if text.startswith("HGMMA")]
    mma = [text for text in instructions if text.startswith("HMMA")]
    tcgen05 = [text for text in instructions if text.startswith("UTCHMMA")]
    w_from, per_32 = "", ""
    heavy = max(loops, key=lambda loop: sum(text.startswith("SHFL") for text in loop), default=[])
    lookups = sum(text.startswith("SHFL") for text in heavy)
    if case.kernel == "matmul_4bit" and lookups:
        per_32 = f"{32 * len(heavy) / lookups:.0f}"
        if operands := [text for text in heavy if text.startswith("HGMMA")]:
            # HGMMA D, A, B, C: A is a register, or a descriptor of shared memory
            first = [re.split(r",\s*", text)[1] for text in operands]
            w_from = "registers" if all(re.match(r"R\d+", operand) for operand in first) else "shared memory"
        elif any(text.startswith("HMMA") for text in heavy):
            w_from = "registers"
        elif any(text.startswith("UTCHMMA") for text in heavy):
            w_from = "tensor memory" if any(text.startswith("STTM") for text in heavy) else "shared memory"
    problem = ""
    if spills or stack:
        problem = f"{spills} spills, {stack} bytes of stack"
    elif case.tensor_cores and not (tcgen05 or wgmma or mma):
        problem = "no tensor-core instruction"
    return Row(
        case.kernel,
        case.configuration,
        f"sm_{capability}",
        registers,
        spills,
        int(compiled.metadata.shared),
        "tcgen05" if tcgen05 else "wgmma" if wgmma else "mma" if mma else "",
        w_from,
        per_32,
        f"{seconds:.1f}",
        problem,
    )


def main(
    file: Annotated[Path | None, typer.Option("--csv", help="write the rows there too")] = None,
    target: Annotated[int, typer.Option(help="80, 90, 100 or 120; 0: 80 and 90")] = 0,
    everything: Annotated[
        bool, typer.Option("--all", help="each choice on each tile: some ten minutes")
    ] = False,
    only: Annotated[str, typer.Option(help="rows whose kernel and configuration contain this")] = "",
) -> None:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise typer.BadParameter("TRITON_INTERPRET is set: nothing would be compiled")
    rows: list[Row] = []
    print(
        f"{'kernel':14} {'configuration':56} {'target':7} {'regs':>4} {'spill':>5} {'shared':>7} {'cores':7} "
        f"{'W from':13} {'per 32':>6}"
    )
    for capability in (target,) if target else TARGETS:
        for case in cases(capability, everything):
            if only not in f"{case.kernel} {case.configuration}":
                continue
            row = read(case, capability)
            rows.append(row)
            print(
                f"{row.kernel:14} {row.configuration:56} {row.target:7} {row.registers:4} {row.spills:5} "
                f"{row.shared:7} {row.tensor_cores:7} {row.w_from:13} {row.per_32_weights:>6} {row.problem}",
                flush=True,
            )
    if file is not None:
        with file.open("w", newline="") as out:
            names = [field.name for field in fields(Row) if field.name != "seconds"]  # of this run alone
            writer = csv.DictWriter(out, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    failed = [row for row in rows if row.problem]
    print(f"{len(rows)} configurations, {len(failed)} with a problem")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
