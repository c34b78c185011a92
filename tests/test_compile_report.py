"""bench.compile_report: what it reads from machine code, and what makes it fail."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # bench is not installed; last, so that peftkern stays the one under test

pytest.importorskip("typer", reason="bench needs typer (pip install peftkern[bench])")

from bench import compile_report  # noqa: E402
from bench.compile_report import Row  # noqa: E402
from peftkern.backends import triton  # noqa: E402

SASS = """
.text.kernel:
        /*0000*/                   S2R R6, SR_LANEID ;
.L_x_1:
        /*0010*/                   SHFL.IDX PT, R90, R10, R4, 0x1f ;
        /*0020*/              @!P0 FMUL R1, R2, R3 ;
.L_x_2:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR12], R24, gsb0 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/               @P2 BRA `(.L_x_1) ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0070*/                   EXIT ;
"""
GOOD = Row("matmul_4bit", "", "sm_90", 200, 0, 90000, "wgmma", "registers", "200", "1.0", "")


def test_loops_are_backward_branches() -> None:
    instructions, loops = compile_report._loops(SASS)
    assert [text.split()[0].split(".")[0] for text in instructions] == [
        "S2R", "SHFL", "FMUL", "HGMMA", "BRA", "BRA", "BRA", "EXIT",
    ]  # fmt: skip
    assert [len(loop) for loop in loops] == [2, 5]


@pytest.mark.parametrize("problem", ["", "3 spills, 16 bytes of stack", "no tensor-core instruction"])
def test_a_problem_ends_in_an_error(
    problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = compile_report.Case("matmul_4bit", "", [], True)
    monkeypatch.setattr(compile_report, "cases", lambda capability, everything: iter([case]))
    monkeypatch.setattr(compile_report, "read", lambda case, capability: replace(GOOD, problem=problem))
    if problem:
        with pytest.raises(SystemExit) as caught:
            compile_report.main(None, 90, False, "")
        assert caught.value.code == 1
    else:
        compile_report.main(None, 90, False, "")
    assert problem in capsys.readouterr().out


def test_one_kernel_of_each_kind_compiles() -> None:
    """Real code for sm_90: no spill, W from registers."""
    if triton.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: nothing can be compiled in this process")
    if triton.missing() is not None:
        pytest.skip(str(triton.missing()))
    seen = set()
    for case in compile_report.cases(90, False):
        which = case.configuration.split(" ")[0] if case.kernel == "matmul_4bit" else ""
        kind = (case.kernel, which, "dropout" in case.configuration)
        if kind in seen:
            continue
        seen.add(kind)
        row = compile_report.read(case, 90)
        assert row.problem == "", row
        if case.kernel == "matmul_4bit":
            assert (row.tensor_cores, row.w_from) == ("wgmma", "registers")
    assert {kernel for kernel, *_ in seen} == {
        "matmul_4bit", "matmul_dense", "finish_split", "decode_scales", "dequantize", "quantize", "compress",
        "output_grads", "finish_output_grads", "mora_grad", "finish_mora_grad",
    }  # fmt: skip
