"""python -m bench.tiles: on a GPU, the times of candidate tiles for the table in triton_kernels/choices.py.

Each candidate replaces the table's row, its result is compared with that of the dequantized W, and its time
is that of a captured graph on rotating weights, as in bench.gpu. A tile that does not fit, or is wrong, is
named and left out. The last line of a case says which tile won and what the dequantized way takes, hence
where the crossover lies; its rows are in the CSV by then. Written without a GPU at hand.
"""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import peftkern
from bench.cases import LLAMA
from bench.gpu import ROUNDS, Weights, _calls, _elapsed, _graph, agree, first_line
from peftkern.backends import triton as backend

M = "16,32,64,128,256,512,1024,2048,4096"


def candidates(transposed: bool, rows: int) -> list[Any]:
    """What compiles without a spill for sm_90 (bench.compile_report's reading of it)."""
    from peftkern.triton_kernels.choices import Tile

    plain = [  # 128 × 128 with 4 warps spills
        Tile(64, 16, 64, 4, 4),
        Tile(64, 16, 64, 4, 6),
        Tile(64, 32, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(128, 32, 64, 4, 4),
        Tile(128, 64, 64, 4, 4),
        Tile(128, 128, 64, 8, 4),
        Tile(256, 64, 64, 8, 4),
        Tile(256, 128, 64, 8, 3),
        Tile(256, 128, 64, 8, 4),
    ]
    turned = [
        Tile(128, 16, 64, 4, 4),
        Tile(128, 32, 64, 4, 4),
        Tile(128, 64, 64, 4, 4),
        Tile(128, 128, 64, 4, 3),
        Tile(128, 128, 64, 4, 4),
        Tile(256, 64, 64, 8, 4),
        Tile(256, 128, 64, 8, 3),
        Tile(256, 128, 64, 8, 4),
    ]
    # no tile of far more rows than there are
    return [tile for tile in (turned if transposed else plain) if tile.rows <= max(16, 2 * rows)]


def timed(shapes: Sequence[str], tokens: Sequence[int], device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each tile of each case."""
    from peftkern.triton_kernels import matmul as kernels

    matmul: Any = kernels
    machine = backend._machine(device)
    table = matmul.words_tile
    for shape in LLAMA:
        if shapes and shape.name not in shapes:
            continue
        weights = Weights(shape, device)
        for rows in tokens:
            for transposed in (False, True):
                inner, outputs = (shape.N, shape.K) if transposed else (shape.K, shape.N)
                x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)

                def product(
                    i: int,
                    x: Tensor = x,
                    transposed: bool = transposed,
                    outputs: int = outputs,
                    weights: Weights = weights,
                ) -> Tensor:
                    out = x.new_empty(x.shape[0], outputs)
                    weight = weights.quantized[i % weights.count].kernel_args
                    plan = matmul.plan(machine, out, x, weight, transposed, 1.0, None, None, None, None)
                    backend._run(plan, x.device)
                    return out

                def dequantized(
                    i: int, x: Tensor = x, transposed: bool = transposed, weights: Weights = weights
                ) -> Tensor:
                    W = peftkern.dequantize_4bit(weights.quantized[i % weights.count], torch.bfloat16)
                    return x @ (W if transposed else W.t())

                expected = (dequantized(0),)
                times: dict[str, float] = {}
                for tile in (None, *candidates(transposed, rows)):
                    name = "table" if tile is None else "x".join(str(part) for part in tile)
                    matmul.words_tile = table if tile is None else lambda *args, tile=tile: tile
                    try:
                        problem = agree((product(0),), expected)
                        if problem is None:
                            calls = _calls(product, weights.count)
                            replay = _graph(product, calls)
                            times[name] = statistics.median(_elapsed(replay) / calls for _ in range(ROUNDS))
                    except Exception as error:
                        problem = f"{first_line(error)}"
                    finally:
                        matmul.words_tile = table
                    if problem is not None:
                        print(f"{shape.name} M={rows} transposed={transposed} {name}: {problem}")
                calls = _calls(dequantized, weights.count)
                replay = _graph(dequantized, calls)
                times["dequantize + cuBLAS"] = statistics.median(
                    _elapsed(replay) / calls for _ in range(ROUNDS)
                )
                case = {"shape": shape.name, "M": rows, "transposed": transposed}
                for name, ms in times.items():
                    yield {**case, "tile": name, "us": f"{ms * 1e3:.2f}"}
                ranked = sorted(times.items(), key=lambda item: item[1])[:4]
                line = ", ".join(f"{name} {ms * 1e3:.1f} µs" for name, ms in ranked)
                print(f"{shape.name} M={rows} transposed={transposed}: {line}", flush=True)
        del weights
        torch.cuda.empty_cache()


def main(
    m: Annotated[str, typer.Option(help="numbers of rows")] = M,
    shapes: Annotated[str, typer.Option(help="names such as 4096x4096; empty: Llama-3-8B's")] = "",
    file: Annotated[Path | None, typer.Option("--csv")] = None,
) -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device: nothing is measured")
    from peftkern.triton_kernels import choices

    device = torch.device("cuda", torch.cuda.current_device())
    print(f"the table's crossover is at {choices.of(choices.CROSSOVER, backend._machine(device))} rows")
    rows = timed(shapes.split(",") if shapes else (), [int(one) for one in m.split(",")], device)
    with (file or Path(os.devnull)).open("w", newline="") as out:
        writer = csv.DictWriter(out, ("shape", "M", "transposed", "tile", "us"))
        writer.writeheader()
        for row in rows:
            writer.writerow(row)
            out.flush()


if __name__ == "__main__":
    typer.run(main)
