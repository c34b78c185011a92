"""Tests run seeded, on poisoned memory; `isa`, `backend`, `each_backend` run each once for each of theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import peftkern
from peftkern.backends import cpu, triton
from peftkern.ops import library

ISAS: list[str] = [] if cpu.missing() is not None else cpu._cpu.isa_levels()

# derandomized: the same examples on every run, so that a failure stays one; isa holds over all examples
settings.register_profile(
    "peftkern", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("peftkern")

BACKENDS = ["reference", *(f"cpu-{isa}" for isa in ISAS)]
if triton.INTERPRETED:
    if triton.missing() is not None:
        raise pytest.UsageError(f"TRITON_INTERPRET=1, but {triton.missing()}")
    BACKENDS.append("triton")
elif torch.cuda.is_available():
    # torch refuses cuBLAS in deterministic mode without it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    BACKENDS.append("triton-cuda")


# the backends of `backend`, the cpu one at its best level alone
EACH_BACKEND = ["reference", *(["cpu"] if ISAS else []), *(name for name in BACKENDS if "triton" in name)]


def pytest_report_header() -> str:
    missing = cpu.missing()
    return f"peftkern: cpu levels {', '.join(ISAS)}" if missing is None else f"peftkern: {missing}"


# compute-sanitizer's initcheck looks for memory that nobody filled
POISONED = os.environ.get("PEFTKERN_POISON", "1") != "0"


def _empty_poisoned(*args: Any) -> torch.Tensor:
    return _empty_strided_cpu(*args).fill_(torch.nan)  # type: ignore[no-any-return]


_empty_strided_cpu = library._empty_strided_cpu


@pytest.fixture(autouse=True)
def _seeded_and_poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN (255 in bytes): what is not written shows. Deterministic mode makes torch fill
    it, but for results on the CPU, which library.fresh allocates."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    if POISONED:
        monkeypatch.setattr(library, "_empty_strided_cpu", _empty_poisoned)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", POISONED)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS or ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set level of this machine, in use."""
    if not ISAS:
        if os.environ.get("PEFTKERN_REQUIRE_EXT") == "1":
            pytest.fail(str(cpu.missing()))
        pytest.skip(str(cpu.missing()))
    with cpu.use_isa(request.param):
        yield request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend, forced; the cpu one at each level, the triton one on the GPU, or on the CPU under
    TRITON_INTERPRET=1."""
    yield from _forced(request.param)


@pytest.fixture(params=EACH_BACKEND)
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend, forced, once: for what lies above the primitives, modules and merging."""
    yield from _forced(request.param)


def _forced(which: str) -> Iterator[str]:
    name, _, level = which.partition("-")
    with peftkern.use_backend(name):
        if level == "cuda":
            # every tensor that a test makes without saying where
            with torch.device("cuda"):
                yield which
        elif level:
            with cpu.use_isa(level):
                yield which
        else:
            yield which
