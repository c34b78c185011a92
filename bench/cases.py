"""What is measured: operations, shapes of real models, counts of bytes and operations, and the goals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peftkern import reference

OURS = "peftkern"
DENSE = "torch dense"
DENSE_F32 = "torch dense fp32"
BNB = "bnb default"
BNB_EVAL = "bnb packed eval"
INT4PACK = "torch int4pack"
PEFT = "peft + bnb"
PEFT_EVAL = "peft + bnb packed eval"
LINEAR = "peftkern linear_4bit"
EAGER = "torch eager"
COMPILED = "torch.compile"
BNB_EAGER = "bnb + torch eager"
LORA = "peftkern lora_linear"
READ = "read the bytes"
PEAK = "peak"

MORA_OPS = ("mora", "mora_step", "mora_linear", "mora_linear_step")
OPS = ("linear_4bit", "lora_linear", "dx", "train_step", "dequantize", "quantize", *MORA_OPS)
BACKWARD_OPS = ("dx", "train_step", "mora_step", "mora_linear_step")
OP_MEANING = {
    "linear_4bit": "Y = X Wᵀ, W in 4 bits, no gradient",
    "lora_linear": "Y = X Wᵀ + s·(X Aᵀ) Bᵀ, no gradient",
    "dx": "dX = dY W, from the same packed bytes",
    "train_step": "lora_linear forward, then the gradients of x, A and B",
    "dequantize": "4 bits to a dense [N, K]",
    "quantize": "a dense [N, K] to 4 bits",
    "mora": "Y = decompress(compress(X) Mᵀ), no base weight, no gradient",
    "mora_step": "mora forward, then the gradients of x and the matrix M",
    "mora_linear": "Y = X Wᵀ + mora(X), W in 4 bits, no gradient",
    "mora_linear_step": "mora_linear forward, then the gradients of x and the matrix M",
}
MORA_TYPES = (1, 2, 3, 4, 6)  # 1 sharing, 2 to 4 its variants by groups, 6 rotation


@dataclass(frozen=True)
class Shape:
    """One projection: weight [N, K]."""

    N: int
    K: int
    label: str

    @property
    def name(self) -> str:
        return f"{self.N}x{self.K}"


LLAMA = (
    Shape(4096, 4096, "Llama-3-8B q, o"),
    Shape(14336, 4096, "Llama-3-8B gate, up"),
    Shape(4096, 14336, "Llama-3-8B down"),
    Shape(1024, 4096, "Llama-3-8B k, v"),
)
SMOLLM2 = (
    Shape(576, 576, "SmolLM2-135M q, o"),
    Shape(1536, 576, "SmolLM2-135M gate, up"),
    Shape(576, 1536, "SmolLM2-135M down"),
    Shape(192, 576, "SmolLM2-135M k, v"),
)
TINY = (Shape(64, 64, "overhead of a call"),)
MODELS = {"llama": LLAMA, "smollm2": SMOLLM2, "tiny": TINY}
M_FULL = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Case:
    """One line of the table, apart from who runs it."""

    op: str
    shape: Shape
    M: int  # 0 where the operation has no tokens
    cold: bool
    dtype: str = "bf16"
    rank: int = 16  # of LoRA; MoRA's r, from which its matrix has LoRA's number of parameters
    quant_type: str = "nf4"
    blocksize: int = 64
    mora_type: int = 0  # 0 where the operation has no such type

    @property
    def key(self) -> tuple[str, str, int, str, str, int, str, int, int | str]:
        cache = "cold" if self.cold else "hot"
        return (
            self.op,
            self.shape.name,
            self.M,
            cache,
            self.dtype,
            self.rank,
            self.quant_type,
            self.blocksize,
            self.mora_type or "",
        )

    @property
    def side(self) -> int:
        """r̂, the rows and columns of MoRA's matrix."""
        return reference.mora_rank(self.shape.K, self.shape.N, self.rank, self.mora_type)

    @property
    def lora_rank(self) -> int:
        """The rank at which LoRA has about the parameters of MoRA's matrix."""
        return max(1, round(self.side**2 / (self.shape.K + self.shape.N)))

    @property
    def title(self) -> str:
        tokens = f" M={self.M}" if self.M else ""
        rank = f" r={self.rank}" if self.op in ("lora_linear", "train_step") else ""
        if self.mora_type:
            rank = f" type {self.mora_type} r={self.rank} r̂={self.side}"
        return f"{self.op} {self.shape.name}{tokens}{rank} {self.dtype} {'cold' if self.cold else 'hot'}"


def default_rank(op: str, mora_type: int = 0) -> int:
    return 8 if op in MORA_OPS or mora_type else 16


def mora_case(op: str, shape: Shape, M: int, mora_type: int, cold: bool = True, dtype: str = "bf16") -> Case:
    return Case(op, shape, M, cold, dtype, default_rank(op, mora_type), mora_type=mora_type)


BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def packed_bytes(shape: Shape, blocksize: int = 64) -> int:
    """Half a byte a weight and one fp32 a block."""
    numel = shape.N * shape.K
    return (numel + 1) // 2 + 4 * -(-numel // blocksize)


def _mora_flops(case: Case) -> tuple[int, int]:
    """Of MoRA alone, forward and backward.

    Forward: the sums of the compression, the rotation (4 products and 2 sums a pair of columns), the product
    with M. Backward the same way round from dY, with the product for dX and the one for dM. Copies are free.
    """
    M, N, K, side = case.M, case.shape.N, case.shape.K, case.side
    if case.mora_type != 6:
        return M * K + 2 * M * side**2, M * N + 4 * M * side**2
    columns = -(-K // side) * side
    product, rotation = 2 * M * columns * side, 3 * M * columns
    return rotation + product, max(0, M * (N - columns)) + 2 * product + rotation


def flops(case: Case) -> int:
    """Multiplications and additions that the mathematics asks for, decoding not counted."""
    M, N, K, R = case.M, case.shape.N, case.shape.K, case.rank
    base, adapter = 2 * M * N * K, 2 * M * R * (K + N)
    if case.op in MORA_OPS:
        forward, backward = _mora_flops(case)
        # over a base weight its product, once for Y and once for dX, and the sum with it
        over = (base + M * N, base + M * K) if weight_passes(case.op) else (0, 0)
        steps = 2 if case.op in BACKWARD_OPS else 1
        return sum((forward, backward)[:steps]) + sum(over[:steps])
    return {
        "linear_4bit": base,
        "dx": base,
        "lora_linear": base + adapter,
        # forward: base + adapter; dX: base + adapter (shrink dY, expand); dA and dB: one more adapter
        "train_step": 2 * base + 3 * adapter,
        "dequantize": N * K,
        "quantize": N * K,
    }[case.op]


def activation_bytes(case: Case) -> int:
    """Bytes of X, Y and their gradients that cross memory at least once, and of the adapter."""
    M, N, K, R, size = case.M, case.shape.N, case.shape.K, case.rank, BYTES[case.dtype]
    adapter = R * (K + N) * size
    if case.op in MORA_OPS:
        matrix = case.side**2 * size
        if case.op not in BACKWARD_OPS:
            return M * (K + N) * size + matrix
        # X, Y, dY, dX, and z written and read, where type 6 reads X again; M twice and dM
        kept = K if case.mora_type == 6 else 2 * case.side
        return (2 * M * (K + N) + M * kept) * size + 3 * matrix
    return {
        "linear_4bit": M * (K + N) * size,
        "dx": M * (K + N) * size,
        "lora_linear": M * (K + N) * size + adapter,
        "train_step": 3 * M * (K + N) * size + 4 * adapter,
        "dequantize": N * K * size,
        "quantize": N * K * size,
    }[case.op]


def weight_passes(op: str) -> int:
    """How often one call must pass over the weight."""
    return {"train_step": 2, "mora_linear_step": 2, "mora": 0, "mora_step": 0}.get(op, 1)


@dataclass(frozen=True)
class Goal:
    """One number to reach, stated for a machine with AVX-512 and AMX, bf16, 2 threads.

    metric: "ratio"  median time of `peer` / median time of peftkern, at least `value`
            "over"   time of peftkern / time of `peer`, at most `value`
            "share"  share of the compute ceiling measured in the same run, at least `value`
            "us"     microseconds a call, at most `value`
            "kept"   elements that backward keeps beyond x, in M·r̂, at most `value`: of memory's rows
    """

    op: str
    shapes: tuple[str, ...]
    M: tuple[int, ...]
    metric: str
    peer: str
    value: float
    cold: bool = True
    types: tuple[int, ...] = (0,)  # of MoRA


_BIG = ("4096x4096", "14336x4096", "4096x14336")
_SMALL = ("576x576", "1536x576", "576x1536")
_SQUARE = ("4096x4096",)
_TABLE: tuple[tuple[tuple[int, ...], tuple[float, float, float, float]], ...] = (
    ((1,), (3.3, 22, 1.6, 1.4)),
    ((4, 8), (2.6, 15, 1.8, 1.4)),
    ((16, 32), (2.8, 13, 5, 4.5)),
    ((64,), (2.3, 8, 7, 7)),
    ((128, 256), (1.7, 5, 10, 10)),
    ((512, 1024, 2048), (1.5, 1.8, 11, 11)),
)
GOALS: tuple[Goal, ...] = (
    *(
        Goal("linear_4bit", _BIG, M, "ratio", peer, value)
        for M, values in _TABLE
        for peer, value in zip((DENSE, BNB, BNB_EVAL, INT4PACK), values, strict=True)
    ),
    Goal("linear_4bit", _BIG, (1,), "over", READ, 1.25),
    Goal("linear_4bit", _BIG, (1,), "over", READ, 1.6, cold=False),
    Goal("linear_4bit", _BIG, (1024, 2048), "share", PEAK, 0.60),
    Goal("linear_4bit", _BIG, (256,), "share", PEAK, 0.50),
    Goal("linear_4bit", _BIG, (32,), "share", PEAK, 0.30),
    Goal("dx", _SQUARE, (64, 256, 512), "ratio", DENSE, 1.5),
    Goal("dequantize", _SQUARE, (0,), "ratio", BNB, 8),
    Goal("lora_linear", _SQUARE, (1,), "over", LINEAR, 1.10),
    Goal("lora_linear", _SQUARE, (64, 256, 512), "over", LINEAR, 1.04),
    Goal("train_step", _SQUARE, (64,), "ratio", PEFT, 6),
    Goal("train_step", _SQUARE, (512,), "ratio", PEFT, 2.8),
    Goal("linear_4bit", ("64x64",), (1,), "us", OURS, 10, cold=False),
    Goal("lora_linear", ("64x64",), (1,), "us", OURS, 10, cold=False),
    Goal("train_step", ("64x64",), (1,), "us", OURS, 30, cold=False),
    Goal("linear_4bit", _SMALL, (1, 4, 16, 64, 256, 512), "ratio", DENSE, 1.0),
    Goal("mora_linear", _SQUARE, (1,), "over", LINEAR, 1.15, types=(1, 2, 3, 4)),
    Goal("mora_linear", _SQUARE, (64, 256, 512), "over", LINEAR, 1.06, types=(1, 2, 3, 4)),
    Goal("mora_linear", _SQUARE, (1,), "over", LINEAR, 1.3, types=(6,)),
    Goal("mora_linear", _SQUARE, (64, 256, 512), "over", LINEAR, 1.15, types=(6,)),
    Goal("mora", _SQUARE, (512,), "ratio", EAGER, 3, types=(1, 6)),
    Goal("mora_step", _SQUARE, (512,), "ratio", EAGER, 2.5, types=(1, 6)),
    Goal("mora", _SQUARE, (512,), "ratio", COMPILED, 1, types=(1, 6)),
    Goal("mora_step", _SQUARE, (512,), "ratio", COMPILED, 1, types=(1, 6)),
    Goal("memory", _SQUARE, (512,), "kept", OURS, 1, cold=False, types=(1, 2, 3, 4)),
)


def shapes_by_name(text: str) -> list[Shape]:
    """ "llama", "smollm2", "tiny" or NxK, separated by commas."""
    known = {shape.name: shape for group in MODELS.values() for shape in group}
    shapes: list[Shape] = []
    for word in text.replace(" ", "").lower().split(","):
        if word in MODELS:
            shapes += MODELS[word]
            continue
        sides = word.split("x")
        if len(sides) != 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
            raise ValueError(f"shape: expected one of {', '.join(MODELS)} or NxK, got {word!r}")
        shapes.append(known.get(word, Shape(int(sides[0]), int(sides[1]), "asked for")))
    return shapes


def select(
    ops: Sequence[str],
    shapes: Iterable[Shape],
    tokens: Sequence[int],
    caches: Sequence[bool],
    dtype: str,
    rank: int | None,
    quant_type: str,
    blocksize: int,
    mora_types: Sequence[int] = (1, 6),
) -> list[Case]:
    """Every combination, one case without tokens for dequantize and quantize; types for MoRA alone."""
    return [
        Case(op, shape, M, cold, dtype, rank or default_rank(op), quant_type, blocksize, mora_type)
        for shape in shapes
        for op in ops
        for mora_type in (mora_types if op in MORA_OPS else (0,))
        for M in ((0,) if op in ("dequantize", "quantize") else tokens)
        for cold in caches
    ]


def default_cases() -> list[Case]:
    """What `make bench` measures: the most telling cases first, since a time limit cuts from the end."""
    square, gate, down, _ = LLAMA
    tiny = TINY[0]
    cases = [Case(op, tiny, 1, cold=False) for op in ("linear_4bit", "lora_linear", "train_step")]
    cases += [Case("linear_4bit", square, M, cold=True) for M in (1, 4, 16, 64, 256, 1024)]
    cases += [Case("linear_4bit", square, 1, cold=False)]
    cases += [Case("lora_linear", square, M, cold=True) for M in (1, 16, 64, 256)]
    cases += [Case("dx", square, M, cold=True) for M in (64, 512)]
    cases += [Case("train_step", square, M, cold=True) for M in (64, 512)]
    cases += [mora_case("mora_linear", square, M, kind) for kind in (1, 6) for M in (1, 64)]
    cases += [mora_case(op, square, 512, kind) for op in ("mora", "mora_step") for kind in (1, 6)]
    cases += [Case("dequantize", square, 0, cold=True), Case("quantize", square, 0, cold=True)]
    cases += [Case("linear_4bit", s, M, cold=True) for s in SMOLLM2[:3] for M in (1, 4, 16, 64, 256, 512)]
    cases += [Case("linear_4bit", s, M, cold=True) for s in (gate, down) for M in (1, 16, 64, 256)]
    return cases


def full_cases() -> list[Case]:
    """Every shape, M and cache state in bf16, then the other dtypes and formats where they differ."""
    big, small = LLAMA, SMOLLM2
    cases = [Case(op, TINY[0], 1, cold=False) for op in ("linear_4bit", "lora_linear", "dx", "train_step")]
    for shape in (*big, *small):
        for op in ("linear_4bit", "lora_linear"):
            cases += [Case(op, shape, M, cold) for M in M_FULL for cold in (True, False)]
        for op in ("dx", "train_step"):
            cases += [Case(op, shape, M, True) for M in (1, 16, 64, 256, 512, 2048)]
        cases += [Case(op, shape, 0, True) for op in ("dequantize", "quantize")]
        for mora_type in (1, 6):
            cases += [mora_case("mora_linear", shape, M, mora_type) for M in M_FULL]
            cases += [mora_case("mora_linear_step", shape, M, mora_type) for M in (1, 64, 512)]
            # hot where so small a matrix would need too many copies
            cases += [
                mora_case(op, shape, M, mora_type, cold=shape in big)
                for op in ("mora", "mora_step")
                for M in (1, 64, 512)
            ]
    square = big[0]
    cases += [mora_case("mora_linear", square, M, kind) for kind in (2, 3, 4) for M in (1, 64, 256, 512)]
    cases += [mora_case(op, square, 512, kind) for op in ("mora", "mora_step") for kind in (2, 3, 4)]
    cases += [
        mora_case("mora_linear", square, M, mora_type, dtype=dtype)
        for dtype in ("fp32", "fp16")
        for mora_type in (1, 6)
        for M in (1, 64, 256)
    ]
    for dtype in ("fp32", "fp16"):
        for op in ("linear_4bit", "dx"):
            cases += [Case(op, square, M, True, dtype=dtype) for M in (1, 16, 64, 256)]
    for quant_type, blocksize in (("fp4", 64), ("nf4", 32), ("nf4", 256), ("nf4", 4096)):
        options = {"quant_type": quant_type, "blocksize": blocksize}
        cases += [Case("linear_4bit", square, M, True, **options) for M in (1, 16, 256)]  # type: ignore[arg-type]
    return cases


def memory_cases(shape: Shape, M: int, mora_types: Iterable[int]) -> list[Case]:
    """Training steps whose memory is measured: LoRA's and, for each type, MoRA's."""
    steps = [mora_case("mora_linear_step", shape, M, mora_type, cold=False) for mora_type in mora_types]
    return [Case("train_step", shape, M, cold=False), *steps]


def goal_cases(ops: Sequence[str] = OPS) -> list[Case]:
    """Exactly what GOALS say of `ops`, weight by weight, the biggest last: a time limit cuts from the end.

    "memory" among them gives MoRA's training steps, whose memory a goal speaks of.
    """
    known = {shape.name: shape for group in MODELS.values() for shape in group}
    cases = {
        Case(goal.op, known[name], M, goal.cold, rank=default_rank(goal.op, mora_type), mora_type=mora_type)
        for goal in GOALS
        if goal.op in ops
        for name in goal.shapes
        for M in goal.M
        for mora_type in goal.types
    }

    def order(case: Case) -> tuple[bool, int, str, bool, int, int, int]:
        size = case.shape.N * case.shape.K
        big = size > 4096 * 4096
        where = (big, -size if not big else size, case.shape.name, case.cold)
        return (*where, (*OPS, "memory").index(case.op), case.mora_type, case.M)

    return sorted(cases, key=order)


def summary(cases: Iterable[Case]) -> str:
    """Several cases in few words: one part for each op, shape and cache state, with all its M."""
    tokens: dict[str, list[str]] = {}
    for case in cases:
        kind = f" type {case.mora_type}" if case.mora_type else ""
        where = f"{case.op} {case.shape.name}{kind} {case.dtype} {'cold' if case.cold else 'hot'}"
        tokens.setdefault(where, []).extend([str(case.M)] if case.M else [])
    return "; ".join(where + (f" M={','.join(M)}" if M else "") for where, M in tokens.items())
