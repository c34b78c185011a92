"""python -m bench.plot results.csv: draws from the CSV, time ratios and throughput over M."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import cases, store
from bench.store import Row

COLOURS = {
    cases.OURS: "#1b7837",
    cases.LINEAR: "#7fbf7b",
    cases.DENSE: "#2166ac",
    cases.DENSE_F32: "#92c5de",
    cases.BNB: "#b2182b",
    cases.BNB_EVAL: "#ef8a62",
    cases.INT4PACK: "#762a83",
    cases.PEFT: "#b35806",
    "peft + bnb packed eval": "#fdb863",
    cases.EAGER: "#4393c3",
    cases.COMPILED: "#c51b7d",
    cases.BNB_EAGER: "#d6604d",
    cases.LORA: "#bf812d",
    cases.PEAK: "#000000",
}


def _panels(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """(op, shape, MoRA's type) → its bf16 NF4 cold rows, for every panel with two values of M at least."""
    panels: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        plain = (row["status"], row["cache"], row["dtype"], row["quant_type"], row["blocksize"])
        if plain == ("ok", "cold", "bf16", "nf4", "64") and int(row["M"]):
            panels.setdefault((row["op"], row["shape"], row["mora_type"]), []).append(row)
    many = {key: found for key, found in panels.items() if len({row["M"] for row in found}) > 1}
    order = {op: i for i, op in enumerate(cases.OPS)}
    return dict(sorted(many.items(), key=lambda item: (order[item[0][0]], _size(item[0][1]), item[0][2])))


def _size(shape: str) -> int:
    N, K = shape.split("x")
    return -int(N) * int(K)


def _draw(
    panels: dict[tuple[str, str, str], list[Row]], column: str, label: str, title: str, path: Path
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "peftkern"  # the same numbers give the same file
    import matplotlib.pyplot as plt

    across = min(3, len(panels))
    down = -(-len(panels) // across)
    width = max(7.5, 4.4 * across)
    columns = int(width / 1.8)
    names = {row["candidate"] for rows in panels.values() for row in rows}
    legend = 0.2 + 0.2 * -(-len(names) // columns)  # inches
    height = 0.5 + 2.8 * down + legend
    figure, axes = plt.subplots(down, across, figsize=(width, height), squeeze=False)
    handles: dict[str, Any] = {}
    for axis, ((op, shape, kind), rows) in zip(axes.flat, panels.items(), strict=False):
        for name, colour in COLOURS.items():
            points = sorted(
                (int(row["M"]), float(row[column]))
                for row in rows
                if row["candidate"] == name and row[column] and (name != cases.PEAK or column == "gflop_s")
            )
            if not points:
                continue
            line = axis.plot(
                *zip(*points, strict=True),
                color=colour,
                marker="" if name == cases.PEAK else "o",
                markersize=3.5,
                linewidth=2 if name == cases.OURS else 1.3,
                linestyle=":" if name == cases.PEAK else "-",
                label=name,
            )[0]
            handles.setdefault(name, line)
        if column == "ratio":
            axis.axhline(1, color=COLOURS[cases.OURS], linewidth=0.8)
        mora_type = f" type {kind}" if kind else ""
        axis.set_title(f"{op}{mora_type} {shape.replace('x', '×')}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=10)
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
        axis.tick_params(labelsize=8)
        ticks = sorted({int(row["M"]) for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        if column == "ratio":
            low, high = axis.get_ylim()
            marks = [mark for mark in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if low <= mark <= high]
            axis.set_yticks(marks, [f"{mark:g}×" for mark in marks])
    for axis in axes[-1]:
        axis.set_xlabel("M, tokens", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel(label, fontsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="lower center",
        ncols=min(columns, len(handles)),
        fontsize=8,
    )
    figure.tight_layout(rect=(0, legend / height, 1, 1))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)
    plt.close(figure)


def draw(csv: Path, folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draws what the CSV has and returns the files written: none where no case has two values of M."""
    rows = store.read(csv)
    panels = _panels(rows)
    if not panels:
        return []
    some = next(iter(panels.values()))[0]
    where = f"{some['machine']}, {some['threads']} threads, {some['isa']}, bf16, NF4, weights from memory"
    figures = {
        "speedup": ("ratio", "time / peftkern's", f"Time of each candidate over peftkern's\n{where}"),
        "throughput": ("gflop_s", "GFLOP/s", f"Throughput\n{where}"),
    }
    written: list[Path] = []
    for name, (column, label, title) in figures.items():
        path = folder / f"{name}{suffix}"
        _draw(panels, column, label, title, path)
        written.append(path)
    return written


def main(
    csv: Annotated[Path, typer.Argument(help="a results.csv of bench.run")],
    out: Annotated[Path | None, typer.Option(help="folder; the CSV's own when left out")] = None,
    suffix: Annotated[str, typer.Option(help=".svg or .png")] = ".svg",
) -> None:
    """Draw the CSV's numbers."""
    for path in draw(csv, out or csv.parent, suffix):
        print(path)


if __name__ == "__main__":
    typer.run(main)
