"""Every choice by shape in one place: tiles, splits, and from which M on a dequantized W and cuBLAS take
over.

None of it has run on a GPU yet. The tiles are those whose machine code has no spill and takes W from
registers (python -m bench.compile_report); the crossover is the one that the floors of an H200 give:
beyond it, decoding W anew for each tile of rows costs more than writing and reading a decoded copy of it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, TypeVar

from peftkern.triton_kernels.launch import Machine


class Tile(NamedTuple):
    outputs: int  # rows of the left operand, which is W
    rows: int  # rows of x
    inner: int  # of a step
    warps: int
    stages: int


class Pass(NamedTuple):
    """A tile of output_grads."""

    columns: int  # of dY
    rows: int  # of a step
    rank: int
    warps: int
    stages: int
    y_right: bool = False  # dY as right operand of dB's product


# capability → (up to which M, tiles), ascending; of several tiles the first that fills the machine
Rows = tuple[tuple[int, tuple[Tile, ...]], ...]
ANY = 1 << 62
WORDS: dict[int, Rows] = {
    90: (
        (16, (Tile(64, 16, 64, 4, 4),)),
        (32, (Tile(64, 32, 64, 4, 4),)),
        (64, (Tile(128, 64, 64, 4, 4),)),
        (ANY, (Tile(256, 128, 64, 8, 4), Tile(128, 128, 64, 8, 4))),
    ),
    80: (
        (16, (Tile(64, 16, 64, 4, 4),)),
        (32, (Tile(64, 32, 64, 4, 4),)),
        (ANY, (Tile(128, 64, 64, 4, 3),)),
    ),
}
# a warp's four weights of a half lie in rows 8 and outputs / 2 apart: so many outputs for so many warps
WORDS_TRANSPOSED: dict[int, Rows] = {
    90: (
        (16, (Tile(128, 16, 64, 4, 4),)),
        (32, (Tile(128, 32, 64, 4, 4),)),
        (64, (Tile(128, 64, 64, 4, 4),)),
        (ANY, (Tile(256, 128, 64, 8, 4), Tile(128, 128, 64, 4, 4))),
    ),
    80: (
        (16, (Tile(128, 16, 64, 4, 4),)),
        (32, (Tile(128, 32, 64, 4, 4),)),
        (ANY, (Tile(128, 64, 32, 4, 4),)),  # steps of 64 spill
    ),
}
# any N, K, address: right, not fast
BYTES = Tile(64, 32, 32, 4, 2)
# fp32 without tensor cores
FLOAT32 = Tile(64, 32, 32, 4, 2)

# a dense W, one side of the product a rank
THIN_OUTPUTS = {
    16: Tile(16, 64, 64, 4, 4),
    32: Tile(32, 128, 64, 8, 3),
    64: Tile(64, 128, 64, 8, 3),
}  # x Aᵀ: a long sum
THIN_ROWS = {
    16: Tile(64, 16, 64, 4, 3),
    32: Tile(64, 32, 64, 4, 3),
    64: Tile(64, 64, 64, 4, 3),
}  # Gᵀ x: few rows
THIN_FLOAT32 = Tile(32, 32, 32, 4, 2)

# capability → up to which rank, tiles, the widest first: G's parts are 2 rank / columns of dY's bytes in 16
# bits, so wide tiles keep them low; narrow ones fill the machine
OUTPUT_GRADS: dict[int, dict[int, tuple[Pass, ...]]] = {
    90: {
        16: (Pass(256, 64, 16, 8, 3), Pass(128, 64, 16, 4, 3)),
        32: (Pass(256, 64, 32, 8, 3), Pass(128, 64, 32, 4, 3)),
        64: (Pass(256, 64, 64, 8, 3),),
    },
    80: {
        # with less of the rank the products and dbias's sums spill
        32: (Pass(128, 32, 64, 8, 3, y_right=True),),
        64: (Pass(256, 16, 64, 8, 3, y_right=True), Pass(128, 32, 64, 8, 3, y_right=True)),
    },
}
OUTPUT_GRADS_FLOAT32 = {
    16: (Pass(128, 32, 16, 8, 2), Pass(64, 32, 16, 4, 2)),
    32: (Pass(64, 32, 32, 8, 2),),
    64: (Pass(64, 32, 64, 8, 2),),
}
# at 64 the parts cost as much as another read of dY, in fewer launches
ONE_PASS_RANK = 64
# of a part of the rows, at least: dB's parts are 2 rank / rows of dY's bytes
PART_ROWS = 128
PART_COLUMNS = 256  # the tiles that so many parts shall fill the machine with
STEP_ROWS = 64  # a part has whole steps of every tile

# capability → tiles of MoRA's dM, the widest first; outputs, rows: dM's rows and columns, inner: rows of x
MORA_GRAD: dict[int, tuple[Tile, ...]] = {
    90: (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4), Tile(32, 32, 64, 4, 4)),
    80: (Tile(128, 256, 32, 8, 4), Tile(128, 128, 32, 8, 4), Tile(64, 64, 64, 4, 4), Tile(32, 32, 64, 4, 4)),
}
MORA_GRAD_FLOAT32 = (Tile(64, 64, 16, 8, 2), Tile(32, 32, 32, 4, 2))
# beside more sums the addresses of loads of fewer than 8 neighbours find no registers
MORA_GRAD_NARROW = 128 * 128
MORA_GRAD_ROWS = 256  # of a part, at least: it writes as much as so many rows of 128 columns of x and dY have

# from this M on: dequantize into a scratch buffer, then cuBLAS adds onto the addend
CROSSOVER: dict[int, int] = {90: 2048, 80: 1024}
# of a tile, where the addend leaves few registers (matmul.plan)
CROWDED_ROWS = {120: 32, 80: 64}
# no wgmma, 99 KB of shared memory
WORDS[120], WORDS_TRANSPOSED[120] = WORDS[80], WORDS_TRANSPOSED[80]
OUTPUT_GRADS[120], CROSSOVER[120] = OUTPUT_GRADS[80], CROSSOVER[80]
MORA_GRAD[120] = MORA_GRAD[80]
CROSSOVER_FLOAT32 = 128  # no tensor cores to overlap with: the vendor's product is ahead early

GROUP = 8  # tiles of rows that pass over W together, while its bytes lie in L2
MAX_SPLITS = 16  # of a sum too long for the few tiles there are
MIN_STEPS = 4  # of a split

_Choice = TypeVar("_Choice")


def of(table: dict[int, _Choice], machine: Machine) -> _Choice:
    """The row of the newest capability that the machine has."""
    return table[max(capability for capability in table if capability <= machine.capability)]


def tiles(tile: Tile, rows: int, outputs: int) -> int:
    return -(-rows // tile.rows) * -(-outputs // tile.outputs)


def splits(tile: Tile, rows: int, outputs: int, inner: int, machine: Machine) -> int:
    """Into how many parts the sum is cut: where less than half of the machine had a tile."""
    steps = -(-inner // tile.inner)
    wanted = machine.processors // max(tiles(tile, rows, outputs), 1)
    return max(1, min(wanted, MAX_SPLITS, steps // MIN_STEPS))


@lru_cache(maxsize=1024)
def words_tile(rows: int, outputs: int, blocksize: int, transposed: bool, machine: Machine) -> Tile:
    for limit, candidates in of(WORDS_TRANSPOSED if transposed else WORDS, machine):
        if rows <= limit:
            filling = (tile for tile in candidates if tiles(tile, rows, outputs) >= machine.processors)
            tile = next(filling, candidates[-1])
            # a step along W's rows lies in one block
            return tile._replace(inner=min(tile.inner, blocksize))
    raise AssertionError("the table has no last row")


def thin_tile(rows: int, outputs: int) -> Tile:
    table, rank = (THIN_OUTPUTS, outputs) if outputs <= rows else (THIN_ROWS, rows)
    return table[16 if rank <= 16 else 32 if rank <= 32 else 64]


def output_grads_tile(M: int, N: int, rank: int, full: bool, machine: Machine) -> tuple[Pass, int, int]:
    """The tile, how many rows are a part, and how many parts there are; full: fp32.

    The parts do not depend on the rank, nor anything on what is asked for: one gradient alone has the bits
    that it has beside the others.
    """
    wanted = max(machine.processors // -(-N // PART_COLUMNS), 1)
    rows = -(-max(-(-M // wanted), PART_ROWS) // STEP_ROWS) * STEP_ROWS
    parts = max(-(-M // rows), 1)
    table = OUTPUT_GRADS_FLOAT32 if full else of(OUTPUT_GRADS, machine)
    candidates = next(row for limit, row in table.items() if rank <= limit)
    # three quarters of the machine are enough
    filling = (tile for tile in candidates if 4 * parts * -(-N // tile.columns) >= 3 * machine.processors)
    return next(filling, candidates[-1]), rows, parts


def mora_grad_tile(
    M: int, size: int, blocks: int, turned: bool, full: bool, narrow: bool, machine: Machine
) -> tuple[Tile, int, int]:
    """The tile, how many of its steps are a part, and how many parts there are of each of the blocks of dY
    where they are turned, of all where not; full: fp32; narrow: loads of fewer than 8 neighbours.

    Of the tiles that give three quarters of the machine something to do, or as much of it as any does, that
    which reads the fewest operands.
    """

    def parts(tile: Tile) -> tuple[int, int]:
        """Of numbers of parts that take the same time, the fewest; and the programs that this makes."""
        steps = -(-M // tile.inner) * (1 if turned else blocks)
        programs = tiles(tile, size, size) * (blocks if turned else 1)
        most = max(1, min(2 * machine.processors // programs, steps * tile.inner // MORA_GRAD_ROWS))
        found = min(range(1, most + 1), key=lambda n: -(-n * programs // machine.processors) / n)
        per_part = -(-steps // found)
        return per_part, -(-steps // per_part)

    def cost(tile: Tile) -> tuple[int, int]:
        programs = tiles(tile, size, size) * parts(tile)[1] * (blocks if turned else 1)
        operands = tiles(tile, size, size) * (tile.outputs + tile.rows)
        return -min(4 * programs, 3 * machine.processors), operands

    candidates = MORA_GRAD_FLOAT32 if full else of(MORA_GRAD, machine)
    if narrow:
        candidates = tuple(tile for tile in candidates if tile.outputs * tile.rows <= MORA_GRAD_NARROW)
    tile = min(candidates, key=cost)
    return tile, *parts(tile)


def crossover(full: bool, machine: Machine) -> int:
    """From how many rows on a dequantized copy of W is worth its making; full: fp32."""
    return CROSSOVER_FLOAT32 if full else of(CROSSOVER, machine)
