"""python -m bench.report: the numbers of the CSV as Markdown, and into the README between its markers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import cases, store
from bench.cases import Goal
from bench.machine import ROOT
from bench.store import Row

BEGIN, END = (
    "<!-- numbers: written by `python -m bench.report --readme`, don't edit -->",
    "<!-- end of numbers -->",
)
PEERS = (cases.DENSE, cases.DENSE_F32, cases.BNB, cases.BNB_EVAL, cases.INT4PACK, cases.PEFT)


def measured(goal: Goal, rows: Iterable[Row]) -> dict[tuple[str, int], float]:
    """(shape, M) → what this goal speaks of, for every row that has it."""
    found: dict[tuple[str, int], float] = {}
    cache = "cold" if goal.cold else "hot"
    for row in rows:
        if (row["op"], row["cache"], row["dtype"], row["status"]) != (goal.op, cache, "bf16", "ok"):
            continue
        if row["shape"] not in goal.shapes or int(row["M"]) not in goal.M:
            continue
        if (row["quant_type"], row["blocksize"], row["rank"]) != ("nf4", "64", "16"):
            continue
        name, column = {
            "ratio": (goal.peer, "ratio"),
            "over": (goal.peer, "ratio"),
            "share": (cases.OURS, "peak_share"),
            "us": (cases.OURS, "median_us"),
        }[goal.metric]
        value = store.number(row, column)
        if row["candidate"] == name and value:
            found[row["shape"], int(row["M"])] = 1 / value if goal.metric == "over" else value
    return found


def met(goal: Goal, value: float) -> bool:
    return value >= goal.value if goal.metric in ("ratio", "share") else value <= goal.value


def _show(goal: Goal, value: float) -> str:
    return {
        "ratio": f"{value:.2f}×",
        "over": f"{value:.2f}×",
        "share": f"{value:.0%}",
        "us": f"{value:.1f} µs",
    }[goal.metric]


def _asks(goal: Goal) -> str:
    sign = "≥" if goal.metric in ("ratio", "share") else "≤"
    subject = {"share": "of peak", "us": "a call"}.get(goal.metric, f"vs {goal.peer}")
    return f"{sign} {_show(goal, goal.value)} {subject}"


def goals_table(rows: Sequence[Row], isa: str) -> Table:
    table = Table(
        title=f"goals (stated for AVX-512 + AMX, 2 threads, bf16) beside this machine's {isa}",
        title_justify="left",
    )
    for name in ("op", "M", "cache", "goal"):
        table.add_column(name)
    table.add_column("measured, by shape and M")
    table.add_column("reached", justify="right")
    for goal in cases.GOALS:
        found = measured(goal, rows)
        parts = [
            f"[{'green' if met(goal, value) else 'red'}]{shape} M={M}: {_show(goal, value)}[/]"
            for (shape, M), value in sorted(found.items())
        ]
        reached = sum(met(goal, value) for value in found.values())
        table.add_row(
            goal.op,
            "–".join(dict.fromkeys((str(goal.M[0]), str(goal.M[-1])))) if goal.M[0] else "",
            "cold" if goal.cold else "hot",
            _asks(goal),
            "\n".join(parts) or "not measured",
            f"{reached}/{len(found)}",
        )
    return table


def print_goals(console: Console, rows: Sequence[Row], isa: str) -> None:
    console.print(goals_table(rows, isa))


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
        heads = [
            "N×K",
            "M",
            "weights",
            "peftkern",
            *({"read_share": "of read", "peak_share": "of peak"}[s] for s in shares),
        ]
        lines += ["| " + " | ".join(heads + names) + " |", "|" + "---|" * (len(heads) + len(names))]
        for key in dict.fromkeys(store.key(row) for row in mine):
            by_name = {row["candidate"]: row for row in mine if store.key(row) == key}
            ours = by_name.get(cases.OURS)
            if ours is None:
                continue
            cells = [
                ours["shape"].replace("x", "×"),
                "" if ours["M"] == "0" else ours["M"],
            ]
            cells += [ours["cache"], _time(ours)]
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
        "**memory** of one training step, r = 16",
        "",
        "| | N×K | M | kept for backward | of it x | peak above the weights |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["status"] == "ok":
            sizes = [
                f"{float(row[name]) / 2**20:.2f} MiB" for name in ("kept_bytes", "input_bytes", "peak_bytes")
            ]
            lines.append(
                "| " + " | ".join([row["candidate"], row["shape"].replace("x", "×"), row["M"], *sizes]) + " |"
            )
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
        if goals:
            print_goals(Console(), rows, rows[0]["isa"] if rows else "?")
            continue
        parts.append(markdown(rows))
        memory = store.read(file.with_name("memory.csv"))
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
