"""python -m bench.run: checks every candidate against the reference, then measures them side by side.

A round times each candidate of a case once, in turn, so that whatever slows the machine slows all of them; a
ratio is the median over the rounds of time / peftkern's time in the same round. Cold: each call takes the
next of many copies of the weight, three last-level caches in all, so its bytes come from memory. Hot: one
copy, touched just before.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import cases, gate, memory, peers, report, store
from bench.cases import Case
from bench.machine import ROOT, Machine, describe
from bench.peers import Candidate

MIN_ROUNDS, MAX_ROUNDS = 7, 61
TURN_S = 2e-3  # a candidate's turn in a round lasts at least this long
console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)


@dataclass
class Timing:
    """Seconds a call, one for each round."""

    rounds: list[float] = field(default_factory=list)
    calls: int = 1
    problem: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def quartile(self, share: float) -> float:
        ordered = sorted(self.rounds)
        return ordered[round(share * (len(ordered) - 1))]


def verify(candidate: Candidate, case: Case) -> str | None:
    """Runs the first and the last copy; None when both are right."""
    inner = max(case.shape.N, case.shape.K, case.M)
    if case.mora_type:
        inner *= -(-case.shape.K // case.side)  # dM sums over the rows of every block
    for i in sorted({0, candidate.copies - 1}):
        result = candidate.call(i)
        if candidate.expected is None:
            continue
        problem = gate.check(result, candidate.expected(), peers.DTYPES[case.dtype], inner, candidate.slack)
        if problem:
            return problem
    return None


def measure(
    candidates: Sequence[Candidate], case: Case, seconds: float, rounds: int = MIN_ROUNDS
) -> list[Timing]:
    """Interleaved timings. A candidate whose result is wrong gets none; a ceiling has nothing to be wrong."""
    timings = [Timing(problem=verify(candidate, case)) for candidate in candidates]
    able = [(c, t) for c, t in zip(candidates, timings, strict=True) if t.problem is None]
    turn: dict[str, int] = {c.name: 0 for c, _ in able}

    def call(candidate: Candidate) -> None:
        turn[candidate.name] = (turn[candidate.name] + 1) % candidate.copies
        candidate.call(turn[candidate.name])

    estimates: list[float] = []
    for candidate, timing in able:
        start = time.perf_counter()
        call(candidate)
        estimate = time.perf_counter() - start
        timing.calls = max(1, min(500, round(TURN_S / max(estimate, 1e-6))))
        estimates.append(estimate * (timing.calls + 1))
    wanted = int(seconds / max(sum(estimates), 1e-6))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(max(rounds, min(wanted, max(MAX_ROUNDS, rounds)))):
            for candidate, timing in able if number % 2 == 0 else able[::-1]:
                call(candidate)  # wakes the threads, and warms the one copy of a hot case
                calls = range(timing.calls)
                start = time.perf_counter()
                for _ in calls:
                    call(candidate)
                timing.rounds.append((time.perf_counter() - start) / timing.calls)
    finally:
        if collecting:
            gc.enable()
    return timings


def rows_of(
    case: Case, candidates: Sequence[Candidate], timings: Sequence[Timing], machine: Machine
) -> list[dict[str, object]]:
    """The lines of the CSV."""
    by_name = {c.name: (c, t) for c, t in zip(candidates, timings, strict=True) if t.rounds}
    base = by_name[cases.OURS][1] if cases.OURS in by_name else None
    read = by_name.get(cases.READ)
    peak = by_name.get(cases.PEAK)
    rows: list[dict[str, object]] = []
    for candidate, timing in zip(candidates, timings, strict=True):
        row: dict[str, object] = {**dict(zip(store.CASE, case.key, strict=True)), "candidate": candidate.name}
        row |= {"kind": candidate.kind, "path": candidate.path}
        row["observed"] = candidate.observed
        row |= {"bytes": candidate.bytes, "flops": candidate.flops, "status": timing.problem or "ok"}
        if timing.rounds:
            seconds = timing.median
            row |= {
                f"{name}_us": timing.quartile(share) * 1e6 for name, share in (("p25", 0.25), ("p75", 0.75))
            }
            row |= {"median_us": seconds * 1e6, "min_us": min(timing.rounds) * 1e6}
            row |= {"rounds": len(timing.rounds), "calls": timing.calls}
            row |= {"gb_s": candidate.bytes / seconds / 1e9, "gflop_s": candidate.flops / seconds / 1e9}
            if read and candidate.kind != "ceiling":
                row["read_share"] = candidate.bytes / seconds / (read[0].bytes / read[1].median)
            if peak and candidate.kind != "ceiling":
                row["peak_share"] = candidate.flops / seconds / (peak[0].flops / peak[1].median)
            if base:
                ratios = [theirs / own for theirs, own in zip(timing.rounds, base.rounds, strict=True)]
                row["ratio"] = statistics.median(ratios)
        rows.append(row | machine.columns())
    return rows


def format_time(microseconds: float) -> str:
    return f"{microseconds:.1f} µs" if microseconds < 1000 else f"{microseconds / 1000:.3g} ms"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def table_of(case: Case, rows: Sequence[dict[str, object]]) -> Table:
    table = Table(title=case.title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    table.add_column("", min_width=22, no_wrap=True)
    for name in ("time", "25–75 %", "GB/s", "GFLOP/s", "of read", "of peak", "time / ours"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("path taken", overflow="fold")
    for raw in rows:
        row = {name: store._text(value) for name, value in raw.items()}
        style = {"ours": "bold green", "ceiling": "dim"}.get(row["kind"], "")
        if row["status"] != "ok":
            table.add_row(row["candidate"], "WRONG", "", "", "", "", "", "", row["status"], style="bold red")
            continue
        values = {name: float(row[name]) for name in ("median_us", "p25_us", "p75_us", "gb_s", "gflop_s")}
        low, high = format_time(values["p25_us"]).split(), format_time(values["p75_us"]).split()
        spread = f"{low[0] if low[1] == high[1] else ' '.join(low)}–{' '.join(high)}"
        table.add_row(
            row["candidate"],
            format_time(values["median_us"]),
            spread,
            f"{values['gb_s']:.1f}" if float(row["bytes"]) else "",
            f"{values['gflop_s']:.0f}" if float(row["flops"]) else "",
            _percent(store.number(row, "read_share")),
            _percent(store.number(row, "peak_share")),
            f"{float(row['ratio']):.2f}×" if row.get("ratio") else "",
            f"{row['path']}: {row['observed']}" if row["observed"] else row["path"],
            style=style,
        )
    return table


def run_case(
    case: Case, weights: peers.Weights, machine: Machine, wanted: tuple[str, ...], seconds: float, rounds: int
) -> tuple[list[dict[str, object]], dict[str, str]]:
    inputs = peers.Inputs(case, weights)
    candidates, missing = peers.build(inputs, wanted)
    for candidate in candidates:
        if candidate.kind == "peer" and candidate.name not in (cases.LINEAR, cases.LORA):
            with torch.set_grad_enabled(candidate.gradients or case.op == "dx"):
                candidate.observed = peers.observe(lambda run=candidate.call: run(0))  # type: ignore[misc]
    with torch.set_grad_enabled(case.op in cases.BACKWARD_OPS):
        timings = measure(candidates, case, seconds, rounds)
    return rows_of(case, candidates, timings, machine), missing


def run_memory(case: Case, machine: Machine) -> list[dict[str, object]]:
    """Bytes that one training step keeps for backward, and its peak. case.op: one that memory.WHO has."""
    table = Table(title=f"memory of a training step: {case.title}", title_justify="left", box=None)
    table.add_column("", min_width=22)
    for name in ("kept for backward", "of it x", "peak above weights"):
        table.add_column(name, justify="right")
    rows: list[dict[str, object]] = []
    key = replace(case, op="memory").key
    for who, result in memory.measure(case, machine.threads).items():
        row: dict[str, object] = {**dict(zip(store.CASE, key, strict=True)), "candidate": who}
        if isinstance(result, str):
            table.add_row(who, result, style="red")
            row["status"] = result
        else:
            names = ("kept_bytes", "input_bytes", "peak_bytes")
            table.add_row(who, *(f"{result[name] / 2**20:.2f} MiB" for name in names))
            row |= {"status": "ok", **result}
        rows.append(row | machine.columns())
    console.print(table)
    console.print()
    return rows


def _words(text: str, allowed: Sequence[str], what: str) -> list[str]:
    words = [word for word in text.replace(" ", "").split(",") if word]
    for word in words:
        if word not in allowed:
            raise typer.BadParameter(f"{what}: expected some of {', '.join(allowed)}, got {word!r}")
    return words


def _tokens(m: str) -> list[int]:
    words = m.replace(" ", "").split(",")
    if not all(word.isdigit() and int(word) for word in words):
        raise typer.BadParameter(f"m: expected positive numbers, got {m!r}")
    return [int(word) for word in words]


def _shapes(shape: str) -> list[cases.Shape]:
    try:
        return cases.shapes_by_name(shape)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _types(kind: str) -> list[int]:
    return [int(word) for word in _words(kind, [str(mora_type) for mora_type in cases.MORA_TYPES], "type")]


def choose(
    op: str,
    shape: str,
    m: str,
    cache: str,
    dtype: str,
    rank: int | None,
    quant: str,
    blocksize: int,
    kind: str = "",
) -> list[Case]:
    ops = _words(op, cases.OPS, "op") if op else list(cases.OPS)
    shapes = _shapes(shape) if shape else list(cases.LLAMA[:1])
    tokens = _tokens(m) if m else [1, 16, 64, 256]
    caches = {"cold": [True], "hot": [False], "both": [True, False]}
    if cache not in caches:
        raise typer.BadParameter(f"cache: expected cold, hot or both, got {cache!r}")
    types = _types(kind) if kind else [1, 6]
    return cases.select(ops, shapes, tokens, caches[cache], dtype, rank, quant, blocksize, types)


def choose_goals(op: str, shape: str, m: str, kind: str) -> tuple[list[Case], list[Case]]:
    """What the goals speak of, times and memory, narrowed to what is asked for."""
    ops = _words(op, (*cases.OPS, "memory"), "op") or [*cases.OPS, "memory"]
    shapes = [found.name for found in _shapes(shape)] if shape else None
    tokens, types = _tokens(m) if m else None, _types(kind) if kind else None
    found = [
        case
        for case in cases.goal_cases(ops)
        if (shapes is None or case.shape.name in shapes)
        and (tokens is None or case.M in tokens)
        and (types is None or case.mora_type in types)
    ]
    steps = [replace(case, op="mora_linear_step") for case in found if case.op == "memory"]
    return [case for case in found if case.op != "memory"], steps


def choose_memory(shape: str, m: str, rank: int | None, kind: str) -> list[Case]:
    """Training steps whose memory is measured, of one shape and M; MoRA's alone where types are asked."""
    where = _shapes(shape)[0] if shape else cases.LLAMA[0]
    found = cases.memory_cases(where, _tokens(m)[-1] if m else 512, _types(kind) if kind else (1, 6))
    if kind:
        found = [case for case in found if case.mora_type]
    return [replace(case, rank=rank or case.rank) for case in found]


def main(
    op: Annotated[str, typer.Option(help=f"some of {', '.join(cases.OPS)}, memory")] = "",
    shape: Annotated[str, typer.Option(help="llama, smollm2, tiny or NxK, separated by commas")] = "",
    m: Annotated[str, typer.Option(help="tokens, e.g. 1,16,64")] = "",
    cache: Annotated[str, typer.Option(help="cold, hot or both")] = "cold",
    dtype: Annotated[str, typer.Option(help="of x: bf16, fp16 or fp32")] = "bf16",
    rank: Annotated[int | None, typer.Option(help="of LoRA (16) or r of MoRA (8)", min=1)] = None,
    kind: Annotated[str, typer.Option("--type", help="MoRA's: some of 1, 2, 3, 4, 6")] = "",
    quant: Annotated[str, typer.Option(help="nf4 or fp4")] = "nf4",
    blocksize: Annotated[int, typer.Option(help="32 … 4096")] = 64,
    peer: Annotated[str, typer.Option(help=f"some of {', '.join(peers.BUILDERS)}, or none")] = "",
    threads: Annotated[int, typer.Option(help="0: as many as torch takes", min=0)] = 0,
    rounds: Annotated[int, typer.Option(help="at least so many", min=1)] = MIN_ROUNDS,
    seconds: Annotated[float, typer.Option(help="for one case, unless its fewest rounds last longer")] = 1.5,
    minutes: Annotated[
        float | None, typer.Option(help="begin no case after so long; 6 without arguments")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="every shape, M and cache state: hours")] = False,
    goals: Annotated[bool, typer.Option("--goals", help="measure what the goals speak of")] = False,
    out: Annotated[Path | None, typer.Option(help="folder of the CSV and the plots")] = None,
    write: Annotated[bool, typer.Option(help="write the CSV and the plots")] = True,
) -> None:
    """Measure peftkern beside its peers. Without arguments: the most telling cases, within minutes."""
    if dtype not in peers.DTYPES:
        raise typer.BadParameter(f"dtype: expected one of {', '.join(peers.DTYPES)}, got {dtype!r}")
    wanted = tuple(peers.BUILDERS)
    if peer:
        wanted = () if peer == "none" else tuple(_words(peer, list(peers.BUILDERS), "peer"))
    if threads:
        torch.set_num_threads(threads)
    narrowed = bool(op or shape or m or kind) or (cache, dtype, rank, quant, blocksize) != (
        "cold",
        "bf16",
        None,
        "nf4",
        64,
    )
    if full and (narrowed or goals):
        raise typer.BadParameter("--full measures every case: expected no other choice beside it")
    ops_asked = [word for word in op.replace(" ", "").split(",") if word]
    with_memory = not narrowed or "memory" in ops_asked
    ops_asked = [word for word in ops_asked if word != "memory"]
    memory_chosen = choose_memory(shape, m, rank, kind) if with_memory else []
    if goals:
        chosen, memory_chosen = choose_goals(op, shape, m, kind)
    elif full:
        chosen = cases.full_cases()
    elif narrowed:
        only_memory = with_memory and not ops_asked
        chosen = (
            []
            if only_memory
            else choose(",".join(ops_asked), shape, m, cache, dtype, rank, quant, blocksize, kind)
        )
    else:
        chosen, minutes = cases.default_cases(), 6.0 if minutes is None else minutes

    machine = describe()
    folder = out or ROOT / "bench" / "results" / machine.slug
    llc, ram = machine.llc_bytes >> 20, machine.memory_bytes >> 30
    console.print(f"[bold]{machine.cpu}[/], {machine.threads} threads on {machine.cores} cores", end="")
    console.print(f", {llc} MiB last-level cache, {ram} GiB")
    load = os.getloadavg()[0]
    if load > machine.cores / 2:
        console.print(
            f"other work keeps this machine busy (load {load:.1f}): no number is worth much", style="red"
        )
    console.print(f"peftkern {machine.commit}, ISA {machine.isa} ({machine.compiler}); {machine.versions}")
    console.print()

    started = time.monotonic()
    measured: list[dict[str, object]] = []
    measured_memory: list[dict[str, object]] = []
    left_out: list[Case] = []
    reasons: dict[str, None] = {}
    weights: peers.Weights | None = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.title)
            if minutes and time.monotonic() - started > minutes * 60:
                left_out.append(case)
                continue
            wants = (case.shape, peers.DTYPES[case.dtype], case.quant_type, case.blocksize, case.cold)
            try:
                if weights is None or weights.key != wants:
                    weights = None
                    weights = peers.Weights(
                        case.shape, case.dtype, case.quant_type, case.blocksize, case.cold, machine
                    )
                rows, missing = run_case(case, weights, machine, wanted, seconds, rounds)
            except peers.UnavailableError as reason:
                reasons[f"{case.title}: {reason}"] = None
                continue
            reasons |= {f"{who}, {case.op} {case.dtype}: {reason}": None for who, reason in missing.items()}
            measured += rows
            console.print(table_of(case, rows))
            console.print()
            if write:
                store.write(folder / "results.csv", rows)
            progress.advance(task)
    for case in memory_chosen:
        rows = run_memory(case, machine)
        measured_memory += rows
        if write:
            store.write(folder / "memory.csv", rows, store.MEMORY_COLUMNS)

    text = [{name: store._text(value) for name, value in row.items()} for row in measured]
    if goals:
        kept = [{name: store._text(value) for name, value in row.items()} for row in measured_memory]
        asked = set(_words(op, (*cases.OPS, "memory"), "op")) or {*cases.OPS, "memory"}
        report.print_goals(console, [*text, *kept], machine.isa, asked)
    for line in reasons:
        console.print(f"not measured: {line}", style="dim")
    if left_out:
        title = f"left out, {len(left_out)} of {len(chosen)} (--minutes {minutes:g})"
        console.print(f"{title}: {cases.summary(left_out)}", style="yellow")
    if write and measured:
        from bench import plot

        for file in plot.draw(folder / "results.csv", folder):
            console.print(f"wrote {_relative(file)}")
        console.print(f"wrote {_relative(folder / 'results.csv')}")
    wrong = [row for row in text if row["kind"] == "ours" and row["status"] != "ok"]
    if wrong:
        console.print(f"{len(wrong)} of peftkern's own results were wrong", style="bold red")
        raise typer.Exit(1)


def _relative(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    typer.run(main)
