"""python -m bench.report: the numbers of the CSV as Markdown, and into the README between its markers."""

from __future__ import annotations

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
    "<!-- numbers: written by `python -m bench.report --readme`, don't edit -->",
    "<!-- end of numbers -->",
)
PEERS = (
    cases.DENSE,
    cases.DENSE_F32,
    cases.BNB,
    cases.BNB_EVAL,
    cases.INT4PACK,
    cases.PEFT,
    cases.EAGER,
    cases.COMPILED,
    cases.BNB_EAGER,
    cases.LORA,
)


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


def markdown(rows: Sequence[Row]) -> str:
    """A table for each operation: peftkern's time, and how many times longer each peer takes."""
    ok = [row for row in rows if row["status"] == "ok" and row["dtype"] == "bf16"]
    lines: list[str] = []
    for row in ok[:1]:
        lines += [
            f"Measured on {row['machine']}, {row['threads']} threads, ISA {row['isa']},",
            f"{row['llc_mib']} MiB last-level cache; commits {', '.join(sorted({r['commit'] for r in ok}))};",
            f"{row['versions']}.",
            "bf16, NF4, blocksize 64, medians of interleaved rounds in one process; cold: weights",
            "from memory. A peer's column says how many times longer it takes.",
            "",
        ]
    for op in cases.OPS:
        mine = [row for row in ok if row["op"] == op]
        names = [name for name in PEERS if any(row["candidate"] == name for row in mine)]
        if not names:
            continue
        shares = [name for name in ("read_share", "peak_share") if any(row[name] for row in mine)]
        lines += [f"**{op}**: {cases.OP_MEANING[op]}", ""]
        typed = any(row["mora_type"] for row in mine)
        # LoRA over a 4-bit weight and MoRA: what the adapter adds to the bare product
        over = any(row["candidate"] == cases.LINEAR for row in mine)
        heads = [
            "N×K",
            *(["type", "r̂"] if typed else []),
            "M",
            "weights",
            "peftkern",
            *(["over linear_4bit"] if over else []),
            *({"read_share": "of read", "peak_share": "of peak"}[s] for s in shares),
        ]
        lines += ["| " + " | ".join(heads + names) + " |", "|" + "---|" * (len(heads) + len(names))]
        if typed:
            mine.sort(key=lambda row: (row["shape"], row["cache"], row["mora_type"], int(row["M"])))
        for key in dict.fromkeys(store.key(row) for row in mine):
            by_name = {row["candidate"]: row for row in mine if store.key(row) == key}
            ours = by_name.get(cases.OURS)
            if ours is None:
                continue
            cells = [ours["shape"].replace("x", "×")]
            cells += [ours["mora_type"], str(_case(ours).side)] if typed else []
            cells += ["" if ours["M"] == "0" else ours["M"], ours["cache"], _time(ours)]
            if over:
                bare = by_name.get(cases.LINEAR)
                cells.append(f"{1 / float(bare['ratio']):.2f}×" if bare else "")
            cells += [f"{float(ours[share]):.0%}" if ours[share] else "" for share in shares]
            for name in names:
                cells.append(f"{float(by_name[name]['ratio']):.2f}×" if name in by_name else "")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    paths = dict.fromkeys((row["candidate"], row["path"]) for row in ok if row["kind"] == "peer")
    if paths:
        lines += ["Paths taken:", ""]
        lines += [f"- {name}: {path}" for name, path in paths if name in PEERS]
    return "\n".join(lines).rstrip() + "\n"


def memory_markdown(rows: Sequence[Row]) -> str:
    lines = [
        "**memory** of one training step",
        "",
        "| adapter | | N×K | M | kept for backward | of it x | peak above the weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["status"] != "ok":
            continue
        case = _case(row)
        adapter = f"LoRA r={case.rank}"
        if case.mora_type:
            adapter = f"MoRA type {case.mora_type} r̂={case.side}"
        sizes = [
            f"{float(row[name]) / 2**20:.2f} MiB" for name in ("kept_bytes", "input_bytes", "peak_bytes")
        ]
        cells = [adapter, row["candidate"], row["shape"].replace("x", "×"), row["M"], *sizes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    csv: Annotated[Path | None, typer.Argument(help="a results.csv; all machines' when left out")] = None,
    readme: Annotated[bool, typer.Option("--readme", help="put the tables into README.md")] = False,
    goals: Annotated[bool, typer.Option("--goals", help="the goals beside the numbers instead")] = False,
) -> None:
    """Print the measured numbers as Markdown."""
    files = [csv] if csv else sorted((ROOT / "bench" / "results").glob("*/results.csv"))
    if not files or not all(file.exists() for file in files):
        raise typer.BadParameter("csv: no results.csv found; `make bench` writes one")
    parts: list[str] = []
    for file in files:
        rows = store.read(file)
        memory = store.read(file.with_name("memory.csv"))
        if goals:
            print_goals(Console(), [*rows, *memory], rows[0]["isa"] if rows else "?")
            continue
        parts.append(markdown(rows))
        if memory:
            parts.append(memory_markdown(memory))
        speedup = file.with_name("speedup.svg")
        if speedup.exists() and speedup.is_relative_to(ROOT):
            parts.append(f"![time of each peer over peftkern's, by M]({speedup.relative_to(ROOT)})\n")
    if goals:
        return
    text = "\n".join(parts)
    if not readme:
        print(text)
        return
    path = ROOT / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    if END not in rest:
        raise typer.BadParameter("README.md has lost the markers of its numbers")
    path.write_text(before + BEGIN + "\n\n" + text + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
