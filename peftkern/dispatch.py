"""Who runs a call: the registry of backends, in order of preference, and the reasons of those that cannot.

The choice depends on (primitive, device, dtype) and on the forced backend, so it is made once for each such
key and then is one dictionary look-up. A forced backend (`use_backend`, PEFTKERN_BACKEND) that cannot run a
call raises.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import torch

from peftkern.backends import Backend, Call, Primitive, cpu, reference, triton, unavailable

BACKENDS: tuple[Backend, ...] = (cpu.BACKEND, triton.BACKEND, reference.BACKEND)  # best first

# op name → the op, and the primitives that a call of it with all these arguments would need, after its checks
CALLS: dict[str, tuple[Callable[..., Any], Callable[..., tuple[Call, ...]]]] = {}
_Op = TypeVar("_Op", bound=Callable[..., Any])


def explained_by(calls: Callable[..., tuple[Call, ...]]) -> Callable[[_Op], _Op]:
    """Enters a public op in CALLS."""

    def enter(op: _Op) -> _Op:
        CALLS[op.__name__] = op, calls
        return op

    return enter


def _check_name(argument: str, name: object) -> None:
    names = [backend.name for backend in BACKENDS]
    if name not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(names)}, got {name!r}")


def _from_environment() -> str | None:
    name = os.environ.get("PEFTKERN_BACKEND") or None
    if name is not None:
        _check_name("PEFTKERN_BACKEND", name)
    return name


_default = _from_environment()
_forced: ContextVar[str | None] = ContextVar("peftkern_backend", default=_default)
_found: dict[tuple[str | None, str, torch.device, torch.dtype], Primitive] = {}
_warned: set[str] = set()  # device types


def find(primitive: str, device: torch.device, dtype: torch.dtype) -> Primitive:
    """The callable that runs `primitive` here and now; RuntimeError with every reason if there is none."""
    found = _found.get((_forced.get(), primitive, device, dtype))
    return found if found is not None else _resolve(Call(primitive, device, dtype))


def _resolve(call: Call) -> Primitive:
    forced = _forced.get()
    backend, others = _choose(call)
    if backend is None:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in others.items())
        subject = f"the forced backend {forced!r} cannot run" if forced is not None else "no backend can run"
        raise RuntimeError(f"{subject} {call}:{reasons}")
    if forced is None and backend is reference.BACKEND and call.device.type not in _warned:
        _warned.add(call.device.type)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in others.items())
        message = f"peftkern runs {call} by its slow {backend.name} backend: {reasons}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    row = backend.rows[call.primitive]
    _found[forced, call.primitive, call.device, call.dtype] = row
    return row


def _choose(call: Call) -> tuple[Backend | None, dict[str, str]]:
    """The backend that runs `call`, and for each other one why it does not."""
    forced = _forced.get()
    chosen: Backend | None = None
    others: dict[str, str] = {}
    for backend in BACKENDS:
        reason = unavailable(backend, call)
        if reason is None and forced is not None and backend.name != forced:
            reason = f"{forced!r} is forced"
        if reason is None and chosen is not None:
            reason = f"it could, but {chosen.name} comes first"
        if reason is None:
            chosen = backend
        else:
            others[backend.name] = reason
    return chosen, others


def forced_backend() -> str | None:
    """The backend that `use_backend` or PEFTKERN_BACKEND forces here; None when the choice is automatic."""
    return _forced.get()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the block on backend `name`, or raise where it cannot run one.

    name is "cpu", "triton" or "reference"; None restores the automatic choice. It holds for the current
    thread (or asyncio task) and nests. A backward pass chooses where it runs: call it inside the block too.
    For tensors on a GPU autograd runs it on a thread of its own, which no block reaches: there
    PEFTKERN_BACKEND alone forces it. Raises ValueError for an unknown name.
    """
    if name is not None:
        _check_name("name", name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@dataclass(frozen=True)
class Choice:
    """Who would run one primitive of an op."""

    call: Call
    backend: str | None  # None: nobody can
    detail: str  # the kernel that would run
    others: dict[str, str]  # backend → why it would not run


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `print` it, or read `backend` and `choices`."""

    op: str
    forced: str | None
    choices: tuple[Choice, ...]

    @property
    def backend(self) -> str | None:
        """The backend that would run the whole op; None if some primitive of it has none, if they differ, or
        if torch's own operators are all that it needs."""
        names = {choice.backend for choice in self.choices}
        return names.pop() if len(names) == 1 else None

    def __str__(self) -> str:
        lines = [f"{self.op}" + (f" (forced backend: {self.forced})" if self.forced is not None else "")]
        for choice in self.choices:
            where = "nobody can" if choice.backend is None else choice.backend
            lines.append(f"  {choice.call}: {where}" + (f" ({choice.detail})" if choice.detail else ""))
            lines += [f"    not {name}: {reason}" for name, reason in choice.others.items()]
        if not self.choices:
            lines.append("  torch's own operators: no backend has a part in it")
        return "\n".join(lines)

    __repr__ = __str__


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run `op(*args, **kwargs)` and, for each other one, the reason it would not.

    op is a public op or its name. The arguments are checked as the op checks them and nothing is computed.
    It speaks of that call, the forward pass: backward chooses where and when it runs, among these primitives
    and linear_grad, mora_grad and compress.
    Raises ValueError for an unknown op, and what the op itself raises for bad arguments.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in CALLS:
        raise ValueError(f"op: expected one of {', '.join(sorted(CALLS))}, got {name!r}")
    function, calls = CALLS[name]
    try:
        given = signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    given.apply_defaults()
    choices = []
    for call in calls(*given.args):
        backend, others = _choose(call)
        detail = "" if backend is None else backend.detail(call)
        choices.append(Choice(call, None if backend is None else backend.name, detail, others))
    return Explanation(name, _forced.get(), tuple(choices))
