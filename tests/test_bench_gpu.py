"""bench.gpu's candidates, on the CPU: each computes what its op asks for. Nothing here is measured."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # bench is not installed; last, so that peftkern stays the one under test

for module in ("rich", "typer", "matplotlib"):
    pytest.importorskip(module, reason=f"bench needs {module} (pip install peftkern[bench])")

from bench import goals, gpu, plot, store  # noqa: E402
from bench.cases import Shape  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", gpu.OPS)
def test_every_candidate_agrees_with_ours(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MOST_COPIES", 2)
    # autograd of bf16 leaves alone: nothing that needs a fixed order
    torch.use_deterministic_algorithms(False)
    weights = gpu.Weights(Shape(128, 256, "small"), CPU)
    first = None
    for candidate in gpu.candidates(op, weights, 5, CPU):
        result = candidate.make()(1)
        results = result if isinstance(result, tuple) else (result,)
        assert gpu.finite(results), candidate.name
        if candidate.name.startswith("peftkern") and "without" not in candidate.name:
            first = results
        elif "without" not in candidate.name:
            assert first is not None
            assert gpu.agree(first, results) is None, candidate.name
            spoiled = (first[0] * 1.05, *first[1:])
            assert gpu.agree(spoiled, results) is not None, "5 % off must not pass"


def test_no_gpu_no_numbers() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: make bench-gpu measures on it")
    with pytest.raises(Exception, match="no CUDA device"):
        gpu.main()


def written(path: Path, ratio: float, peak: int = 10**6, share: float = 0.9) -> Path:
    """A gpu.csv as bench.gpu would write it, its numbers made up: every peer takes `ratio` times our time."""
    peers = {
        "dequantize": {goals.OURS: 1.0, goals.BNB: ratio},
        "linear": {goals.OURS: 1.0, goals.BNB: ratio, "dense bf16": 0.9},
        "dx": {goals.OURS: 1.0, goals.BNB: ratio},
    }
    for op in ("lora", "lora_step"):
        peers[op] = {goals.OURS: 1.0, goals.PEFT: ratio, goals.BY_HAND: ratio, goals.BARE: 0.98}
    for op in ("mora", "mora_step"):
        kinds = (1, 2, 3, 4, 6)
        peers[op] = {f"{goals.OURS} type {kind}": 1.0 + 0.019 * kind for kind in kinds}
        peers[op] |= {f"eager type {kind}": ratio for kind in kinds} | {goals.BARE: 1.0}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, gpu.COLUMNS, restval="")
        writer.writeheader()
        for shape in (*gpu.LLAMA[:3], gpu.LLAMA_70B[0]):
            for op in gpu.OPS:
                for M in gpu.ROWS.get(op, gpu.TRAINED):
                    for name, times in peers[op].items():
                        mora = op.startswith("mora") and name == goals.BARE
                        row = {"op": op, "shape": shape.name, "label": shape.label, "M": M, "candidate": name}
                        row |= {"status": "ok", "eager_us": f"{100 * times}", "graph_us": f"{80 * times}"}
                        row |= {"ratio_eager": "" if mora else times, "ratio_graph": "" if mora else times}
                        row |= {
                            "gb_s": 4000 * share,
                            "copy_gb_s": 4000,
                            "device": "made up",
                            "commit": "none",
                        }
                        if op.endswith("step"):
                            row["peak_bytes"] = peak
                        writer.writerow(row)
        writer.writerow({"op": "linear", "shape": "4096x4096", "M": 1, "candidate": "x", "status": "wrong"})
    return path


def test_goals_are_judged_from_the_csv(tmp_path: Path) -> None:
    """Each of the issue's rows, met and not; nothing where nothing was measured."""
    met = {}
    ratios = (0.5, 1.0, 1.3, 1.5, 3.0)
    for ratio in ratios:
        found = list(goals.judge(store.read(written(tmp_path / "gpu.csv", ratio))))
        assert {one.shape for one in found} == set(goals.SHAPES)
        for one in found:
            met[ratio, one.name, one.M] = one.met
        assert goals.report(store.read(tmp_path / "gpu.csv"))[-1] == (
            f"goals: {sum(one.met for one in found)} of {len(found)} met"
        )
    assert {name for _, name, _ in met} == {goal.name for goal in goals.GOALS} | {
        "dequantize, share of the copy", "step's memory, copies of W in bf16",
    }  # fmt: skip
    for M, wanted in goals.FORWARD.items():
        for ratio in ratios:
            assert met[ratio, "forward, bitsandbytes", M] == (ratio >= wanted)
            assert met[ratio, "dX, bitsandbytes", M] == (ratio >= 0.9 * wanted)
    assert not met[1.3, "LoRA's step, bitsandbytes + peft", 8192]
    assert met[1.3, "LoRA's step, dequantize + cuBLAS", 512]
    assert met[1.3, "LoRA's cost, step", 512]  # 2 %
    for way in ("forward", "step"):  # type k costs 1.9 k %: 4 % are allowed, 10 % of type 6
        kinds = [kind for kind in (1, 2, 3, 4, 6) if met[1.3, f"MoRA's cost, {way}, type {kind}", 512]]
        assert kinds == [1, 2]
    assert goals.report([]) == ["goals: none of them was measured"]


def test_goals_of_memory_and_bandwidth(tmp_path: Path) -> None:
    for peak, share, met in ((10**6, 0.9, True), (8 * 14336 * 4096, 0.8, False)):
        found = goals.judge(store.read(written(tmp_path / "gpu.csv", 1.0, peak, share)))
        others = [one for one in found if one.name.startswith(("step's memory", "dequantize"))]
        assert {one.M for one in others} == {0, 512}  # beyond the crossover a copy is allowed
        assert {one.met for one in others} == {met}


def test_the_gpus_plots(tmp_path: Path) -> None:
    """The command that a run prints, on made-up numbers: a figure a group, the same bytes again."""
    path = written(tmp_path / "gpu.csv", 1.5)
    names = {*plot.GPU_FIGURES, "dequantize"}
    files = plot.draw(path, tmp_path)
    assert {file.stem for file in files} == names
    first = {file: file.read_bytes() for file in files}
    assert all(len(content) > 4000 for content in first.values())
    plot.draw(path, tmp_path)
    assert {file: file.read_bytes() for file in files} == first
    plot.draw(written(path, 1.2), tmp_path)
    same = {file.stem for file in files if file.read_bytes() == first[file]}
    assert same == {"mora_cost", "mora_step_cost", "dequantize"}  # none of the peers' times in them
    written(path, 1.5)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[-1]]))
    assert plot.draw(path, tmp_path) == []  # what was wrong has no place in a plot


def test_a_run_ends_with_goals_and_the_plots_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, clocks and graphs made up: each case has its rows, and the printed command draws them."""

    def timed(run: Callable[[], object]) -> float:
        run()
        return 2.0

    monkeypatch.setattr(gpu, "MOST_COPIES", 2)
    monkeypatch.setattr(gpu, "_elapsed", timed)
    monkeypatch.setattr(gpu, "_graph", lambda call, calls: lambda: call(0))
    monkeypatch.setattr(gpu, "_peak", lambda call: 1000)
    torch.use_deterministic_algorithms(False)
    cases = [(Shape(128, 256, "small"), op, 0 if op == "dequantize" else M) for op in gpu.OPS for M in (2, 3)]
    common = dict.fromkeys(("device", "versions", "commit", "when"), "none") | {"copy_gb_s": "10"}
    target = tmp_path / "results" / "gpu.csv"
    gpu.measure_all(cases, CPU, target, common, time.monotonic() + 600)
    rows = store.read(target)
    wrong = {(row["op"], row["candidate"], row["status"]) for row in rows if row["status"] != "ok"}
    assert wrong == set()
    assert {(row["op"], int(row["M"])) for row in rows} == {(op, M) for _, op, M in cases}
    ours = [row for row in rows if row["candidate"].startswith(goals.OURS) and row["op"] != "dequantize"]
    assert all(float(row["eager_us"]) > 0 and float(row["graph_us"]) > 0 for row in ours)
    *_, told, command = capsys.readouterr().out.splitlines()
    assert told == "goals: none of them was measured"  # they are of other shapes
    result = subprocess.run(
        [sys.executable, *command.split()[1:]], cwd=Path.cwd(), env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert {Path(line).stem for line in result.stdout.splitlines()} == {*plot.GPU_FIGURES, "dequantize"}
    gpu.measure_all(cases, CPU, target, common, time.monotonic() - 1)
    assert f"{len(cases)} of {len(cases)} cases are not measured" in capsys.readouterr().out
