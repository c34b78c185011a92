"""triton_kernels/mora_grad.py in Triton's interpreter: dM by every tile, in parts, whole, turned, not."""

from __future__ import annotations

from collections.abc import Iterator

import bounds
import numpy as np
import pytest
import torch
from torch import Tensor

import peftkern
from peftkern import reference
from peftkern.backends import triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def interpreted() -> Iterator[None]:
    """The backend on CPU tensors, forced: bounds.compute_dtype asks who runs."""
    if not triton.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1, set before the start (make test-triton)")
    with peftkern.use_backend("triton"):
        yield


def table(size: int, blocks: int) -> Tensor:
    return reference.rotation_table(size, blocks, torch.device("cpu"), torch.float32)


def turns(size: int, blocks: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) [P] in fp64, of which the table is the rounded one."""
    _, _, found = bounds.mora_maps(size * blocks, 1, size, 6)
    assert found is not None
    return found


def check(dM: Tensor, dY: Tensor, x: Tensor, scaling: float, columns: int, turned: bool) -> None:
    size = len(dM)
    angles = turns(size, columns // size) if turned else None
    bounds.check("dM", dM, bounds.turned_grad(dY, x, size, angles, columns, scaling))


SHAPES = [  # M, I, O, r̂, n, capability, processors
    (70, 64, 64, 16, 4, 90, 6),
    (300, 192, 192, 48, 4, 90, 132),  # parts of rows
    (300, 192, 192, 48, 4, 90, 1),  # none
    (33, 75, 34, 10, 8, 80, 6),  # x repeated, blocks without outputs, half a block of outputs
    (65, 40, 200, 12, 4, 90, 132),  # dY's columns more than once around
    (20, 700, 520, 260, 3, 80, 6),  # several tiles, the last of them ragged
    (3, 500, 500, 2, 250, 90, 6),
    (5, 3, 11, 8, 2, 80, 6),  # x repeated more than once
    (1, 2, 2, 2, 1, 90, 6),
]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "I", "O", "size", "n", "capability", "processors"), SHAPES)
def test_shapes(
    M: int,
    I: int,  # noqa: E741
    O: int,  # noqa: E741
    size: int,
    n: int,
    capability: int,
    processors: int,
    dtype: torch.dtype,
    turned: bool,
) -> None:
    """On poisoned memory, and the same bits again."""
    from peftkern.triton_kernels import launch, mora_grad

    dY, x = torch.randn(M, O).to(dtype), torch.randn(M, I).to(dtype)
    rotation = table(size, n) if turned else None
    machine = launch.Machine(capability, processors)
    found = []
    for _ in range(2):
        dM = torch.full((size, size), torch.nan)
        for each in mora_grad.plan(machine, dM, dY, x, 0.75, n * size, rotation):
            each.run()
        found.append(dM)
    check(dM, dY, x, 0.75, n * size, turned)
    assert torch.equal(*found)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(
    ("capability", "dtype"), [(90, torch.bfloat16), (80, torch.float16), (90, torch.float32)]
)
def test_every_tile(
    capability: int, dtype: torch.dtype, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tile on the same sums, in three parts: of each block, or of all blocks and across them."""
    from peftkern.triton_kernels import choices, launch, mora_grad

    dY, x = torch.randn(150, 420).to(dtype), torch.randn(150, 320).to(dtype)
    tiles = choices.MORA_GRAD_FLOAT32 if dtype == torch.float32 else choices.MORA_GRAD[capability]
    for tile in tiles:
        steps = -(-150 // tile.inner) * (1 if turned else 3)
        per_part = -(-steps // 3)
        monkeypatch.setattr(
            mora_grad, "mora_grad_tile", lambda *_, found=(tile, per_part, -(-steps // per_part)): found
        )
        mora_grad._fixed.cache_clear()
        dM = torch.full((160, 160), torch.nan)
        rotation = table(160, 2) if turned else None
        first, last = mora_grad.plan(launch.Machine(capability, 6), dM, dY, x, -2.0, 320, rotation)
        assert (first.kernel, last.kernel) == (mora_grad.mora_grad, mora_grad.finish_mora_grad)
        covering = -(-160 // tile.outputs) * -(-160 // tile.rows)
        assert first.grid == (9 if turned else 3, covering)
        first.run()
        last.run()
        check(dM, dY, x, -2.0, 320, turned)
    mora_grad._fixed.cache_clear()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "size"), [(300, 70), (9, 1), (600, 33)])
def test_one_block_as_given(M: int, size: int, dtype: torch.dtype) -> None:
    """Both compressed before: a thin product."""
    g, z, dM = torch.randn(M, size).to(dtype), torch.randn(M, size).to(dtype), torch.empty(size, size)
    triton.mora_grad(dM, g, z, 1.5, size, None)
    compute = bounds.compute_dtype(dtype)
    G, Z = bounds.operand(g, compute), bounds.operand(z, compute)
    bounds.check("dM", dM, bounds.matmul(G.t(), Z.t(), torch.float32, 1.5))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [7, 300])  # whole sums, and parts
def test_strides(rows: int, dtype: torch.dtype, turned: bool) -> None:
    """Transposed, cut out, repeated: the bits of contiguous copies."""
    views = (
        (torch.randn(34, rows).to(dtype).t(), torch.randn(rows, 75).to(dtype)),
        (torch.randn(rows, 34).to(dtype), torch.randn(75, rows).to(dtype).t()),
        (torch.randn(rows, 99).to(dtype)[:, 1::2][:, :34], torch.randn(2 * rows, 80).to(dtype)[::2, 3:78]),
        (torch.randn(34).to(dtype).expand(rows, 34), torch.randn(rows, 1).to(dtype).expand(rows, 75)),
    )
    rotation = table(10, 8) if turned else None
    for dY, x in views:
        out, copied = torch.full((20, 25), torch.nan), torch.empty(10, 10)
        dM = out[::2, 4:24:2].t()
        triton.mora_grad(dM, dY, x, 1.0, 80, rotation)
        triton.mora_grad(copied, dY.contiguous(), x.contiguous(), 1.0, 80, rotation)
        assert torch.equal(dM, copied)
        assert int(out.isnan().sum()) == out.numel() - 100  # nothing beside it
        check(copied, dY, x, 1.0, 80, turned)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(("M", "I", "O"), [(0, 12, 12), (3, 0, 12), (3, 12, 0)])
def test_nothing_to_add_up(M: int, I: int, O: int, turned: bool) -> None:  # noqa: E741
    dM = torch.full((4, 4), torch.nan)
    triton.mora_grad(dM, torch.randn(M, O), torch.randn(M, I), 1.0, 12, table(4, 3) if turned else None)
    assert torch.equal(dM, torch.zeros(4, 4))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", [6, "decoupling"])
def test_what_is_not_finite_stays_in_its_columns(kind: int | str, value: float) -> None:
    """Of x: in the column of dM that it is multiplied onto, and its partner's in the turn, as the reference
    has it; nowhere if its block has no outputs. Of dY: in the row."""
    M = torch.zeros(8, 8)

    def gradient(x: Tensor, grad: Tensor, backend: str) -> Tensor:
        matrix = M.clone().requires_grad_()
        with peftkern.use_backend(backend):
            y = peftkern.mora(x, matrix, 20, kind)
            return torch.autograd.grad(y, matrix, grad)[0]

    x, grad = torch.randn(70, 32), torch.randn(70, 20)
    clean = gradient(x, grad, "triton")
    for column in (3, 13):  # of block 0 and 1
        spoilt = x.clone()
        spoilt[5, column] = value
        found = gradient(spoilt, grad, "triton")
        assert torch.equal(found.isfinite(), gradient(spoilt, grad, "reference").isfinite())
        touched = {column % 8, (column + 4) % 8} if kind == 6 else {column % 8}
        for j in range(8):
            assert torch.equal(found[:, j], clean[:, j]) == (j not in touched)
    spoilt = x.clone()
    spoilt[5, 24:] = value
    assert torch.equal(gradient(spoilt, grad, "triton"), clean)
    spoilt = grad.clone()
    spoilt[6, 10] = value
    found = gradient(x, spoilt, "triton")
    assert not found[2].isfinite().any()
    assert torch.equal(found[torch.arange(8) != 2], clean[torch.arange(8) != 2])


@pytest.mark.usefixtures("interpreted")
def test_offsets_beyond_32_bits() -> None:
    """Rows so far apart that the third begins at 2^31 elements; pages that nobody touches are not there."""
    memory = np.zeros(2 * 2**31 + 64, dtype=np.int16)
    views = [torch.from_numpy(memory[start:]).view(torch.bfloat16) for start in (0, 32)]
    dY, x = (view.as_strided((4, 24), (2**30, 1)) for view in views)
    dY.copy_(torch.randn(4, 24))
    x.copy_(torch.randn(4, 24))
    dM = torch.empty(8, 8)
    triton.mora_grad(dM, dY, x, 1.0, 24, table(8, 3))
    check(dM, dY, x, 1.0, 24, True)


@pytest.mark.usefixtures("interpreted")
def test_a_plan_seen_before_takes_its_numbers_from_a_bounded_cache() -> None:
    from peftkern.triton_kernels import launch, mora_grad

    mora_grad._fixed.cache_clear()
    for _ in range(3):
        dY, x, dM = torch.randn(30, 24), torch.randn(30, 24), torch.empty(8, 8)
        launches = mora_grad.plan(launch.INTERPRETED, dM, dY, x, 1.0, 24, table(8, 3))
        assert launches[0].arguments["x"] is x
    info = mora_grad._fixed.cache_info()
    assert (info.misses, info.hits) == (1, 2)
    assert info.maxsize


def test_narrow_loads_take_no_wide_tile() -> None:
    """Neighbours by r̂, the columns, the rows' stride and which way the matrix lies: 8 of them, or fewer."""
    pytest.importorskip("triton", reason="plans come with the kernels, which import triton")
    from peftkern.triton_kernels import launch, mora_grad

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def found(dY: Tensor, x: Tensor, size: int, blocks: int) -> tuple[int, int, int]:
        dM = empty(size, size, dtype=torch.float32)
        plan = mora_grad.plan(launch.Machine(90, 132), dM, dY, x, 1.0, size * blocks, None)
        a = plan[0].arguments
        return a["BLOCK_I"] * a["BLOCK_J"], a["ALIGN_X"], a["ALIGN_Y"]

    M, wide, narrow = 8192, 128 * 256, 128 * 128
    assert found(empty(M, 4096), empty(M, 4096), 256, 16) == (wide, 16, 16)
    assert found(empty(M, 4096), empty(M, 4096), 360, 12) == (wide, 8, 8)
    assert found(empty(M, 4096), empty(M, 4096), 348, 12) == (narrow, 4, 4)
    assert found(empty(M, 4096), empty(M, 256), 256, 1) == (wide, 16, 16)
    assert found(empty(M, 389), empty(M, 389), 389, 1) == (narrow, 1, 1)
    assert found(empty(M, 4096), empty(M, 260)[:, :256], 256, 1) == (narrow, 4, 16)
    assert found(empty(4096, M).t(), empty(M, 4096), 256, 16) == (narrow, 16, 1)


def test_parts_at_the_sizes_of_models() -> None:
    """Every step in one part; parts fill most of an H200, and are few: bounded by two waves of the widest
    tile, or one matrix of sums for each r̂ columns of dY."""
    pytest.importorskip("triton", reason="the table of tiles comes with the kernels, which import triton")
    from peftkern.triton_kernels import choices
    from peftkern.triton_kernels.launch import Machine

    machine = Machine(90, 132)
    for outputs, size in ((4096, 256), (11008, 348), (1024, 202), (4096, 1448), (576, 96), (256, 256)):
        blocks = -(-outputs // size)
        for M in (1, 100, 512, 2048, 8192, 100_000):
            for turned in (False, True):
                for full, narrow in ((False, False), (False, True), (True, False)):
                    tile, per_part, parts = choices.mora_grad_tile(
                        M, size, blocks, turned, full, narrow, machine
                    )
                    steps = -(-M // tile.inner) * (1 if turned else blocks)
                    assert (parts - 1) * per_part < steps <= parts * per_part
                    count = parts * (blocks if turned else 1)
                    programs = count * choices.tiles(tile, size, size)
                    if M >= 2048:
                        assert programs >= 0.5 * machine.processors, (M, outputs, size, turned)
                    assert parts == 1 or programs <= 2 * machine.processors
                    written = 4 * count * size**2
                    assert written <= max(2 * 132 * 4 * 128 * 256, 4 * size * blocks * size)
