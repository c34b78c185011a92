"""python -m bench.report: the CSV as Markdown: all of it for docs/numbers.md, a few rows for README.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import cases, store
from bench.cases import Case, Goal
from bench.machine import ROOT
from bench.store import Row

BEGIN, END = (
    "<!-- numbers: written by `python -m bench.report --write`, don't edit -->",
    "<!-- end of numbers -->",
)
PEERS = (
    cases.DENSE,
    cases.DENSE_F32,
    cases.BNB,
    cases.BNB_EVAL,
    cases.INT4PACK,
    cases.PEFT,
    cases.PEFT_EVAL,
    cases.EAGER,
    cases.COMPILED,
    cases.BNB_EAGER,
    cases.LORA,
)
# README.md's table, of weights 4096×4096 from memory: what it says, op, MoRA's type, M
SUMMARY = (
    ("`linear_4bit`", "linear_4bit", 0, (1, 4, 16, 64, 512)),
    ("`lora_linear`, r = 16", "lora_linear", 0, (1, 64, 512)),
    ("LoRA's training step", "train_step", 0, (64, 512)),
    ("`mora_linear`, type 1, r̂ = 256", "mora_linear", 1, (1, 64, 512)),
    ("`mora_linear`, type 6, r̂ = 256", "mora_linear", 6, (1, 64, 512)),
    ("MoRA's training step, type 1", "mora_linear_step", 1, (64, 512)),
    ("MoRA's training step, type 6", "mora_linear_step", 6, (64, 512)),
)
# its columns: who stands there for one op or another
SUMMARY_PEERS = {
    "torch, dense W": (cases.DENSE, cases.EAGER),
    "bitsandbytes": (cases.BNB, cases.PEFT, cases.BNB_EAGER),
    "bitsandbytes, repacked for inference": (cases.BNB_EVAL, cases.PEFT_EVAL),
    "torch int4pack": (cases.INT4PACK,),
}
NUMBERS = """\
<!-- written by `python -m bench.report --write`, don't edit -->

# Numbers

All that was measured, from the CSV files under [bench/results](../bench/results). A peer's column says how
many times longer it takes than peftkern: the median over the rounds of one process in which all candidates
take turns, each on its own copies of the weight, after its result has passed the gate. cold: the weights come
from memory; hot: from the caches. *of read*: of the rate at which the machine reads memory; *of peak*: of its
multiply-adds, both measured in the same rounds. *over linear_4bit*: the product without its adapter takes 1.
What the numbers mean: [performance.md](performance.md).
"""


def _case(row: Row) -> Case:
    N, K = (int(side) for side in row["shape"].split("x"))
    numbers = int(row["rank"]), row["quant_type"], int(row["blocksize"]), int(row["mora_type"] or 0)
    shape = cases.Shape(N, K, "")
    return Case(row["op"], shape, int(row["M"]), row["cache"] == "cold", row["dtype"], *numbers)


def kept(row: Row) -> float:
    """Elements that backward keeps beyond x, in M·r̂, of a row of memory."""
    case, size = _case(row), cases.BYTES[row["dtype"]]
    return (float(row["kept_bytes"]) - float(row["input_bytes"])) / (size * case.M * case.side)


def measured(goal: Goal, rows: Iterable[Row]) -> dict[tuple[str, int, int], float]:
    """(shape, M, MoRA's type or 0) → what this goal speaks of, for every row that has it."""
    found: dict[tuple[str, int, int], float] = {}
    cache = "cold" if goal.cold else "hot"
    for row in rows:
        if (row["op"], row["cache"], row["dtype"], row["status"]) != (goal.op, cache, "bf16", "ok"):
            continue
        if row["shape"] not in goal.shapes or int(row["M"]) not in goal.M:
            continue
        case = _case(row)
        if case.mora_type not in goal.types:
            continue
        if (case.quant_type, case.blocksize) != ("nf4", 64):
            continue
        if case.rank != cases.default_rank(case.op, case.mora_type):
            continue
        if goal.metric == "kept":
            if row["candidate"] == goal.peer:
                found[row["shape"], case.M, case.mora_type] = kept(row)
            continue
        name, column = {
            "ratio": (goal.peer, "ratio"),
            "over": (goal.peer, "ratio"),
            "share": (cases.OURS, "peak_share"),
            "us": (cases.OURS, "median_us"),
        }[goal.metric]
        value = store.number(row, column)
        if row["candidate"] == name and value:
            over = goal.metric == "over"
            found[row["shape"], case.M, case.mora_type] = 1 / value if over else value
    return found


def met(goal: Goal, value: float) -> bool:
    return value >= goal.value if goal.metric in ("ratio", "share") else value <= goal.value


def _show(goal: Goal, value: float) -> str:
    return {
        "ratio": f"{value:.2f}×",
        "over": f"{value:.2f}×",
        "share": f"{value:.0%}",
        "us": f"{value:.1f} µs",
        "kept": f"{value:.2f} M·r̂",
    }[goal.metric]


def _asks(goal: Goal) -> str:
    sign = "≥" if goal.metric in ("ratio", "share") else "≤"
    subject = {"share": "of peak", "us": "a call", "kept": "kept beyond x"}.get(
        goal.metric, f"vs {goal.peer}"
    )
    return f"{sign} {_show(goal, goal.value)} {subject}"


def goals_table(rows: Sequence[Row], isa: str, ops: Collection[str]) -> Table:
    table = Table(
        title=f"goals (stated for AVX-512 + AMX, 2 threads, bf16) beside this machine's {isa}",
        title_justify="left",
    )
    for name in ("op", "M", "cache", "goal"):
        table.add_column(name)
    table.add_column("measured, by shape and M")
    table.add_column("reached", justify="right")
    for goal in cases.GOALS:
        if goal.op not in ops:
            continue
        found = measured(goal, rows)
        parts = [
            f"[{'green' if met(goal, value) else 'red'}]"
            f"{shape}{f' type {kind}' if kind else ''} M={M}: {_show(goal, value)}[/]"
            for (shape, M, kind), value in sorted(found.items())
        ]
        reached = sum(met(goal, value) for value in found.values())
        table.add_row(
            goal.op + (f" type {', '.join(map(str, goal.types))}" if any(goal.types) else ""),
            "–".join(dict.fromkeys((str(goal.M[0]), str(goal.M[-1])))) if goal.M[0] else "",
            "cold" if goal.cold else "hot",
            _asks(goal),
            "\n".join(parts) or "not measured",
            f"{reached}/{len(found)}",
        )
    return table


def print_goals(
    console: Console, rows: Sequence[Row], isa: str, ops: Collection[str] = (*cases.OPS, "memory")
) -> None:
    console.print(goals_table(rows, isa, ops))


def _time(row: Row) -> str:
    value = float(row["median_us"])
    return f"{value:.1f} µs" if value < 1000 else f"{value / 1000:.3g} ms"


def comparable(rows: Iterable[Row]) -> list[Row]:
    """Those that one table may hold: bf16, NF4 in blocks of 64, the usual rank, one number of threads."""
    kept = []
    for row in rows:
        if row["status"] != "ok":
            continue
        case = _case(row)
        if (case.dtype, case.quant_type, case.blocksize) != ("bf16", "nf4", 64):
            continue
        if case.rank == cases.default_rank(case.op, case.mora_type):
            kept.append(row)
    threads = Counter(row["threads"] for row in kept).most_common(1)
    return [row for row in kept if row["threads"] == threads[0][0]]


def _measured_on(rows: Sequence[Row]) -> str:
    row = rows[0]
    cache = f"{row['llc_mib']} MiB last-level cache"
    machine = f"{row['machine']}, {row['threads']} threads, ISA {row['isa']}, {cache}"
    return f"{machine}; {row['versions']}; bf16, NF4, blocksize 64"


def _grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def _order(row: Row) -> tuple[int, int, str, str, int]:
    """Shapes as cases.py has them, others last and by size; then type, cold before hot, M."""
    known = [shape.name for group in cases.MODELS.values() for shape in group]
    shape = _case(row).shape
    place = known.index(shape.name) if shape.name in known else len(known)
    return place, shape.N * shape.K, row["mora_type"], row["cache"], int(row["M"])


def _ratio(row: Row | None) -> str:
    return "" if row is None else f"{float(row['ratio']):.2f}×"


def _over(bare: Row | None) -> str:
    return "" if bare is None else f"{1 / float(bare['ratio']):.2f}×"


def _table(op: str, rows: Sequence[Row]) -> list[str]:
    """All cases of an op: peftkern's time, and how many times longer each peer takes."""
    names = [name for name in PEERS if any(row["candidate"] == name for row in rows)]
    shares = {"read_share": "of read", "peak_share": "of peak"}
    shares = {name: head for name, head in shares.items() if any(row[name] for row in rows)}
    typed = any(row["mora_type"] for row in rows)
    over = any(row["candidate"] == cases.LINEAR for row in rows)
    heads = ["N×K", *(["type", "r̂"] if typed else []), "M", "weights", "peftkern"]
    heads += [*(["over linear_4bit"] if over else []), *shares.values(), *names]
    lines = []
    for key in dict.fromkeys(store.key(row) for row in sorted(rows, key=_order)):
        by_name = {row["candidate"]: row for row in rows if store.key(row) == key}
        ours = by_name.get(cases.OURS)
        if ours is None:
            continue
        cells = [ours["shape"].replace("x", "×")]
        cells += [ours["mora_type"], str(_case(ours).side)] if typed else []
        cells += ["" if ours["M"] == "0" else ours["M"], ours["cache"], _time(ours)]
        cells += [_over(by_name.get(cases.LINEAR))] if over else []
        cells += [f"{float(ours[share]):.0%}" if ours[share] else "" for share in shares]
        cells += [_ratio(by_name.get(name)) for name in names]
        lines.append(cells)
    paths = {name: dict.fromkeys(row["path"] for row in rows if row["candidate"] == name) for name in names}
    took = [f"- {name}: {'; '.join(path)}" for name, path in paths.items()]
    return [f"## {op}", "", f"{cases.OP_MEANING[op]}.", "", *_grid(heads, lines), "", *took, ""]


def markdown(rows: Sequence[Row]) -> str:
    """A table for each operation."""
    rows = comparable(rows)
    if not rows:
        return ""
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    lines = [f"Measured on {_measured_on(rows)}; commits {commits}.", ""]
    for op in cases.OPS:
        mine = [row for row in rows if row["op"] == op]
        if mine:
            lines += _table(op, mine)
    return "\n".join(lines)


def summary(rows: Sequence[Row], memory: Sequence[Row]) -> str:
    """The few of them that README.md shows."""
    rows = [row for row in comparable(rows) if (row["shape"], row["cache"]) == ("4096x4096", "cold")]
    lines = []
    for label, op, kind, tokens in SUMMARY:
        for M in tokens:
            case = (op, str(kind or ""), str(M))
            found = {r["candidate"]: r for r in rows if (r["op"], r["mora_type"], r["M"]) == case}
            ours = found.get(cases.OURS)
            if ours is None:
                continue
            peers = [
                next((found[name] for name in names if name in found), None)
                for names in SUMMARY_PEERS.values()
            ]
            share = f"{float(ours['peak_share']):.0%}" if ours["peak_share"] else ""
            cells = [label, str(M), _time(ours), _over(found.get(cases.LINEAR)), share]
            lines.append([*cells, *(_ratio(peer) for peer in peers)])
    if not lines:
        return ""
    heads = ["W 4096×4096", "M", "peftkern", "over linear_4bit", "of peak", *SUMMARY_PEERS]
    text = [f"{_measured_on(rows)}.", "", *_grid(heads, lines), ""]
    steps = [row for row in memory if row["mora_type"] in ("", "1") and row["candidate"] != cases.LORA]
    if steps:
        lines = [[_adapter(row), row["candidate"], *_sizes(row, "kept_bytes", "peak_bytes")] for row in steps]
        heads = [f"training step, M = {steps[0]['M']}", "", "kept for backward", "peak above the weights"]
        text += [*_grid(heads, lines), ""]
    return "\n".join(text)


def _adapter(row: Row) -> str:
    case = _case(row)
    return f"MoRA type {case.mora_type} r̂={case.side}" if case.mora_type else f"LoRA r={case.rank}"


def _sizes(row: Row, *names: str) -> list[str]:
    return [f"{float(row[name]) / 2**20:.2f} MiB" for name in names]


def memory_markdown(rows: Sequence[Row]) -> str:
    cells = [
        [
            _adapter(row),
            row["candidate"],
            row["shape"].replace("x", "×"),
            row["M"],
            *_sizes(row, "kept_bytes", "input_bytes", "peak_bytes"),
        ]
        for row in sorted(rows, key=_order)
        if row["status"] == "ok"
    ]
    heads = ["adapter", "", "N×K", "M", "kept for backward", "of it x", "peak above the weights"]
    return "\n".join(["## memory", "", "Of one training step.", "", *_grid(heads, cells), ""])


def _files() -> list[Path]:
    return sorted((ROOT / "bench" / "results").glob("*/results.csv"))


def documents(files: Sequence[Path] | None = None) -> tuple[str, str]:
    """docs/numbers.md, and what stands in README.md between its markers; of all machines by default."""
    full, few = [NUMBERS], []
    for file in _files() if files is None else files:
        rows, memory = store.read(file), store.read(file.with_name("memory.csv"))
        full.append(markdown(rows))
        few.append(summary(rows, memory))
        if memory:
            full.append(memory_markdown(memory))
        speedup = file.with_name("speedup.svg")
        if speedup.exists() and speedup.is_relative_to(ROOT):
            full.append(f"![time of each peer over peftkern's, by M](../{speedup.relative_to(ROOT)})\n")
    return "\n".join(full), "\n".join(few)


def main(
    csv: Annotated[Path | None, typer.Argument(help="a results.csv; all machines' when left out")] = None,
    write: Annotated[bool, typer.Option("--write", help="into docs/numbers.md and README.md")] = False,
    goals: Annotated[bool, typer.Option("--goals", help="the goals beside the numbers instead")] = False,
) -> None:
    """Print the measured numbers as Markdown."""
    files = [csv] if csv else _files()
    if not files or not all(file.exists() for file in files):
        raise typer.BadParameter("csv: no results.csv found; `make bench` writes one")
    if goals:
        for file in files:
            rows = [*store.read(file), *store.read(file.with_name("memory.csv"))]
            print_goals(Console(), rows, rows[0]["isa"] if rows else "?")
        return
    numbers, summaries = documents(files)
    if not write:
        print(numbers)
        return
    path = ROOT / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    if END not in rest:
        raise typer.BadParameter("README.md has lost the markers of its numbers")
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{summaries}\n{END}{after}", encoding="utf-8")
    (ROOT / "docs" / "numbers.md").write_text(numbers, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
