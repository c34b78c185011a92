"""Instruction set levels: forced, refused, the rows they choose, and no wide instruction outside its file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftkern.backends import cpu

_cpu = pytest.importorskip("peftkern._cpu", reason="peftkern._cpu is not built", exc_type=ImportError)

LEVELS = ["scalar", "avx2", "avx512", "avx512_bf16", "amx"]  # worst to best
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_levels_are_a_prefix_of_what_is_built() -> None:
    available, built = _cpu.isa_levels(), _cpu.build_info()["levels"]
    assert built[0] == "scalar"
    assert available == built[: len(available)]
    assert [name for name in LEVELS if name in built] == built


def test_levels_agree_with_the_kernel_of_the_machine() -> None:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError as error:
        pytest.skip(f"no /proc/cpuinfo to compare with: {error}")
    flags = set(re.findall(r"^flags\s*: (.*)$", cpuinfo, re.MULTILINE)[0].split())
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx512_bf16": {"avx512_bf16"},
        "amx": {"amx_tile", "amx_bf16"},
    }
    if _cpu.build_info()["emulated_amx"]:  # which also finds an AVX512_BF16 that a virtual machine hides
        needs["amx"] = set()
        if "avx512_bf16" in _cpu.isa_levels():
            needs["avx512_bf16"] = set()
    expected, wanted = ["scalar"], set[str]()
    for name in LEVELS[1:]:
        wanted |= needs[name]
        if name in _cpu.build_info()["levels"] and wanted <= flags:
            expected.append(name)
    assert _cpu.isa_levels() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "primitive", ["matmul", "dequantize", "quantize", "dropout", "compress", "mora", "mora_grad"]
)
def test_the_best_row_of_the_table_runs(isa: str, primitive: str, dtype: torch.dtype) -> None:
    """kernels.inc: best ISA first; a row is chosen if its level is not above the active one."""
    assert _cpu.isa() == isa
    table = (Path(__file__).parents[1] / "csrc/cpu/kernels.inc").read_text()
    short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    rows = re.findall(r"^PEFTKERN_KERNEL\((\w+), (\w+), (\w+)\)", table, re.MULTILINE)
    levels = [level for level, p, d in rows if p == primitive and d == short]
    assert levels == sorted(levels, key=LEVELS.index, reverse=True), "the table is not best first"
    assert levels[-1] == "scalar", "every primitive has a scalar row"
    expected = next(level for level in levels if LEVELS.index(level) <= LEVELS.index(isa))
    assert _cpu.kernel(primitive, dtype) == expected
    assert _cpu.kernel(primitive, str(dtype).removeprefix("torch.")) == expected


def test_use_isa_restores() -> None:
    before = _cpu.isa()
    with cpu.use_isa("scalar"):
        assert _cpu.isa() == "scalar"
    assert _cpu.isa() == before
    _cpu.set_isa("scalar")
    _cpu.set_isa(None)
    assert _cpu.isa() == _cpu.isa_levels()[-1]


@pytest.mark.parametrize("name", ["avx1024", "", "AVX2", "neon"])
def test_an_unknown_level_is_refused(name: str) -> None:
    before = _cpu.isa()
    with pytest.raises(ValueError, match=re.escape(f"{_cpu.isa_levels()}, got '{name}'")):
        _cpu.set_isa(name)
    assert _cpu.isa() == before


def test_a_level_of_another_machine_is_refused() -> None:
    absent = [name for name in LEVELS if name not in _cpu.isa_levels()]
    if not absent:
        pytest.skip("this machine has every level")
    for name in absent:
        with pytest.raises(ValueError, match="expected one of the levels available here"):
            _cpu.set_isa(name)


def test_set_isa_and_kernel_refuse_other_types() -> None:
    with pytest.raises(TypeError):
        _cpu.set_isa(3)
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16, got float64"):
        _cpu.kernel("matmul", torch.float64)
    with pytest.raises(
        ValueError,
        match=r"primitive: expected one of matmul, .*, mora_grad, probe, got conv",
    ):
        _cpu.kernel("conv", torch.float32)


def test_environment_variable() -> None:
    """Each level, and a bad value, from one process that has torch already: fork, set, import."""
    code = f"""
import os, sys, torch
for name in {[*_cpu.isa_levels(), "avx1024", ""]!r}:
    child = os.fork()
    if child == 0:
        os.environ["PEFTKERN_ISA"] = name
        try:
            import peftkern
            from peftkern import _cpu
            print(repr(name), "runs", _cpu.isa())
        except ValueError as error:
            print(repr(name), "raises", error)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    levels = _cpu.isa_levels()
    assert lines[: len(levels)] == [f"'{name}' runs {name}" for name in levels]
    assert lines[len(levels)] == (
        f"'avx1024' raises PEFTKERN_ISA: expected one of the levels available here, {levels}, got 'avx1024'"
    )
    assert lines[len(levels) + 1] == f"'' runs {levels[-1]}", "an empty variable is an unset one"


def disassembly() -> dict[str, set[str]]:
    """The wide levels that each function of the module has an instruction of."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump on this machine")
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", _cpu.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # objdump may print mnemonics of these after a prefix such as {evex}
    amx = re.compile(r"\t(?:\{\w+\} )?(?:tdp\w+|tile\w+|ldtilecfg|sttilecfg)\b")
    bf16 = re.compile(r"\t(?:\{\w+\} )?(?:vdpbf16ps|vcvtne2?ps2bf16\w*)\b")
    avx512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])")
    avx = re.compile(r"\t(?:\{\w+\} )?v(?!err|erw)\w+|%ymm")
    functions: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in listing.splitlines():
        if line.endswith(">:"):
            current = functions.setdefault(line[line.index("<") + 1 : -2], set())
        elif amx.search(line):
            current.add("amx")
        elif bf16.search(line):
            current.add("avx512_bf16")
        elif avx512.search(line):
            current.add("avx512")
        elif avx.search(line):
            current.add("avx2")
    return functions


def test_no_wide_instruction_outside_its_level() -> None:
    """A shared inline function compiled with AVX-512 can become the linked copy and kill an older CPU."""
    functions = disassembly()
    own = {
        level: [name for name in functions if f"peftkern::{level}::" in name]
        for level in _cpu.build_info()["levels"]
    }
    for level, names in own.items():
        assert names, f"no symbol of {level}: a stripped module cannot be checked"
    # the test itself sees wide code where it is expected
    for level in own:
        if level != "scalar":
            assert any(level in functions[name] for name in own[level]), (
                f"{level} without an instruction of its own"
            )
    level_of = {name: level for level, names in own.items() for name in names}
    too_wide = {
        name: sorted(used)
        for name, used in functions.items()
        if any(LEVELS.index(u) > LEVELS.index(level_of.get(name, "scalar")) for u in used)
    }
    assert not too_wide


def test_isa_objects_define_nothing_shared() -> None:
    """Every function that an ISA's object file defines is local or in that ISA's namespace; none is weak."""
    objects = [
        path
        for path in (Path(__file__).parents[1] / "build").glob("cmake-*/CMakeFiles/_cpu.dir/csrc/cpu/*.o")
        if path.name.removesuffix(".cpp.o") in LEVELS
    ]
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs nm and the object files of an in-place build (pip install -e .)")
    for path in objects:
        level = path.name.removesuffix(".cpp.o")
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
        )
        for line in symbols.stdout.splitlines():
            _, kind, name = line.split(" ", 2)
            assert kind not in "wW", f"{path.name}: weak function {name}"
            if kind == "T":
                assert name.startswith(f"peftkern::{level}::"), f"{path.name}: {name}"


def test_no_level_asks_what_the_compiler_may_use() -> None:
    """A -march in the user's CXXFLAGS holds for every file: a level that went by the compiler's macros would
    not compile, or round as another one."""
    sources = [*Path(__file__).parents[1].joinpath("csrc").rglob("*.*")]
    assert len(sources) > 20
    for path in sources:
        assert not re.search(r"__(AVX|FMA|F16C|AMX)", path.read_text(encoding="utf-8")), path.name
