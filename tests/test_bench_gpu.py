"""bench.gpu's candidates, on the CPU: each computes what its op asks for. Nothing here is measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # bench is not installed; last, so that peftkern stays the one under test

for module in ("rich", "typer"):
    pytest.importorskip(module, reason=f"bench needs {module} (pip install peftkern[bench])")

from bench import gpu  # noqa: E402
from bench.cases import Shape  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", gpu.OPS)
def test_every_candidate_agrees_with_ours(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MOST_COPIES", 2)
    # autograd of bf16 leaves alone: nothing that needs a fixed order
    torch.use_deterministic_algorithms(False)
    weights = gpu.Weights(Shape(128, 256, "small"), CPU)
    first = None
    for candidate in gpu.candidates(op, weights, 5, CPU):
        result = candidate.make()(1)
        results = result if isinstance(result, tuple) else (result,)
        assert gpu.finite(results), candidate.name
        if candidate.name.startswith("peftkern") and "without" not in candidate.name:
            first = results
        elif "without" not in candidate.name:
            assert first is not None
            assert gpu.agree(first, results) is None, candidate.name
            spoiled = (first[0] * 1.05, *first[1:])
            assert gpu.agree(spoiled, results) is not None, "5 % off must not pass"


def test_no_gpu_no_numbers() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: make bench-gpu measures on it")
    with pytest.raises(Exception, match="no CUDA device"):
        gpu.main()
