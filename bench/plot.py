"""python -m bench.plot results.csv: draws from the CSV, time ratios and throughput over M.

Of bench.gpu's CSV: a figure for each group of operations, with the ratios eager and captured, and the goals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import cases, goals, store
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
    cases.PEFT_EVAL: "#fdb863",
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


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "peftkern"  # the same numbers give the same file
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)
    _pyplot().close(figure)


def _draw(
    panels: dict[tuple[str, str, str], list[Row]], column: str, label: str, title: str, path: Path
) -> None:
    plt = _pyplot()
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
    _save(figure, path)


# file → title, operation, and its lines: (peer, ours)
_MORA = (1, 2, 3, 4, 6)
GPU_FIGURES: dict[str, tuple[str, str, tuple[tuple[str, str], ...]]] = {
    "forward": ("linear_4bit, forward", "linear", ()),
    "dx": ("linear_4bit, dX", "dx", ()),
    "lora": ("lora_linear, forward", "lora", ()),
    "training_step": ("lora_linear, training step", "lora_step", ()),
    **{
        f"{op}{suffix}": (f"mora_linear, {words}, {against}", op, tuple(peers))
        for op, words in (("mora", "forward"), ("mora_step", "training step"))
        for suffix, against, peers in (
            ("", "beside eager", [(f"eager type {kind}", f"{goals.OURS} type {kind}") for kind in _MORA]),
            (
                "_cost",
                "the linear without adapter beside it",
                [(goals.BARE, f"{goals.OURS} type {kind}") for kind in _MORA],
            ),
        )
    },
}
_PALETTE = ("#b2182b", "#2166ac", "#1b7837", "#b35806", "#762a83", "#4393c3")


def _shapes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows))


def _where(rows: Sequence[Row]) -> str:
    row = rows[0]
    return f"{row['device']}, bf16, NF4 with nested statistics, weights from memory; {row['commit']}"


def _gpu_ratios(rows: Sequence[Row], figure: str, path: Path) -> bool:
    """Peer / ours over M, a panel a shape: eager a line, captured dashed, the goal crosses. Whether there was
    anything to draw."""
    title, op, pairs = GPU_FIGURES[figure]
    table = goals.Table(rows)
    found = [row for row in table.by_key.values() if row["op"] == op]
    if not pairs:
        names = dict.fromkeys(row["candidate"] for row in found)
        pairs = tuple((name, goals.OURS) for name in names if name != goals.OURS)
    panels: dict[str, dict[tuple[str, str], dict[str, list[tuple[int, float]]]]] = {}
    for shape in _shapes(found):
        tokens = sorted({int(row["M"]) for row in found if row["shape"] == shape})
        for peer, ours in pairs:
            for way in ("eager", "graph"):
                ratios = ((M, table.ratio(op, shape, M, peer, ours, way)) for M in tokens)
                points = [(M, ratio) for M, ratio in ratios if ratio is not None]
                if points:
                    panels.setdefault(shape, {}).setdefault((peer, ours), {})[way] = points
    if not panels:
        return False
    plt = _pyplot()
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    size, axes = plt.subplots(down, across, figsize=(max(7.5, 4.4 * across), 1.2 + 2.8 * down), squeeze=False)
    handles: dict[str, Any] = {}
    for axis, (shape, lines) in zip(axes.flat, panels.items(), strict=False):
        ticks: set[int] = set()
        for (peer, ours), ways in lines.items():
            colour = _PALETTE[pairs.index((peer, ours)) % len(_PALETTE)]
            name = ours if peer == goals.BARE and ours != goals.OURS else peer
            for way, points in ways.items():
                style = {"eager": "-", "graph": "--"}[way]
                drawn = axis.plot(
                    *zip(*points, strict=True), color=colour, linestyle=style, marker="o", markersize=3
                )
                handles.setdefault(f"{name}, {way}", drawn[0])
                ticks |= {M for M, _ in points}
            goal = goals.goal_of(op, peer, ours)
            wanted = {} if goal is None or shape not in goals.SHAPES else goal.ratios
            wanted = {M: ratio for M, ratio in wanted.items() if M in ticks}
            if wanted:
                marks = axis.plot(
                    list(wanted), list(wanted.values()), color=colour, linestyle="", marker="x", markersize=8
                )
                handles.setdefault(f"{name}, goal", marks[0])
        axis.axhline(1, color="#000000", linewidth=0.8)
        axis.set_title(shape.replace("x", "×"), fontsize=9)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.tick_params(labelsize=8)
        axis.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
        axis.minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel("M, tokens", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("time / peftkern's", fontsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    size.suptitle(f"{title}\n{_where(rows)}", fontsize=9)
    columns = 3
    legend = (0.2 + 0.2 * -(-len(handles) // columns)) / size.get_figheight()
    size.legend(list(handles.values()), list(handles), loc="lower center", ncols=columns, fontsize=8)
    size.tight_layout(rect=(0, min(legend, 0.4), 1, 1))
    _save(size, path)
    return True


def _gpu_dequantize(rows: Sequence[Row], path: Path) -> bool:
    """GB/s over the measured copy's, a group of bars a shape."""
    found = [
        row
        for row in rows
        if row["op"] == "dequantize" and row["status"] == "ok" and row["gb_s"] and row["copy_gb_s"]
    ]
    if not found:
        return False
    plt = _pyplot()
    shapes, names = _shapes(found), list(dict.fromkeys(row["candidate"] for row in found))
    size, axis = plt.subplots(figsize=(max(7.5, 1.1 * len(shapes)), 4))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        share = {
            row["shape"]: float(row["gb_s"]) / float(row["copy_gb_s"])
            for row in found
            if row["candidate"] == name
        }
        places = [shapes.index(shape) + (i - (len(names) - 1) / 2) * width for shape in share]
        colour = COLOURS[cases.OURS] if name == goals.OURS else _PALETTE[0]
        axis.bar(places, list(share.values()), width, label=name, color=colour)
    axis.axhline(goals.COPY_SHARE, color="#000000", linestyle="--", linewidth=1, label="goal")
    axis.set_xticks(range(len(shapes)), [shape.replace("x", "×") for shape in shapes], fontsize=8)
    axis.set_ylabel("of the copy's GB/s", fontsize=8)
    axis.set_title(f"dequantize_4bit\n{_where(rows)}", fontsize=9)
    axis.legend(fontsize=8)
    size.tight_layout()
    _save(size, path)
    return True


def _draw_gpu(rows: Sequence[Row], folder: Path, suffix: str) -> list[Path]:
    written = [path for name in GPU_FIGURES if _gpu_ratios(rows, name, path := folder / f"{name}{suffix}")]
    path = folder / f"dequantize{suffix}"
    return [*written, path] if _gpu_dequantize(rows, path) else written


def draw(csv: Path, folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draws what the CSV has and returns the files written: none where no case has two values of M."""
    rows = store.read(csv)
    if rows and "ratio_graph" in rows[0]:
        return _draw_gpu(rows, folder, suffix)
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
    csv: Annotated[Path, typer.Argument(help="a results.csv of bench.run, or a gpu.csv of bench.gpu")],
    out: Annotated[Path | None, typer.Option(help="folder; the CSV's own when left out")] = None,
    suffix: Annotated[str, typer.Option(help=".svg or .png")] = ".svg",
) -> None:
    """Draw the CSV's numbers."""
    for path in draw(csv, out or csv.parent, suffix):
        print(path)


if __name__ == "__main__":
    typer.run(main)
