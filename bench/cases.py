"""What is measured: operations, shapes of real models, counts of bytes and operations, and the goals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OURS = "peftkern"
DENSE = "torch dense"
DENSE_F32 = "torch dense fp32"
BNB = "bnb default"
BNB_EVAL = "bnb packed eval"
INT4PACK = "torch int4pack"
PEFT = "peft + bnb"
LINEAR = "peftkern linear_4bit"
READ = "read the bytes"
PEAK = "peak"

OPS = ("linear_4bit", "lora_linear", "dx", "train_step", "dequantize", "quantize")
OP_MEANING = {
    "linear_4bit": "Y = X Wᵀ, W in 4 bits, no gradient",
    "lora_linear": "Y = X Wᵀ + s·(X Aᵀ) Bᵀ, no gradient",
    "dx": "dX = dY W, from the same packed bytes",
    "train_step": "lora_linear forward, then the gradients of x, A and B",
    "dequantize": "4 bits to a dense [N, K]",
    "quantize": "a dense [N, K] to 4 bits",
}


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
    rank: int = 16
    quant_type: str = "nf4"
    blocksize: int = 64

    @property
    def key(self) -> tuple[str, str, int, str, str, int, str, int]:
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
        )

    @property
    def title(self) -> str:
        tokens = f" M={self.M}" if self.M else ""
        rank = f" r={self.rank}" if self.op in ("lora_linear", "train_step") else ""
        return f"{self.op} {self.shape.name}{tokens}{rank} {self.dtype} {'cold' if self.cold else 'hot'}"


BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def packed_bytes(shape: Shape, blocksize: int = 64) -> int:
    """Half a byte a weight and one fp32 a block."""
    numel = shape.N * shape.K
    return (numel + 1) // 2 + 4 * -(-numel // blocksize)


def flops(case: Case) -> int:
    """Multiplications and additions that the mathematics asks for, decoding not counted."""
    M, N, K, R = case.M, case.shape.N, case.shape.K, case.rank
    base, adapter = 2 * M * N * K, 2 * M * R * (K + N)
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
    return 2 if op == "train_step" else 1


@dataclass(frozen=True)
class Goal:
    """One number to reach, stated for a machine with AVX-512 and AMX, bf16, 2 threads.

    metric: "ratio"  median time of `peer` / median time of peftkern, at least `value`
            "over"   time of peftkern / time of `peer`, at most `value`
            "share"  share of the compute ceiling measured in the same run, at least `value`
            "us"     microseconds a call, at most `value`
    """

    op: str
    shapes: tuple[str, ...]
    M: tuple[int, ...]
    metric: str
    peer: str
    value: float
    cold: bool = True


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
    rank: int,
    quant_type: str,
    blocksize: int,
) -> list[Case]:
    """Every combination, one case without tokens for dequantize and quantize."""
    return [
        Case(op, shape, M, cold, dtype, rank, quant_type, blocksize)
        for shape in shapes
        for op in ops
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
    square = big[0]
    for dtype in ("fp32", "fp16"):
        for op in ("linear_4bit", "dx"):
            cases += [Case(op, square, M, True, dtype=dtype) for M in (1, 16, 64, 256)]
    for quant_type, blocksize in (("fp4", 64), ("nf4", 32), ("nf4", 256), ("nf4", 4096)):
        options = {"quant_type": quant_type, "blocksize": blocksize}
        cases += [Case("linear_4bit", square, M, True, **options) for M in (1, 16, 256)]  # type: ignore[arg-type]
    return cases


def goal_cases() -> list[Case]:
    """Exactly what GOALS speak of, weight by weight, the biggest last: a time limit cuts from the end."""
    known = {shape.name: shape for group in MODELS.values() for shape in group}
    cases = {
        Case(goal.op, known[name], M, goal.cold) for goal in GOALS for name in goal.shapes for M in goal.M
    }

    def order(case: Case) -> tuple[bool, int, str, bool, int, int]:
        size = case.shape.N * case.shape.K
        big = size > 4096 * 4096
        return (big, -size if not big else size, case.shape.name, case.cold, OPS.index(case.op), case.M)

    return sorted(cases, key=order)


def summary(cases: Iterable[Case]) -> str:
    """Several cases in few words: one part for each op, shape and cache state, with all its M."""
    tokens: dict[str, list[str]] = {}
    for case in cases:
        where = f"{case.op} {case.shape.name} {case.dtype} {'cold' if case.cold else 'hot'}"
        tokens.setdefault(where, []).extend([str(case.M)] if case.M else [])
    return "; ".join(where + (f" M={','.join(M)}" if M else "") for where, M in tokens.items())
