"""The harness of bench/: its gate lets no wrong result have a number; a small run writes what it measured."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peftkern import reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # bench is not installed; last, so that peftkern stays the one under test

for module in ("rich", "typer", "matplotlib"):
    pytest.importorskip(module, reason=f"bench needs {module} (pip install peftkern[bench])")

from bench import cases, gate, memory, peers, plot, report, run, store  # noqa: E402
from bench.cases import Case, Shape  # noqa: E402
from bench.eager_mora import EagerMora  # noqa: E402
from bench.machine import _git, describe  # noqa: E402

SHAPE = Shape(64, 128, "small")


def setup(op: str, M: int = 3, mora_type: int = 0) -> tuple[Case, peers.Inputs]:
    if op in cases.MORA_OPS:
        case = cases.mora_case(op, SHAPE, M, mora_type, cold=False)
    else:
        case = Case(op, SHAPE, M if op not in ("dequantize", "quantize") else 0, cold=False)
    weights = peers.Weights(SHAPE, case.dtype, case.quant_type, case.blocksize, case.cold, describe())
    return case, peers.Inputs(case, weights)


def problems(candidates: list[peers.Candidate], case: Case) -> dict[str, str | None]:
    with torch.set_grad_enabled(case.op in cases.BACKWARD_OPS):
        return {candidate.name: run.verify(candidate, case) for candidate in candidates}


@pytest.mark.parametrize("op", [op for op in cases.OPS if op not in cases.MORA_OPS])
def test_every_operation_passes_its_own_gate(op: str) -> None:
    case, inputs = setup(op)
    candidates, _ = peers.build(inputs, ("dense",))
    assert candidates[0].name == cases.OURS
    assert problems(candidates, case) == {c.name: None for c in candidates}


@pytest.mark.parametrize("op", cases.MORA_OPS)
@pytest.mark.parametrize("mora_type", cases.MORA_TYPES)
def test_mora_and_its_peers_pass_the_gate(op: str, mora_type: int) -> None:
    case, inputs = setup(op, mora_type=mora_type)
    assert SHAPE.K % case.side, "the wrap-around pad must have something to do"
    candidates, missing = peers.build(inputs, ("eager", "lora"))
    assert problems(candidates, case) == {c.name: None for c in candidates}
    names = {c.name for c in candidates if c.kind != "ceiling"}
    over = {cases.LINEAR, cases.LORA} if "linear" in op else set()
    assert names == {cases.OURS, cases.EAGER, *over}
    assert not missing


def test_mora_compiled_passes_the_gate_and_its_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case, inputs = setup("mora_step", mora_type=6)
    found, missing = peers.build(inputs, ("compile",))
    assert not missing
    assert cases.COMPILED in {c.name for c in found}
    assert set(problems(found, case).values()) == {None}

    def fails(*args: object, **options: object) -> object:
        def call(*tensors: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler\nat all")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    found, missing = peers.build(inputs, ("compile",))
    assert cases.COMPILED not in {c.name for c in found}
    assert missing == {"compile": "torch.compile failed: RuntimeError: no compiler"}


@pytest.mark.parametrize("op", cases.MORA_OPS)
def test_a_wrong_mora_gets_no_number(op: str) -> None:
    case, inputs = setup(op, M=16, mora_type=1)
    right = peers.ours(inputs)
    other = dataclasses.replace(case, mora_type=4)
    twin = peers.Inputs(other, inputs.weights)
    turned = peers.Inputs(case, inputs.weights)
    turned.matrix = turned.matrix.t().contiguous()
    candidates = {
        "another type": dataclasses.replace(peers.ours(twin), expected=right.expected),
        "M transposed": dataclasses.replace(peers.ours(turned), expected=right.expected),
    }
    if "linear" in op:
        candidates["no adapter"] = peers.ours_without_adapter(inputs)
        candidates["no adapter"].expected = right.expected
    with torch.set_grad_enabled(op in cases.BACKWARD_OPS):
        for name, candidate in candidates.items():
            assert run.verify(candidate, case), name


@pytest.mark.parametrize(("N", "K"), [(64, 128), (128, 64), (96, 96), (36, 100), (100, 36), (7, 130)])
@pytest.mark.parametrize("mora_type", cases.MORA_TYPES)
def test_the_eager_peer_is_the_reference(mora_type: int, N: int, K: int) -> None:
    rank = 2 * (min(N, K) // 3 // 2) + 2  # even, and with a pad for most of these shapes
    generator = torch.Generator().manual_seed(N)
    x = torch.randn(5, K, generator=generator, dtype=torch.float64)
    matrix = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    got = EagerMora(mora_type, K, N, rank, torch.float64)(x, matrix)
    # both in fp64, over at most K + rank products: only the order of the sums differs
    torch.testing.assert_close(got, reference.mora(x, matrix, N, mora_type), rtol=1e-12, atol=1e-12)


def test_the_eager_peer_refuses_a_pad_longer_than_x() -> None:
    with pytest.raises(ValueError, match="in_features: expected at least 6"):
        EagerMora(1, 4, 64, 10, torch.float32)


@pytest.mark.parametrize("op", cases.MORA_OPS)
@pytest.mark.parametrize("mora_type", cases.MORA_TYPES)
def test_mora_flops_are_the_products_and_few_sums_more(op: str, mora_type: int) -> None:
    case = cases.mora_case(op, Shape(1024, 1024, "square"), 2, mora_type)
    eager = EagerMora(mora_type, 1024, 1024, case.side, torch.float32)
    leaf = torch.randn(2, 1024, requires_grad=True)
    matrix = torch.randn(case.side, case.side, requires_grad=True)
    W = torch.randn(1024, 1024)
    with FlopCounterMode(display=False) as counter:
        y = eager(leaf, matrix)
        if "linear" in op:
            y = y + leaf @ W.t()
        if op in cases.BACKWARD_OPS:
            y.sum().backward()  # what the counter can follow
    # K + N sums beside 2 r̂² operations at least, r̂ = 128: 6 %
    assert counter.get_total_flops() < cases.flops(case) < 1.07 * counter.get_total_flops()


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


def test_a_csv_from_before_mora_still_reads(tmp_path: Path) -> None:
    old = [name for name in store.COLUMNS if name != "mora_type"]
    assert (*old, "mora_type") == store.COLUMNS, "an older column has moved"
    case = Case("linear_4bit", SHAPE, 1, cold=True)
    known = dict(zip(store.CASE, case.key, strict=True))
    row = dict.fromkeys(old, "1") | {name: str(known[name]) for name in store.CASE if name in old}
    row |= {"candidate": cases.OURS, "status": "ok", "kind": "ours"}
    path = tmp_path / "results.csv"
    lines = [",".join(old), ",".join(row[name] for name in old)]
    path.write_text("\n".join(lines) + "\n")
    (read,) = store.read(path)
    assert read == row | {"mora_type": ""}
    again = {**known, "threads": 1, "candidate": cases.OURS, "median_us": 7.0}
    mora = cases.mora_case("mora", SHAPE, 1, 6)
    other = {**dict(zip(store.CASE, mora.key, strict=True)), "threads": 1, "candidate": cases.OURS}
    store.write(path, [again, other])
    assert [(row["op"], row["median_us"], row["mora_type"]) for row in store.read(path)] == [
        ("linear_4bit", "7", ""),  # replaced
        ("mora", "", "6"),
    ]


def committed(path: Path) -> None:
    """What a measurement of one's own has written there is no part of the repository yet."""
    own = _git("status", "--porcelain", "--untracked-files=all", "--", str(path))
    if own:
        pytest.skip(f"measured and not committed: {' '.join(own.split())}")


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*/results.csv")), ids=str)
def test_the_results_in_the_repository_read(path: Path) -> None:
    committed(path.parent)
    rows, memory_rows = store.read(path), store.read(path.with_name("memory.csv"))
    assert report.markdown(rows).startswith("Measured on")
    assert "LoRA r=16" in report.memory_markdown(memory_rows)
    assert "`lora_linear`, r = 16" in report.summary(rows, memory_rows)
    assert any(report.measured(goal, rows) for goal in cases.GOALS)


def test_the_documents_hold_what_the_csv_holds() -> None:
    """`python -m bench.report --write` was run after the last measurement."""
    committed(ROOT / "bench" / "results")
    numbers, summary = report.documents()
    assert (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8") == numbers
    assert summary in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_table_holds_comparable_rows_alone() -> None:
    case = Case("linear_4bit", cases.LLAMA[0], 1, cold=True)
    row = written(case, cases.OURS, threads="2", median_us="100", ratio="1", machine="one")
    others = [
        row | {"threads": "1"},
        row | {"dtype": "fp32"},
        row | {"blocksize": "128"},
        row | {"quant_type": "fp4"},
        row | {"status": "wrong"},
    ]
    assert report.comparable([row, row | {"candidate": cases.DENSE}, *others]) == [
        row,
        row | {"candidate": cases.DENSE},
    ]
    assert report.markdown(others[1:]) == report.summary(others[1:], []) == ""


def test_the_nearest_peer_is_shown() -> None:
    """Every peer that is measured has a column."""
    case = Case("lora_linear", cases.LLAMA[0], 1, cold=True)
    values = {"threads": "2", "median_us": "100", "ratio": "1.25", "peak_share": "0.5"}
    names = (cases.OURS, cases.DENSE, cases.PEFT, cases.PEFT_EVAL)
    rows = [written(case, name, kind="peer", path="its path", **values) for name in names]
    assert "| 1.25× | 1.25× | 1.25× |" in report.markdown(rows)
    assert "| `lora_linear`, r = 16 | 1 | 100.0 µs |  | 50% | 1.25× | 1.25× | 1.25× |" in report.summary(
        rows, []
    )


def written(case: Case, candidate: str, **values: str) -> dict[str, str]:
    row = {name: str(value) for name, value in zip(store.CASE, case.key, strict=True)}
    return dict.fromkeys(store.COLUMNS, "") | row | {"status": "ok", "candidate": candidate} | values


def test_mora_goals_read_their_types() -> None:
    square = cases.LLAMA[0]
    rows = [
        written(cases.mora_case("mora_linear", square, 64, 1), cases.LINEAR, ratio="0.8"),
        written(cases.mora_case("mora_linear", square, 64, 6), cases.LINEAR, ratio="0.5"),
        written(dataclasses.replace(cases.mora_case("mora_linear", square, 64, 2), rank=16), cases.LINEAR),
        written(cases.mora_case("mora", square, 512, 6), cases.EAGER, ratio="4"),
    ]
    found = {
        (goal.op, goal.types, goal.peer): report.measured(goal, rows)
        for goal in cases.GOALS
        if report.measured(goal, rows)
    }
    assert found == {
        ("mora_linear", (1, 2, 3, 4), cases.LINEAR): {("4096x4096", 64, 1): 1.25},
        ("mora_linear", (6,), cases.LINEAR): {("4096x4096", 64, 6): 2.0},
        ("mora", (1, 6), cases.EAGER): {("4096x4096", 512, 6): 4.0},
    }
    text = report.markdown(
        [
            rows[0] | {"median_us": "80"},
            rows[0] | {"candidate": cases.OURS, "median_us": "100", "ratio": "1"},
            rows[0] | {"candidate": cases.EAGER, "ratio": "3"},
        ]
    )
    assert "| 4096×4096 | 1 | 256 | 64 | cold | 100.0 µs | 1.25× | 3.00× |" in text
    assert "| N×K | type | r̂ | M | weights | peftkern | over linear_4bit | torch eager |" in text


def test_memory_goal_counts_elements_beyond_x() -> None:
    step = cases.mora_case("memory", cases.LLAMA[0], 512, 3, cold=False)
    goal = next(goal for goal in cases.GOALS if goal.metric == "kept")
    z, x = 2 * 512 * 256, 2 * 512 * 4096
    row = written(step, cases.OURS, kept_bytes=str(z + x), input_bytes=str(x), peak_bytes="0")
    assert report.measured(goal, [row]) == {("4096x4096", 512, 3): 1.0}
    assert report.met(goal, 1.0)
    assert not report.met(goal, 1.1)
    assert "MoRA type 3 r̂=256" in report.memory_markdown([row])


@pytest.mark.parametrize("mora_type", cases.MORA_TYPES)
@pytest.mark.parametrize("who", memory.WHO["mora_linear_step"])
def test_memory_of_mora_runs_the_step(who: str, mora_type: int) -> None:
    if who == cases.BNB_EAGER:
        pytest.importorskip("bitsandbytes", reason="the peer is bitsandbytes")
    case, inputs = setup("mora_linear_step", M=5, mora_type=mora_type)
    forward, known = memory._parameters(who, case, describe())
    x = inputs.x.clone().requires_grad_()
    y, kept = memory.saved_bytes(lambda: forward(x), known)
    y.backward(inputs.dy)
    if who != cases.LORA:
        expected = inputs.references
        assert gate.check((y, x.grad), expected[:2], x.dtype, SHAPE.K * 4, 3.0) is None
    if who == cases.OURS:
        held = kept.pop(x.untyped_storage().data_ptr(), 0)
        assert (held == x.nbytes) == (mora_type == 6)  # only there it is needed again
        beyond = 0 if mora_type == 6 else 2 * case.M * case.side
        assert sum(kept.values()) == beyond


def test_words_of_the_command_line_choose_cases() -> None:
    chosen = run.choose("mora_linear", "", "1,64", "cold", "bf16", None, "nf4", 64, "6")
    square = cases.LLAMA[0]
    assert chosen == [cases.mora_case("mora_linear", square, M, 6) for M in (1, 64)]
    assert {case.rank for case in run.choose("lora_linear", "", "", "cold", "bf16", None, "nf4", 64)} == {16}
    assert {case.rank for case in run.choose("mora", "", "", "cold", "bf16", 4, "nf4", 64)} == {4}
    with pytest.raises(run.typer.BadParameter, match="type: expected some of 1, 2, 3, 4, 6, got '5'"):
        run.choose("mora", "", "", "cold", "bf16", None, "nf4", 64, "5")
    for beside in ({"op": "mora"}, {"goals": True}):
        with pytest.raises(run.typer.BadParameter, match="--full measures every case: expected no other"):
            run.main(full=True, **beside)
    timed, steps = run.choose_goals("mora_linear,memory", "", "1,512", "1")
    assert timed == [cases.mora_case("mora_linear", square, M, 1) for M in (1, 512)]
    assert steps == [cases.mora_case("mora_linear_step", square, 512, 1, cold=False)]
    every, _ = run.choose_goals("", "", "", "")
    assert set(every) == {case for case in cases.goal_cases() if case.op != "memory"}
    assert "mora 4096x4096 M=512 type 6 r=8 r̂=256 bf16 cold" in {case.title for case in every}


def test_goals_read_the_right_rows() -> None:
    base = dict(zip(store.CASE, Case("linear_4bit", cases.LLAMA[0], 1, True).key, strict=True))
    row = {name: str(value) for name, value in base.items()} | {"status": "ok"}
    rows = [row | {"candidate": cases.READ, "ratio": "0.8"}, row | {"candidate": cases.DENSE, "ratio": "3.5"}]
    over = next(goal for goal in cases.GOALS if goal.peer == cases.READ and goal.cold)
    ratio = next(goal for goal in cases.GOALS if goal.peer == cases.DENSE)
    assert report.measured(over, rows) == {("4096x4096", 1, 0): 1.25}
    assert report.met(over, 1.25)
    assert report.measured(ratio, rows) == {("4096x4096", 1, 0): 3.5}
    assert not report.met(ratio, 3.2)


def test_saved_bytes_counts_each_storage_once() -> None:
    x, w = torch.ones(8, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    _, kept = memory.saved_bytes(lambda: (x @ w) * (x @ w), [w])
    assert sum(kept.values()) == x.nbytes + 2 * 8 * 4 * 4  # x once, both products, never w


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
