"""What is wanted of the triton backend on an H200, as ratios peer / ours, and which of it a gpu.csv shows.

A goal holds for Llama-3-8B's large shapes. It is met where the eager ratio, what a caller sees, reaches it;
the ratio of the captured graphs, without the host, stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.store import Row, number

SHAPES = ("4096x4096", "14336x4096", "4096x14336")
OURS, BARE = "peftkern", "peftkern without adapter"
BNB, PEFT, BY_HAND = "bitsandbytes", "bitsandbytes + peft", "dequantize + cuBLAS + addmm_"
FORWARD = {64: 2.5, 128: 2.2, 256: 1.6, 512: 1.25, 1024: 1.08, 2048: 1.02, 8192: 1.02}
TRAINED = (512, 2048, 8192)
COPY_SHARE = 0.85  # of dequantize, of the measured copy
FUSED_BELOW = 2048  # rows: no bf16 copy of W up to there


@dataclass(frozen=True)
class Goal:
    name: str
    op: str
    peer: str
    ratios: Mapping[int, float]  # M → the least peer / ours
    ours: str = OURS


def _cost(name: str, op: str, share: float, ours: str = OURS) -> Goal:
    """At most so much slower than without the adapter."""
    return Goal(name, op, BARE, dict.fromkeys(TRAINED, 1.0 / (1.0 + share)), ours)


GOALS = (
    Goal("forward, bitsandbytes", "linear", BNB, FORWARD),
    Goal("dX, bitsandbytes", "dx", BNB, {M: 0.9 * ratio for M, ratio in FORWARD.items()}),
    Goal("LoRA's step, bitsandbytes + peft", "lora_step", PEFT, {512: 2.2, 2048: 1.7, 8192: 1.4}),
    Goal("LoRA's step, dequantize + cuBLAS", "lora_step", BY_HAND, {512: 1.3, 2048: 1.12, 8192: 1.05}),
    _cost("LoRA's cost, forward", "lora", 0.03),
    _cost("LoRA's cost, step", "lora_step", 0.03),
    *(
        _cost(f"MoRA's cost, {name}, type {kind}", op, 0.10 if kind == 6 else 0.04, f"{OURS} type {kind}")
        for op, name in (("mora", "forward"), ("mora_step", "step"))
        for kind in (1, 2, 3, 4, 6)
    ),
)


class Found(NamedTuple):
    name: str
    shape: str
    M: int
    wanted: str
    eager: str
    graph: str
    met: bool


@dataclass
class Table:
    """The rows with numbers, by what was measured."""

    rows: Sequence[Row]
    by_key: dict[tuple[str, str, int, str], Row] = field(init=False)

    def __post_init__(self) -> None:
        self.by_key = {
            (row["op"], row["shape"], int(row["M"]), row["candidate"]): row
            for row in self.rows
            if row["status"] == "ok"
        }

    def ratio(self, op: str, shape: str, M: int, peer: str, ours: str, way: str) -> float | None:
        """peer / ours, way "eager" or "graph": over rounds where compared there, else of medians."""
        theirs, own = (self.by_key.get((op, shape, M, name)) for name in (peer, ours))
        if theirs is None or own is None:
            return None
        if ours == OURS or peer == ours.replace(OURS, "eager"):
            return number(theirs, f"ratio_{way}")
        one, other = number(theirs, f"{way}_us"), number(own, f"{way}_us")
        return None if one is None or other is None else one / other


def goal_of(op: str, peer: str, ours: str = OURS) -> Goal | None:
    return next((goal for goal in GOALS if (goal.op, goal.peer, goal.ours) == (op, peer, ours)), None)


def judge(rows: Sequence[Row]) -> Iterator[Found]:
    """Every goal that the rows speak of."""
    table = Table(rows)
    for goal in GOALS:
        for shape in SHAPES:
            for M, wanted in goal.ratios.items():
                eager, graph = (
                    table.ratio(goal.op, shape, M, goal.peer, goal.ours, way) for way in ("eager", "graph")
                )
                if eager is not None:
                    told = "" if graph is None else f"{graph:.3f}"
                    met = eager >= wanted
                    yield Found(goal.name, shape, M, f"≥ {wanted:.3f}", f"{eager:.3f}", told, met)
    for (op, shape, M, candidate), row in table.by_key.items():
        if shape not in SHAPES or candidate != OURS:
            continue
        rate, copy, peak = number(row, "gb_s"), number(row, "copy_gb_s"), number(row, "peak_bytes")
        if op == "dequantize" and rate is not None and copy is not None:
            share = rate / copy
            wanted_share, met = f"≥ {COPY_SHARE:.2f}", share >= COPY_SHARE
            yield Found("dequantize, share of the copy", shape, M, wanted_share, "", f"{share:.3f}", met)
        if op == "lora_step" and M < FUSED_BELOW and peak is not None:
            # a copy has two bytes a weight; y, dx and what is as thin as the adapter are no part of it
            N, K = (int(size) for size in shape.split("x"))
            beyond = (peak - 2 * M * (N + K)) / (2 * N * K)
            told = f"{beyond:.3f}"
            yield Found("step's memory, copies of W in bf16", shape, M, "< 0.5", told, "", beyond < 0.5)


def report(rows: Sequence[Row]) -> list[str]:
    found = list(judge(rows))
    if not found:
        return ["goals: none of them was measured"]
    lines = [f"{'goal':42} {'shape':>11} {'M':>5} {'wanted':>9} {'eager':>8} {'graph':>8}"]
    for one in found:
        lines.append(
            f"{one.name:42} {one.shape:>11} {one.M or '':>5} {one.wanted:>9} {one.eager:>8} {one.graph:>8}  "
            f"{'met' if one.met else 'not met'}"
        )
    return [*lines, f"goals: {sum(one.met for one in found)} of {len(found)} met"]
