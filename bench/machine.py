"""Where a number was measured: CPU, caches, instruction set, threads, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "bitsandbytes", "peft", "numpy")


@dataclass(frozen=True)
class Machine:
    cpu: str
    slug: str  # a folder's name
    cores: int
    threads: int
    isa: str  # the level that peftkern uses
    l2_bytes: int  # of one core
    llc_bytes: int
    memory_bytes: int
    commit: str
    compiler: str
    versions: str
    when: str

    def columns(self) -> dict[str, str | int]:
        return {
            "machine": self.cpu,
            "cores": self.cores,
            "threads": self.threads,
            "isa": self.isa,
            "llc_mib": self.llc_bytes >> 20,
            "commit": self.commit,
            "compiler": self.compiler,
            "versions": self.versions,
            "when": self.when,
        }


def _cpuinfo() -> dict[str, str]:
    info: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return info


def _caches() -> Iterator[tuple[int, int]]:
    """(level, bytes) of every data cache that core 0 sees."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (index / "type").read_text().strip() == "Instruction":
                continue
            size = (index / "size").read_text().strip()
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1], 1)
            yield int((index / "level").read_text()), int(re.sub(r"\D", "", size)) * unit
        except (OSError, ValueError, IndexError):
            continue


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The short commit, with "+" when a tracked source file differs from it."""
    short = _git("rev-parse", "--short=10", "HEAD")
    if not short:
        return "unknown"
    return short + (
        "+" if _git("status", "--porcelain", "-uno", "--", "csrc", "peftkern", "bench/*.py") else ""
    )


def isa_in_use() -> tuple[str, str]:
    """(instruction set, compiler) of the compiled module, or ("none", reason)."""
    try:
        from peftkern import _cpu
    except ImportError as error:
        return "none", str(error)
    return str(_cpu.isa()), str(_cpu.build_info().get("compiler", "unknown"))


def describe() -> Machine:
    info, caches = _cpuinfo(), dict(sorted(_caches()))
    cpu = info.get("model name") or platform.processor() or platform.machine()
    if info.get("cpu family"):
        cpu += f" (family {info['cpu family']} model {info.get('model', '?')})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    isa, compiler = isa_in_use()
    versions = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    slug = re.sub(r"\((r|tm)\)|\b(cpu|processor|family|model|with)\b|@.*$", " ", cpu.lower())
    return Machine(
        cpu=cpu,
        slug=re.sub(r"[^a-z0-9]+", "-", slug).strip("-") + f"-{cores}c",
        cores=cores,
        threads=torch.get_num_threads(),
        isa=isa,
        l2_bytes=caches.get(2, 1 << 20),
        llc_bytes=max(caches.values(), default=32 << 20),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        commit=commit(),
        compiler=compiler,
        versions="; ".join(versions),
        when=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
