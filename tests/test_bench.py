"""The harness of bench/: its gate lets no wrong result have a number; a small run writes what it measured."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # bench is not installed; last, so that peftkern stays the one under test

for module in ("rich", "typer", "matplotlib"):
    pytest.importorskip(module, reason=f"bench needs {module} (pip install peftkern[bench])")

from bench import cases, gate, memory, peers, plot, report, run, store  # noqa: E402
from bench.cases import Case, Shape  # noqa: E402
from bench.machine import describe  # noqa: E402

SHAPE = Shape(64, 128, "small")


def setup(op: str, M: int = 3) -> tuple[Case, peers.Inputs]:
    case = Case(op, SHAPE, M if op not in ("dequantize", "quantize") else 0, cold=False)
    weights = peers.Weights(SHAPE, case.dtype, case.quant_type, case.blocksize, case.cold, describe())
    return case, peers.Inputs(case, weights)


@pytest.mark.parametrize("op", cases.OPS)
def test_every_operation_passes_its_own_gate(op: str) -> None:
    case, inputs = setup(op)
    candidates, _ = peers.build(inputs, ("dense",))
    assert candidates[0].name == cases.OURS
    with torch.set_grad_enabled(op in ("dx", "train_step")):
        assert {c.name: run.verify(c, case) for c in candidates} == {c.name: None for c in candidates}


def test_a_planted_wrong_result_gets_no_number() -> None:
    case, inputs = setup("linear_4bit", M=16)
    right = peers.ours(inputs)

    def one_row_zero(i: int) -> torch.Tensor:
        y = right.call(i).clone()
        y[7] = 0
        return y

    def one_element_off(i: int) -> torch.Tensor:
        y = right.call(i).clone()
        y[3, 5] += 0.2 * y.float().square().mean().sqrt()
        return y

    wrong = [
        dataclasses.replace(right, name="row", call=one_row_zero, kind="peer"),
        dataclasses.replace(right, name="element", call=one_element_off, kind="peer"),
        dataclasses.replace(right, name="nan", call=lambda i: right.call(i) * float("nan"), kind="peer"),
        dataclasses.replace(right, name="shape", call=lambda i: right.call(i)[:-1], kind="peer"),
    ]
    candidates = [right, *wrong]
    timings = run.measure(candidates, case, seconds=0.01, rounds=2)
    assert timings[0].problem is None
    assert len(timings[0].rounds) >= 2
    rows = run.rows_of(case, candidates, timings, describe())
    for timing, row in zip(timings[1:], rows[1:], strict=True):
        assert timing.problem
        assert not timing.rounds
        assert row["status"] == timing.problem
        assert not {"median_us", "ratio", "gb_s", "gflop_s"} & row.keys()


def test_dequantize_must_be_equal_bit_for_bit() -> None:
    case, inputs = setup("dequantize")
    right = peers.ours(inputs)
    off = dataclasses.replace(right, call=lambda i: right.call(i).nextafter(torch.tensor(9.0).bfloat16()))
    assert run.verify(right, case) is None
    assert "bit-identical" in str(run.verify(off, case))


def test_the_gate_counts_results() -> None:
    y = torch.ones(2, 2)
    assert gate.check((y, y), (y,), torch.float32, 2, 1.0) == "2 results, expected 1"
    with pytest.raises(TypeError, match="result: expected a tensor"):
        gate.as_tuple("y")


def test_a_run_writes_csv_plot_and_tables(tmp_path: Path) -> None:
    machine = describe()
    for M in (1, 4):
        case, inputs = setup("linear_4bit", M)
        case = dataclasses.replace(case, cold=True)  # as the plot draws
        candidates, _ = peers.build(inputs, ("dense",))
        rows = run.rows_of(case, candidates, run.measure(candidates, case, 0.01, 2), machine)
        store.write(tmp_path / "results.csv", rows)
        store.write(tmp_path / "results.csv", rows)  # replaces itself
    written = store.read(tmp_path / "results.csv")
    ours = [row for row in written if row["candidate"] == cases.OURS]
    assert [row["M"] for row in ours] == ["1", "4"]
    assert all(float(row["ratio"]) == 1.0 and float(row["median_us"]) > 0 for row in ours)
    assert {"machine", "commit", "threads", "versions"} <= ours[0].keys()
    assert "64×128" in report.markdown(written)
    assert all(path.stat().st_size > 1000 for path in plot.draw(tmp_path / "results.csv", tmp_path))


def test_goals_read_the_right_rows() -> None:
    base = dict(zip(store.CASE, Case("linear_4bit", cases.LLAMA[0], 1, True).key, strict=True))
    row = {name: str(value) for name, value in base.items()} | {"status": "ok"}
    rows = [row | {"candidate": cases.READ, "ratio": "0.8"}, row | {"candidate": cases.DENSE, "ratio": "3.5"}]
    over = next(goal for goal in cases.GOALS if goal.peer == cases.READ and goal.cold)
    ratio = next(goal for goal in cases.GOALS if goal.peer == cases.DENSE)
    assert report.measured(over, rows) == {("4096x4096", 1): 1.25}
    assert report.met(over, 1.25)
    assert report.measured(ratio, rows) == {("4096x4096", 1): 3.5}
    assert not report.met(ratio, 3.2)


def test_saved_bytes_counts_each_storage_once() -> None:
    x, w = torch.ones(8, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    _, kept = memory.saved_bytes(lambda: (x @ w) * (x @ w), [w])
    assert kept == x.nbytes + 2 * 8 * 4 * 4  # x once, both products, never w


def test_cold_cases_rotate_more_than_the_cache() -> None:
    machine = dataclasses.replace(describe(), llc_bytes=1 << 20)
    weights = peers.Weights(SHAPE, "bf16", "nf4", 64, True, machine)
    assert weights.copies(1 << 16) * (1 << 16) >= 3 << 20
    with pytest.raises(peers.UnavailableError, match="copies of 16 bytes"):
        weights.copies(16)


@pytest.mark.parametrize("text", ["4096", "4096x", "0x5", "llama3"])
def test_a_bad_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shape: expected"):
        cases.shapes_by_name(text)
