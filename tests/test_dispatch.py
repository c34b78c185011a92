"""Who runs a call: the automatic choice, forced backends, explain, and what is said when nobody can."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import peftkern
from peftkern import dispatch, explain, lora_linear, use_backend
from peftkern.backends import Backend, Call, cpu, reference, unavailable

needs_ext = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def arguments() -> dict[str, object]:
    return {
        "x": torch.randn(3, 64),
        "weight": peftkern.quantize_4bit(torch.randn(8, 64)),
        "lora_A": torch.randn(4, 64),
        "lora_B": torch.randn(8, 4),
    }


@needs_ext
def test_the_compiled_kernels_come_first() -> None:
    assert dispatch.find("linear", CPU, torch.bfloat16) is cpu.linear
    assert dispatch.forced_backend() is None


def test_use_backend_forces_nests_and_restores() -> None:
    automatic = dispatch.find("linear", CPU, torch.float32)
    with use_backend("reference"):
        assert dispatch.forced_backend() == "reference"
        assert dispatch.find("linear", CPU, torch.float32) is reference.BACKEND.rows["linear"]
        with use_backend(None):
            assert dispatch.find("linear", CPU, torch.float32) is automatic
        assert dispatch.forced_backend() == "reference"
    assert dispatch.forced_backend() is None
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert dispatch.forced_backend() is None


def test_use_backend_holds_for_one_thread() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


@needs_ext
def test_backward_runs_after_the_block() -> None:
    """The choice is made for each pass, where it runs."""
    a = {name: t.requires_grad_() if isinstance(t, torch.Tensor) else t for name, t in arguments().items()}
    with use_backend("reference"):
        y = lora_linear(**a)  # type: ignore[arg-type]
    wanted = [a["x"], a["lora_A"], a["lora_B"]]
    found = torch.autograd.grad(y.sum(), wanted, retain_graph=True)  # type: ignore[arg-type]
    expected = torch.autograd.grad(lora_linear(**a).sum(), wanted)  # type: ignore[arg-type]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", ["cuda", "CPU", "", 3])
def test_unknown_backend(name: object) -> None:
    with (
        pytest.raises(ValueError, match=f"name: expected one of cpu, triton, reference, got {name!r}"),
        use_backend(name),
    ):  # type: ignore[arg-type]
        pass


@needs_ext
def test_forced_backend_that_cannot_raises_with_every_reason() -> None:
    with use_backend("cpu"), pytest.raises(RuntimeError) as caught:
        dispatch.find("linear", torch.device("meta"), torch.float32)
    text = str(caught.value)
    assert "the forced backend 'cpu' cannot run linear float32 on meta" in text
    assert "cpu: it runs tensors on cpu, these are on meta" in text
    assert "reference: 'cpu' is forced" in text


def test_nobody_can() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"no backend can run linear int8 on cpu:\n  cpu: .*\n  triton: .*\n  reference: it takes",
    ):
        dispatch.find("linear", CPU, torch.int8)
    with pytest.raises(RuntimeError, match="reference: it has no transpose"):
        dispatch.find("transpose", CPU, torch.float32)


def test_explain_tells_what_would_run() -> None:
    for op in ("lora_linear", lora_linear):
        told = explain(op, **arguments(), dropout=0.5)
        assert [choice.call.primitive for choice in told.choices] == ["linear"]
    told = explain("lora_linear", **arguments())
    for choice in told.choices:
        assert choice.backend == ("cpu" if cpu.missing() is None else "reference")
        assert set(choice.others) | {choice.backend} == {backend.name for backend in dispatch.BACKENDS}
    with use_backend("reference"):
        told = explain("lora_linear", **arguments())
    assert told.forced == told.backend == "reference"
    assert (
        told.choices[0]
        .others["cpu"]
        .startswith("'reference' is forced" if cpu.missing() is None else "the ext")
    )
    assert "forced backend: reference" in str(told)
    assert "not cpu: " in repr(told)


@needs_ext
@pytest.mark.parametrize("level", cpu._cpu.isa_levels() if cpu._cpu else [])
def test_explain_names_the_kernel(level: str) -> None:
    with cpu.use_isa(level):
        told = explain("lora_linear", **arguments())
        kernel = cpu._cpu.kernel("matmul", torch.float32)
        assert told.choices[0].detail == kernel
        told = explain("lora_linear", **{**arguments(), "weight": torch.randn(8, 64)})
        assert told.choices[0].detail == f"torch's GEMM, the adapter by {kernel}"


def test_explain_knows_every_op() -> None:
    W = torch.randn(8, 64)
    weight = peftkern.quantize_4bit(W)
    x, M = torch.randn(3, 64), torch.randn(6, 6)
    for told, primitives in [
        (explain("quantize_4bit", W), ["quantize"]),
        (explain("dequantize_4bit", weight), ["dequantize"]),
        (explain("linear_4bit", x, weight), ["linear"]),
        (explain("lora_linear", x, W, torch.randn(4, 64), torch.randn(8, 4)), ["linear"]),
        (explain("mora", x, M, 8, 6), ["mora"]),
        (explain("mora", x, M, 8), ["mora"]),
        (explain("mora_linear", x, weight, M, "rotation"), ["mora"]),
        (explain("mora_linear", x, W, M, "decoupling"), ["mora"]),
        (explain("mora_linear", x, W, M, 2), ["mora"]),
        (explain("mora_delta", M, 64, 8), []),
        (explain("lora_delta", torch.randn(4, 64), torch.randn(8, 4)), []),
        (explain("merge", W, W), []),
        (explain("merge", weight, W), ["dequantize", "quantize"]),
        (explain("merge_error", weight, W, weight), ["dequantize"]),
    ]:
        assert [choice.call.primitive for choice in told.choices] == primitives
        assert str(told).startswith(told.op)
        for choice in told.choices:
            assert choice.backend == ("cpu" if cpu.missing() is None else "reference")
    assert set(dispatch.CALLS) <= set(peftkern.__all__)
    with pytest.raises(
        ValueError, match=r"op: expected one of dequantize_4bit, linear_4bit, .*, got 'softmax'"
    ):
        explain("softmax", x)


def test_explain_names_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The primitives that a call looks up are those that explain names, in their dtypes."""
    W, x, M = torch.randn(8, 64).bfloat16(), torch.randn(3, 64).bfloat16(), torch.randn(6, 6)
    weight, A, B = peftkern.quantize_4bit(W), torch.randn(4, 64), torch.randn(8, 4)
    for op, *given in [
        (peftkern.quantize_4bit, W),
        (peftkern.dequantize_4bit, weight),
        (peftkern.linear_4bit, x, weight),
        (peftkern.lora_linear, x, weight, A, B),
        (peftkern.lora_linear, x, W, A, B, 1.0, None, 0.5),
        (peftkern.mora, x, M, 8, 2),
        (peftkern.mora, x, M, 8, 6),
        (peftkern.mora_linear, x, weight, M, 1),
        (peftkern.mora_linear, x, weight, M, 6),
        (peftkern.mora_linear, x, W, M, "decoupling"),
        (peftkern.mora_delta, M, 64, 8, 6),
        (peftkern.lora_delta, A, B),
        (peftkern.merge, weight, torch.randn(8, 64)),
        (peftkern.merge, W, torch.randn(8, 64)),
        (peftkern.merge_error, weight, torch.randn(8, 64), W),
    ]:
        monkeypatch.setattr(dispatch, "_found", {})
        op(*given)
        found = {Call(*key[1:]) for key in dispatch._found}
        told = {choice.call._replace(rows=0, weight=None) for choice in explain(op, *given).choices}
        assert found == told, op.__name__


def test_explain_says_what_running_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that refuses: its reason is in explain, and in the error when nobody is left."""

    def refuses(call: Call) -> str | None:
        return f"it is no friend of {call.dtype}"

    linear = list(arguments().values())[:2]
    picky = Backend(
        "picky", {"linear": reference.BACKEND.rows["linear"]}, refuses, lambda call: "", lambda: None
    )
    monkeypatch.setattr(dispatch, "BACKENDS", (picky,))
    monkeypatch.setattr(dispatch, "_found", {})
    told = explain("linear_4bit", *linear)
    assert told.backend is None
    assert told.choices[0].others == {"picky": "it is no friend of torch.float32"}
    assert "nobody can" in str(told)
    with pytest.raises(RuntimeError, match=r"picky: it is no friend of torch.float32"):
        dispatch.find("linear", CPU, torch.float32)


def test_missing_extension_warns_once_and_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_missing", "the extension peftkern._cpu is not available (test)")
    monkeypatch.setattr(dispatch, "_found", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    call = Call("linear", CPU, torch.float32)
    assert unavailable(cpu.BACKEND, call) == cpu.missing()
    with pytest.warns(
        RuntimeWarning, match=r"slow reference backend: cpu: the extension peftkern\._cpu is not available"
    ):
        assert dispatch.find(*call[:3]) is reference.BACKEND.rows["linear"]
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"cpu: the extension"):
        dispatch.find(*call[:3])
    monkeypatch.setattr(dispatch, "_found", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.find(*call[:3])
    assert "the extension peftkern._cpu" in str(explain("linear_4bit", *list(arguments().values())[:2]))


def test_what_nobody_else_runs_warns_once_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_found", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    elsewhere = torch.device("mps")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with use_backend("reference"):  # asked for
            dispatch.find("linear", elsewhere, torch.float32)
    text = "runs linear float32 on mps by its slow reference backend: .*cpu: it runs tensors on cpu"
    with pytest.warns(RuntimeWarning, match=text):
        dispatch.find("linear", elsewhere, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.find("linear_grad", elsewhere, torch.float32)


def test_explain_binds_as_the_op_does() -> None:
    a = arguments()
    with pytest.raises(TypeError, match="lora_linear: missing a required argument: 'lora_B'"):
        explain("lora_linear", a["x"], a["weight"], a["lora_A"])
    with pytest.raises(TypeError, match="merge_error: got an unexpected keyword argument 'scale'"):
        explain(peftkern.merge_error, a["weight"], a["weight"], a["weight"], scale=2)


@needs_ext
def test_use_isa_restores() -> None:
    before = cpu._cpu.isa()
    with cpu.use_isa("scalar"):
        assert cpu._cpu.isa() == "scalar"
        with cpu.use_isa(None):
            assert cpu._cpu.isa() == cpu._cpu.isa_levels()[-1]
        assert cpu._cpu.isa() == "scalar"
    assert cpu._cpu.isa() == before
    with pytest.raises(ValueError, match="sse"), cpu.use_isa("sse"):
        pass
    assert cpu._cpu.isa() == before


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import peftkern; print(peftkern.dispatch.forced_backend())"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PEFTKERN_BACKEND": "reference"},
    )
    assert run.stdout.strip() == "reference", run.stderr
    monkeypatch.setenv("PEFTKERN_BACKEND", "")
    assert dispatch._from_environment() is None
    monkeypatch.setenv("PEFTKERN_BACKEND", "gpu")
    with pytest.raises(
        ValueError, match="PEFTKERN_BACKEND: expected one of cpu, triton, reference, got 'gpu'"
    ):
        dispatch._from_environment()
