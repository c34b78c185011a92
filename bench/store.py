"""The CSV of a machine: a line for each case and candidate; a new measurement replaces its case's old one."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

CASE = ("op", "shape", "M", "cache", "dtype", "rank", "quant_type", "blocksize", "mora_type")
_FIRST = CASE[:-1]  # mora_type came later and stands last, so that the other columns keep their places
COLUMNS = (
    *_FIRST,
    "candidate",
    "kind",
    "status",  # "ok" or what was wrong; only "ok" has numbers
    "median_us",
    "p25_us",
    "p75_us",
    "min_us",
    "rounds",
    "calls",
    "gb_s",
    "gflop_s",
    "read_share",  # of the memory read rate measured in the same rounds
    "peak_share",  # of the multiply-add rate measured in the same rounds
    "ratio",  # median over rounds of this candidate's time / peftkern's
    "bytes",
    "flops",
    "path",
    "observed",
    "machine",
    "cores",
    "threads",
    "isa",
    "llc_mib",
    "commit",
    "compiler",
    "versions",
    "when",
    "mora_type",  # empty where there is none
)
MEMORY_COLUMNS = (
    *_FIRST,
    "candidate",
    "status",
    "kept_bytes",
    "input_bytes",
    "peak_bytes",
    "machine",
    "cores",
    "threads",
    "isa",
    "llc_mib",
    "commit",
    "compiler",
    "versions",
    "when",
    "mora_type",  # empty where there is none
)

Row = dict[str, str]


def key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in (*CASE, "threads"))


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{"mora_type": "", **row} for row in csv.DictReader(file)]


def write(path: Path, rows: Iterable[dict[str, object]], columns: tuple[str, ...] = COLUMNS) -> None:
    """Replaces the cases that `rows` speak of and keeps the others."""
    new: list[Row] = [{name: _text(row.get(name)) for name in columns} for row in rows]
    replaced = {key(row) for row in new}
    kept = [{name: row.get(name) or "" for name in columns} for row in read(path) if key(row) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    with fresh.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + new)
    fresh.replace(path)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def number(row: Row, name: str) -> float | None:
    return float(row[name]) if row.get(name) else None
